//! `segment-relay token`, `secret` and `key`: what has to be random.

use std::io::{Write, stdout};

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use secrecy::ExposeSecret;
use sha2::{Digest, Sha256};

use super::Failure;
use crate::{secret::WebhookSecret, vault};

/// How a token begins, so that scanners for secrets find one.
const TOKEN_PREFIX: &str = "srt1_";

/// A token of 256 bits and its hash.
pub(super) fn token() -> Result<(), Failure> {
    let token = format!(
        "{TOKEN_PREFIX}{}",
        URL_SAFE_NO_PAD.encode(vault::random::<32>()?)
    );
    let hash = hex::encode(Sha256::digest(token.as_bytes()));
    Ok(writeln!(
        stdout(),
        "token         {token}\ntoken_sha256  {hash}"
    )?)
}

/// A secret for webhooks.
pub(super) fn webhook_secret() -> Result<(), Failure> {
    let secret = STANDARD.encode(vault::random::<32>()?);
    Ok(writeln!(stdout(), "{}{secret}", WebhookSecret::PREFIX)?)
}

/// A line for the file of keys.
pub(super) fn key() -> Result<(), Failure> {
    Ok(writeln!(stdout(), "{}", vault::new_key()?.expose_secret())?)
}
