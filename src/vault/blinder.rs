//! Numbers in the place of values that may be guessed.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Turns values that may be guessed, such as the hash of an address, into numbers
/// that tell nothing without the key.
#[derive(Clone)]
pub struct Blinder(Hmac<Sha256>);

impl fmt::Debug for Blinder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Blinder(redacted)")
    }
}

impl Blinder {
    /// Blinds under a key.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        // HMAC pads a short key with zeros to its block (RFC 2104, 2).
        let mut block = hmac::digest::Key::<Hmac<Sha256>>::default();
        block[..key.len()].copy_from_slice(key);
        Self(KeyInit::new(&block))
    }

    /// HMAC-SHA-256 of a value of one kind.
    #[must_use]
    pub fn blind(&self, kind: u8, value: &[u8]) -> [u8; 32] {
        let mut mac = self.0.clone();
        mac.update(&[kind]);
        mac.update(value);
        mac.finalize().into_bytes().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blinding_is_hmac_sha256() {
        let key = [7; 32];
        let ours = Blinder::new(&key).blind(b'a', b"bc");
        let ring_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
        assert_eq!(ours, ring::hmac::sign(&ring_key, b"abc").as_ref());
    }
}
