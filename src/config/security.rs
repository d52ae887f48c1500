//! The sections that keep others out: TLS, JWTs, limits, keys, audits and
//! notifications.

use std::{path::PathBuf, time::Duration};

use secrecy::SecretString;

use crate::secret::WebhookSecret;

use super::{
    endpoint::Endpoint,
    reader::Reader,
    value::{
        millis, number, one_of, optional_path, optional_secret, optional_text, optional_url, path,
        webhook_secret,
    },
};

const HOUR_MS: u64 = 3_600_000;
const RATE: std::ops::RangeInclusive<u64> = 1..=10_000_000;
/// A whole batch has to fit into a burst.
const BURST: std::ops::RangeInclusive<u64> = 1_000..=10_000_000;

/// `[server.tls]`: TLS of the gRPC server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Certificate chain, PEM, the server's first.
    pub certificate_file: PathBuf,
    /// Private key, PEM.
    pub key_file: PathBuf,
    /// CAs that sign clients' certificates, PEM.
    pub client_ca_file: Option<PathBuf>,
    /// Whether a client without certificate is refused, where there are CAs.
    pub client_certificate_required: bool,
    /// How often the files are looked at for a change, 100 ms to 1 h.
    pub reload_interval: Duration,
}

impl Tls {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Option<Self>> {
        const WORDS: &[(&str, bool)] = &[("required", true), ("optional", false)];
        const CERTIFICATE: &str = "server.tls.certificate_file";
        const KEY: &str = "server.tls.key_file";
        const CLIENT_CA: &str = "server.tls.client_ca_file";
        let certificate_file = from.take(CERTIFICATE, optional_path)?;
        let key_file = from.take(KEY, optional_path)?;
        let client_ca_file = from.take(CLIENT_CA, optional_path)?;
        let client_certificate_required =
            from.take("server.tls.client_certificate", one_of(WORDS))?;
        let reload_interval = from.take("server.tls.reload_interval_ms", millis(100..=HOUR_MS))?;
        from.check(
            certificate_file.is_some() == key_file.is_some(),
            [CERTIFICATE, KEY],
            "certificate_file and key_file go together",
        );
        from.check(
            client_ca_file.is_none() || certificate_file.is_some(),
            [CLIENT_CA, CERTIFICATE],
            "client certificates need certificate_file and key_file",
        );
        Some(
            certificate_file
                .zip(key_file)
                .map(|(certificate_file, key_file)| Self {
                    certificate_file,
                    key_file,
                    client_ca_file,
                    client_certificate_required,
                    reload_interval,
                }),
        )
    }
}

/// `[limits]`: what one caller, one integration and all requests together may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Calls of one caller at once, 1 to 1,000,000.
    pub caller_calls_in_flight: usize,
    /// `WatchDeliveries` calls of one caller at once, 0 to 10,000.
    pub caller_watchers: usize,
    /// Calls of one caller at work that list, search or change what is stored, 1 to 1,000.
    pub caller_costly_calls: usize,
    /// Captures of one caller in a second on average, 1 to 10,000,000.
    pub caller_captures_per_second: u32,
    /// Captures of one caller at once, 1,000 to 10,000,000.
    pub caller_burst_captures: u32,
    /// Captures for one integration in a second on average, 1 to 10,000,000.
    pub integration_captures_per_second: u32,
    /// Captures for one integration at once, 1,000 to 10,000,000.
    pub integration_burst_captures: u32,
    /// Integrations that can be created, with those of the file, 1 to 1,000,000.
    pub max_integrations: usize,
    /// Bytes of one integration that is created or updated, 4 KiB to 4 MiB.
    pub max_integration_size: usize,
    /// Bytes of requests and answers that are being handled, 1 MiB to 64 GiB.
    pub request_bytes_in_flight: u64,
}

impl Limits {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        const MIB: u64 = 1024 * 1024;
        let captures = || number("captures", RATE);
        let burst = || number("captures", BURST);
        Some(Self {
            caller_calls_in_flight: from.take(
                "limits.caller_calls_in_flight",
                number("calls", 1..=1_000_000),
            )?,
            caller_watchers: from.take("limits.caller_watchers", number("calls", 0..=10_000))?,
            caller_costly_calls: from
                .take("limits.caller_costly_calls", number("calls", 1..=1_000))?,
            caller_captures_per_second: from
                .take("limits.caller_captures_per_second", captures())?,
            caller_burst_captures: from.take("limits.caller_burst_captures", burst())?,
            integration_captures_per_second: from
                .take("limits.integration_captures_per_second", captures())?,
            integration_burst_captures: from.take("limits.integration_burst_captures", burst())?,
            max_integrations: from.take(
                "limits.max_integrations",
                number("integrations", 1..=1_000_000),
            )?,
            max_integration_size: from.take(
                "limits.max_integration_size",
                number("bytes", MIB / 256..=4 * MIB),
            )?,
            request_bytes_in_flight: from.take(
                "limits.request_bytes_in_flight",
                number("bytes", MIB..=64 * 1024 * MIB),
            )?,
        })
    }
}

/// `[jwt]`: bearer tokens that an OpenID Connect issuer signs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jwt {
    /// `iss` of the tokens.
    pub issuer: String,
    /// One of the tokens' `aud`.
    pub audience: String,
    /// Where the issuer's keys are.
    pub jwks: JwksSource,
    /// How often they are read again, 100 ms to 24 h.
    pub refresh_interval: Duration,
    /// Claim with the permissions.
    pub permissions_claim: String,
    /// Claim with the integrations, where tokens are bound to some.
    pub integrations_claim: Option<String>,
}

/// Where a JSON Web Key Set (RFC 7517) is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JwksSource {
    /// A file.
    File(PathBuf),
    /// A URL.
    Url(Endpoint),
}

impl Jwt {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Option<Self>> {
        let issuer = from.take("jwt.issuer", optional_text)?;
        let audience = from.take("jwt.audience", optional_text)?;
        let file = from.take("jwt.jwks_file", optional_path)?;
        let url = from.take("jwt.jwks_url", optional_url("/.well-known/jwks.json"))?;
        let refresh_interval = from.take("jwt.refresh_interval_ms", millis(100..=24 * HOUR_MS))?;
        let permissions_claim = from.take("jwt.permissions_claim", optional_text)?;
        let integrations_claim = from.take("jwt.integrations_claim", optional_text)?;
        let has_keys = file.is_some() || url.is_some();
        let jwks = match (file, url) {
            (Some(path), None) => Some(JwksSource::File(path)),
            (None, Some(url)) => Some(JwksSource::Url(url)),
            (None, None) => None,
            (Some(_), Some(_)) => {
                let keys = ["jwt.jwks_file", "jwt.jwks_url"];
                from.check(false, keys, "give jwks_file or jwks_url, not both");
                None
            }
        };
        let given = [issuer.is_some(), audience.is_some(), has_keys];
        from.check(
            given == [true; 3] || given == [false; 3],
            [
                "jwt.issuer",
                "jwt.audience",
                "jwt.jwks_file",
                "jwt.jwks_url",
            ],
            "issuer, audience and one of jwks_file and jwks_url go together: a token that is \
             checked against less could be meant for somebody else",
        );
        from.check(
            permissions_claim.is_some(),
            ["jwt.permissions_claim", "jwt.issuer"],
            "name the claim that holds the permissions",
        );
        let (Some(issuer), Some(audience), Some(jwks), Some(permissions_claim)) =
            (issuer, audience, jwks, permissions_claim)
        else {
            return Some(None);
        };
        Some(Some(Self {
            issuer,
            audience,
            jwks,
            refresh_interval,
            permissions_claim,
            integrations_claim,
        }))
    }
}

/// `[secrets]`: the keys under which write keys and payloads are stored.
#[derive(Clone, Debug)]
pub struct Secrets {
    /// The keys themselves, in the form of the file.
    pub keys: Option<SecretString>,
    /// The file of keys; made where it is missing.
    pub key_file: PathBuf,
}

impl Secrets {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            keys: from.take("secrets.keys", optional_secret)?,
            key_file: from.take("secrets.key_file", path)?,
        })
    }
}

/// `[notify]`: webhooks that tell people what happens to integrations.
#[derive(Clone, Debug)]
pub struct Notify {
    /// Where they go.
    pub url: Endpoint,
    /// What signs them.
    pub secret: WebhookSecret,
    /// How long deliveries have to fail before an integration is called broken,
    /// 100 ms to 24 h.
    pub broken_after: Duration,
}

impl Notify {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Option<Self>> {
        const URL: &str = "notify.url";
        const SECRET: &str = "notify.secret";
        let url = from.take(URL, optional_url("/"))?;
        let secret = from.take(SECRET, webhook_secret)?;
        let broken_after = from.take("notify.broken_after_ms", millis(100..=24 * HOUR_MS))?;
        from.check(
            url.is_some() == secret.is_some(),
            [URL, SECRET],
            "url and secret go together: whoever gets a webhook has to know that it is the relay's",
        );
        Some(url.zip(secret).map(|(url, secret)| Self {
            url,
            secret,
            broken_after,
        }))
    }
}
