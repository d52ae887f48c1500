//! Secrets and personal data as types that never print what they hold.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use sha2::Sha256;

/// Longest write key, in characters.
const MAX_WRITE_KEY_CHARS: usize = 256;
/// A hint may give away four characters only of a key that has many more.
const MIN_CHARS_FOR_HINT: usize = 12;

/// A Segment write key: the secret that lets anyone write into a source.
/// Its memory is wiped when it goes.
#[derive(Clone)]
pub struct WriteKey(SecretString);

impl PartialEq for WriteKey {
    fn eq(&self, other: &Self) -> bool {
        self.expose() == other.expose()
    }
}

impl Eq for WriteKey {}

impl WriteKey {
    /// Takes a key of 1 to 256 printable ASCII characters without colon, which
    /// Basic authentication (RFC 7617) uses as its separator, quote and backslash.
    ///
    /// # Errors
    /// What a write key has to look like; never the key itself.
    pub fn new(key: impl Into<String>) -> Result<Self, &'static str> {
        let key = key.into();
        let fits = |c: u8| c.is_ascii_graphic() && !matches!(c, b':' | b'"' | b'\\');
        if key.is_empty() || key.len() > MAX_WRITE_KEY_CHARS || !key.bytes().all(fits) {
            return Err(
                "a write key is 1 to 256 printable ASCII characters without white space, \
                 colon, quote or backslash; copy it from the source's Settings > API Keys",
            );
        }
        Ok(Self(key.into()))
    }

    /// The key itself. Call it only where the key leaves for Segment or the store.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// Value of the `Authorization` header: Basic, the key as user name and an
    /// empty password.
    #[must_use]
    pub fn basic_authorization(&self) -> String {
        format!("Basic {}", STANDARD.encode(format!("{}:", self.expose())))
    }

    /// The last four characters of a key that is long enough to spare them.
    #[must_use]
    pub fn hint(&self) -> &str {
        let key = self.expose();
        if key.len() < MIN_CHARS_FOR_HINT {
            return "";
        }
        key.get(key.len() - 4..).unwrap_or("")
    }
}

impl fmt::Debug for WriteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WriteKey(redacted)")
    }
}

/// What webhooks are signed with, by the rules of Standard Webhooks 1.0.
#[derive(Clone)]
pub struct WebhookSecret(SecretSlice<u8>);

impl WebhookSecret {
    /// How its text begins.
    pub const PREFIX: &str = "whsec_";

    /// Takes `whsec_` and 24 to 64 bytes in base64.
    ///
    /// # Errors
    /// What it has to look like; never the secret itself.
    pub fn new(text: &str) -> Result<Self, &'static str> {
        text.strip_prefix(Self::PREFIX)
            .and_then(|encoded| STANDARD.decode(encoded).ok())
            .filter(|key| (24..=64).contains(&key.len()))
            .map(|key| Self(key.into()))
            .ok_or("whsec_ and 24 to 64 bytes in base64, as `segment-relay secret` prints it")
    }

    /// The value of `webhook-signature` for a message.
    #[must_use]
    pub fn sign(&self, id: &str, timestamp: i64, body: &[u8]) -> String {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(self.0.expose_secret()) else {
            return String::new();
        };
        mac.update(format!("{id}.{timestamp}.").as_bytes());
        mac.update(body);
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

impl fmt::Debug for WebhookSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebhookSecret(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_authorization_ends_the_key_with_a_colon() {
        let key = WriteKey::new("abc").expect("a fine key");
        // printf 'abc:' | base64
        assert_eq!(key.basic_authorization(), "Basic YWJjOg==");
    }

    #[test]
    fn a_write_key_never_prints_itself() {
        let key = WriteKey::new("topsecretkey1234").expect("a fine key");
        assert_eq!(format!("{key:?}"), "WriteKey(redacted)");
        assert_eq!(key.hint(), "1234");
        assert_eq!(WriteKey::new("short").expect("a fine key").hint(), "");
    }

    #[test]
    fn keys_that_would_break_a_header_or_json_are_refused() {
        for key in [
            "",
            "a b",
            "a:b",
            "a\"b",
            "a\\b",
            "ü",
            "a\nb",
            &"k".repeat(257),
        ] {
            assert!(WriteKey::new(key).is_err());
        }
    }

    #[test]
    fn webhooks_are_signed_as_the_specification_has_it() {
        // The example of the Standard Webhooks specification's reference libraries.
        let secret = WebhookSecret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("fine");
        assert_eq!(
            secret.sign(
                "msg_p5jXN8AQM9LWM0D4loKWxJek",
                1_614_265_330,
                br#"{"test": 2432232314}"#
            ),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
        assert_eq!(format!("{secret:?}"), "WebhookSecret(redacted)");
        for bad in [
            "",
            "whsec_",
            "whsec_AAAA",
            "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "whsec_%",
        ] {
            assert!(WebhookSecret::new(bad).is_err(), "{bad}");
        }
    }
}
