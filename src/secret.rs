//! Secrets and personal data as types that never print what they hold.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};

/// Longest write key, in characters.
const MAX_WRITE_KEY_CHARS: usize = 256;
/// A hint may give away four characters only of a key that has many more.
const MIN_CHARS_FOR_HINT: usize = 12;

/// A Segment write key: the secret that lets anyone write into a source.
#[derive(Clone, PartialEq, Eq)]
pub struct WriteKey(String);

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
        Ok(Self(key))
    }

    /// The key itself. Call it only where the key leaves for Segment or the store.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Value of the `Authorization` header: Basic, the key as user name and an
    /// empty password.
    #[must_use]
    pub fn basic_authorization(&self) -> String {
        format!("Basic {}", STANDARD.encode(format!("{}:", self.0)))
    }

    /// The last four characters of a key that is long enough to spare them.
    #[must_use]
    pub fn hint(&self) -> &str {
        if self.0.len() < MIN_CHARS_FOR_HINT {
            return "";
        }
        self.0.get(self.0.len() - 4..).unwrap_or("")
    }
}

impl fmt::Debug for WriteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WriteKey(redacted)")
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
}
