//! JSON Web Tokens (RFC 7519) of an OpenID Connect issuer.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jsonwebtoken::{Validation, decode, decode_header, errors::ErrorKind};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::{AuthError, Jwks, ring_provider};
use crate::{
    config,
    integration::IntegrationId,
    permission::{Caller, Permission, Scope},
    time::UnixMillis,
};

/// How far the issuer's clock may be from ours, in seconds.
const LEEWAY_SECONDS: u64 = 30;
/// Tokens that were found good and are not checked again, at the most.
const KEPT_TOKENS: usize = 1_024;
/// A good token is checked again after this time: its key may have been withdrawn.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// Longest subject, in characters.
const MAX_SUBJECT_CHARS: usize = 128;

/// Checks tokens.
pub struct JwtVerifier {
    options: config::Jwt,
    jwks: Jwks,
    /// Good tokens by their SHA-256, and until when they are good.
    good: Mutex<HashMap<Fingerprint, (UnixMillis, Arc<Caller>)>>,
}

/// SHA-256 of a token.
type Fingerprint = [u8; 32];

impl JwtVerifier {
    /// Checks tokens by these rules and keys.
    #[must_use]
    pub fn new(options: config::Jwt, jwks: Jwks) -> Self {
        ring_provider::install();
        Self {
            options,
            jwks,
            good: Mutex::default(),
        }
    }

    /// Reads the keys again now and then, until `stop`.
    pub(super) async fn refresh_keys(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.options.refresh_interval) => {}
            }
            if let Err(error) = self.jwks.refresh(Duration::ZERO).await {
                tracing::warn!(%error, "the former keys are used on");
            }
        }
    }

    /// The caller whom a token names.
    pub(super) async fn verify(&self, token: &str) -> Result<Arc<Caller>, AuthError> {
        let fingerprint: Fingerprint = Sha256::digest(token.as_bytes()).into();
        let now = UnixMillis::now();
        if let Some(caller) = self.kept(&fingerprint, now) {
            return Ok(caller);
        }
        let header = decode_header(token).map_err(|_| AuthError::BadJwt("it is malformed"))?;
        if !ring_provider::ALGORITHMS.contains(&header.alg) {
            return Err(AuthError::BadJwt("its algorithm is not taken"));
        }
        // RFC 7515, 4.1.11: who does not know an extension that is critical refuses.
        if header.crit.is_some() {
            return Err(AuthError::BadJwt(
                "it has extensions that are not known here",
            ));
        }
        let kid = header.kid.as_deref();
        let mut keys = self.jwks.keys();
        if keys.find(kid).is_none() {
            if !self.jwks.refresh_for_unknown().await {
                return Err(AuthError::NoKeys);
            }
            keys = self.jwks.keys();
        }
        let Some(key) = keys.find(kid) else {
            let none = keys.is_empty();
            let unknown = AuthError::BadJwt("its key is not the issuer's");
            return Err(if none { AuthError::NoKeys } else { unknown });
        };
        let mut rules = Validation::new(header.alg);
        rules.leeway = LEEWAY_SECONDS;
        rules.validate_nbf = true;
        rules.set_issuer(&[&self.options.issuer]);
        rules.set_audience(&[&self.options.audience]);
        rules.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        let claims = decode::<Map<String, Value>>(token, key, &rules)
            .map_err(|error| AuthError::BadJwt(why(error.kind())))?
            .claims;
        // One text (RFC 7519, 4.1.1); of an array the library takes any member.
        if claims.get("iss").and_then(Value::as_str) != Some(&self.options.issuer) {
            return Err(AuthError::BadJwt("it is another issuer's"));
        }
        let caller = Arc::new(self.caller(&claims)?);
        let expiry = claims.get("exp").and_then(Value::as_f64).unwrap_or(0.0);
        #[expect(clippy::cast_possible_truncation, reason = "a cast saturates")]
        let expiry = UnixMillis((expiry * 1_000.0) as i64);
        self.keep(fingerprint, expiry.min(now.plus(KEPT_FOR)), &caller, now);
        Ok(caller)
    }

    fn caller(&self, claims: &Map<String, Value>) -> Result<Caller, AuthError> {
        let subject = claims.get("sub").and_then(Value::as_str).unwrap_or("");
        let fits = (1..=MAX_SUBJECT_CHARS).contains(&subject.chars().count())
            && !subject.chars().any(char::is_control);
        if !fits {
            return Err(AuthError::BadJwt("its sub is empty or too long"));
        }
        let permissions: BTreeSet<Permission> = words(claims.get(&self.options.permissions_claim))
            .filter_map(Permission::parse)
            .collect();
        let scope = match &self.options.integrations_claim {
            None => Scope::All,
            Some(claim) => {
                let ids: BTreeSet<_> = words(claims.get(claim))
                    .filter_map(IntegrationId::new)
                    .collect();
                if ids.is_empty() {
                    return Err(AuthError::BadJwt("it names no integration"));
                }
                Scope::Only(ids)
            }
        };
        Ok(Caller {
            name: shown(subject),
            permissions,
            scope,
        })
    }

    fn kept(&self, fingerprint: &Fingerprint, now: UnixMillis) -> Option<Arc<Caller>> {
        let good = self.good.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, caller) = good.get(fingerprint)?;
        (*until > now).then(|| Arc::clone(caller))
    }

    fn keep(
        &self,
        fingerprint: Fingerprint,
        until: UnixMillis,
        caller: &Arc<Caller>,
        now: UnixMillis,
    ) {
        let mut good = self.good.lock().unwrap_or_else(PoisonError::into_inner);
        if good.len() >= KEPT_TOKENS {
            good.retain(|_, (until, _)| *until > now);
        }
        if good.len() < KEPT_TOKENS {
            good.insert(fingerprint, (until, Arc::clone(caller)));
        }
    }
}

/// The name of a subject. Some issuers use addresses, which belong into no log.
fn shown(subject: &str) -> String {
    if subject.contains('@') {
        let hash = hex::encode(Sha256::digest(subject.as_bytes()));
        return format!("jwt:sha256:{}", hash.get(..16).unwrap_or(""));
    }
    format!("jwt:{subject}")
}

/// The words of a claim: an array of texts, or one text with blanks (RFC 8693, 4.2).
fn words(claim: Option<&Value>) -> impl Iterator<Item = &str> {
    let (list, text) = match claim {
        Some(Value::Array(list)) => (list.as_slice(), ""),
        Some(Value::String(text)) => (&[][..], text.as_str()),
        _ => (&[][..], ""),
    };
    list.iter()
        .filter_map(Value::as_str)
        .chain(text.split_ascii_whitespace())
}

fn why(error: &ErrorKind) -> &'static str {
    match error {
        ErrorKind::ExpiredSignature => "it has expired",
        ErrorKind::ImmatureSignature => "it is not valid yet",
        ErrorKind::InvalidIssuer => "it is another issuer's",
        ErrorKind::InvalidAudience => "it is meant for another audience",
        ErrorKind::InvalidSignature => "its signature is wrong",
        ErrorKind::MissingRequiredClaim(_) => "it lacks one of exp, iss, aud and sub",
        _ => "it is malformed",
    }
}
