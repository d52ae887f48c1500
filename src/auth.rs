//! Who calls: bearer tokens, JWTs and client certificates become a
//! [`Caller`](crate::permission::Caller), or a refusal.
//!
//! A token decides where there is one, also where it is wrong: a good certificate
//! does not make up for it.

mod jwks;
mod jwt;
mod ring_provider;

use std::{collections::HashMap, sync::Arc};

use http::HeaderValue;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio_util::sync::CancellationToken;

use crate::{
    config::KnownCaller,
    permission::{Caller, CertificateName},
};

pub use jwks::{Jwks, JwksError};
pub use jwt::JwtVerifier;

/// Longest bearer token, in bytes.
const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// Why a caller is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// Neither token nor certificate.
    #[error(
        "give a token in the metadata `authorization: Bearer <token>`, or a client certificate"
    )]
    Missing,
    /// The metadata is not of the form.
    #[error("the metadata has to be `authorization: Bearer <token>`, once")]
    Malformed,
    /// Nobody's token.
    #[error("the token is not known; it may have been cut or withdrawn")]
    UnknownToken,
    /// A JWT that is not good, and why.
    #[error("the token is not taken: {0}")]
    BadJwt(&'static str),
    /// The issuer's keys can't be had now.
    #[error("the keys of the tokens' issuer cannot be read now; try again later")]
    NoKeys,
    /// Nobody's certificate.
    #[error("the client certificate names nobody who is known here")]
    UnknownCertificate,
}

impl AuthError {
    /// The stable word for programs.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Missing => "CREDENTIALS_MISSING",
            Self::Malformed => "CREDENTIALS_MALFORMED",
            Self::UnknownToken => "TOKEN_UNKNOWN",
            Self::BadJwt(_) => "TOKEN_REFUSED",
            Self::NoKeys => "TOKEN_KEYS_UNAVAILABLE",
            Self::UnknownCertificate => "CERTIFICATE_UNKNOWN",
        }
    }
}

/// Knows the callers.
pub struct Authenticator {
    /// Who everybody is where nobody is asked.
    anonymous: Option<Arc<Caller>>,
    tokens: Vec<([u8; 32], Arc<Caller>)>,
    certificates: HashMap<CertificateName, Arc<Caller>>,
    jwt: Option<JwtVerifier>,
}

impl Authenticator {
    /// Knows these. Without any, and without JWTs, everybody is let in.
    #[must_use]
    pub fn new(callers: &[KnownCaller], jwt: Option<JwtVerifier>) -> Self {
        let mut tokens = Vec::new();
        let mut certificates = HashMap::new();
        for known in callers {
            let caller = Arc::new(known.caller.clone());
            let hashes = known.token_hashes.iter();
            tokens.extend(hashes.map(|hash| (*hash, Arc::clone(&caller))));
            for name in &known.certificate_names {
                certificates.insert(name.clone(), Arc::clone(&caller));
            }
        }
        let open = callers.is_empty() && jwt.is_none();
        Self {
            anonymous: open.then(|| Arc::new(Caller::anonymous())),
            tokens,
            certificates,
            jwt,
        }
    }

    /// Keeps the issuer's keys fresh until `stop`.
    pub async fn refresh_keys(&self, stop: CancellationToken) {
        if let Some(jwt) = &self.jwt {
            jwt.refresh_keys(stop).await;
        }
    }

    /// Who it is.
    ///
    /// # Errors
    /// [`AuthError`], without anything of the token.
    pub async fn authenticate(
        &self,
        headers: &http::HeaderMap,
        certificate_names: &[CertificateName],
    ) -> Result<Arc<Caller>, AuthError> {
        if let Some(anonymous) = &self.anonymous {
            return Ok(Arc::clone(anonymous));
        }
        let mut given = headers.get_all(http::header::AUTHORIZATION).iter();
        match (given.next(), given.next()) {
            (None, _) => self.by_certificate(certificate_names),
            (Some(header), None) => {
                let token = bearer(header).ok_or(AuthError::Malformed)?;
                match &self.jwt {
                    // A JWT (RFC 7519) has three parts; our own tokens have no dot.
                    // Boxed, so that calls without one have no room for it.
                    Some(jwt) if token.matches('.').count() == 2 => {
                        Box::pin(jwt.verify(token)).await
                    }
                    _ => self.by_token(token),
                }
            }
            (Some(_), Some(_)) => Err(AuthError::Malformed),
        }
    }

    /// Compares with all hashes, each in constant time, so that the time tells
    /// nothing of any of them.
    fn by_token(&self, token: &str) -> Result<Arc<Caller>, AuthError> {
        let hash = Sha256::digest(token.as_bytes());
        let mut found = None;
        for (known, caller) in &self.tokens {
            if bool::from(known.as_slice().ct_eq(hash.as_slice())) {
                found = Some(caller);
            }
        }
        found.map(Arc::clone).ok_or(AuthError::UnknownToken)
    }

    fn by_certificate(&self, names: &[CertificateName]) -> Result<Arc<Caller>, AuthError> {
        if names.is_empty() {
            return Err(AuthError::Missing);
        }
        names
            .iter()
            .find_map(|name| self.certificates.get(name))
            .map(Arc::clone)
            .ok_or(AuthError::UnknownCertificate)
    }
}

/// The token of `Bearer <token>` (RFC 6750, 2.1); the scheme has no case.
fn bearer(header: &HeaderValue) -> Option<&str> {
    let (scheme, token) = header.to_str().ok()?.split_once(' ')?;
    let token = token.trim_matches(' ');
    let fits = scheme.eq_ignore_ascii_case("bearer")
        && (1..=MAX_TOKEN_BYTES).contains(&token.len())
        && token.bytes().all(|c| c.is_ascii_graphic());
    fits.then_some(token)
}

#[cfg(test)]
mod tests;
