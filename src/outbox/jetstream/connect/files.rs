//! The files of `[nats]`, looked at before the first connection, so that a fault names its
//! setting. The client reads those of TLS again with each connection, and so does the
//! relay with the credentials: what is put in their place is used without a restart.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    sync::Arc,
};

use nkeys::KeyPair;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use zeroize::Zeroizing;

use super::{NatsTls, file_fault};
use crate::{outbox::jetstream::error::JetStreamError, vault::warn_if_open_to_others};

/// Largest of these files, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
const CA: &str = "ca_file";
const CERTIFICATE: &str = "certificate_file";
const KEY: &str = "key_file";
const CREDENTIALS: &str = "credentials_file";

/// A user's JWT and the key that proves that it is the relay's.
pub(super) struct Credentials {
    pub(super) jwt: String,
    pub(super) key: KeyPair,
}

impl Credentials {
    /// Reads a file as `nsc generate creds` writes it.
    pub(super) fn read(path: &Path) -> Result<Self, JetStreamError> {
        let content = read(CREDENTIALS, path)?;
        let text = std::str::from_utf8(&content).unwrap_or_default();
        let fault = |rule: &str| file_fault(CREDENTIALS, path, rule.to_owned());
        let jwt = block(text, "BEGIN NATS USER JWT");
        let jwt = jwt.ok_or_else(|| {
            fault("has to hold a user's JWT and its seed, as `nsc generate creds` writes them")
        })?;
        let seed = block(text, "BEGIN USER NKEY SEED")
            .ok_or_else(|| fault("has to hold the seed of the user's nkey below the JWT"))?;
        let key = KeyPair::from_seed(seed).map_err(|_| fault("its seed is no nkey"))?;
        Ok(Self {
            jwt: jwt.to_owned(),
            key,
        })
    }
}

/// The line below a heading.
fn block<'a>(text: &'a str, heading: &str) -> Option<&'a str> {
    let mut lines = text.lines().map(str::trim);
    lines.find(|line| line.contains(heading))?;
    lines
        .find(|line| !line.is_empty())
        .filter(|line| !line.starts_with('-'))
}

/// Looks at the credentials.
pub(super) fn check_credentials(path: &Path) -> Result<(), JetStreamError> {
    warn_if_open_to_others(path);
    Credentials::read(path).map(drop)
}

/// Looks at what TLS needs.
pub(super) fn check_tls(tls: &NatsTls) -> Result<(), JetStreamError> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = &tls.ca_file {
        for certificate in certificates(CA, path)? {
            let added = roots.add(certificate);
            added.map_err(|error| file_fault(CA, path, error.to_string()))?;
        }
    }
    let Some((certificate, key)) = &tls.identity else {
        return Ok(());
    };
    let chain = certificates(CERTIFICATE, certificate)?;
    warn_if_open_to_others(key);
    let pem = read(KEY, key)?;
    let private = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| {
        let rule = "has to hold a private key in PEM (PKCS #8, PKCS #1 or SEC 1)";
        file_fault(KEY, key, rule.to_owned())
    })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_root_certificates(roots))
        .and_then(|builder| builder.with_client_auth_cert(chain, private))
        .map(drop)
        .map_err(|error| {
            let rule = format!("does not fit to key_file {}: {error}", key.display());
            file_fault(CERTIFICATE, certificate, rule)
        })
}

fn certificates(
    setting: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, JetStreamError> {
    let pem = read(setting, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    found
        .ok()
        .filter(|found| !found.is_empty())
        .ok_or_else(|| file_fault(setting, path, "has to hold certificates in PEM".to_owned()))
}

fn read(setting: &'static str, path: &Path) -> Result<Zeroizing<Vec<u8>>, JetStreamError> {
    let read = || {
        let mut content = Zeroizing::new(Vec::new());
        File::open(path)?
            .take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut content)?;
        if content.len() as u64 > MAX_FILE_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(content)
    };
    read().map_err(|error: io::Error| {
        let rule = match error.kind() {
            io::ErrorKind::NotFound => "there is no such file".to_owned(),
            io::ErrorKind::PermissionDenied => {
                "the user that the relay runs as may not read it; chown it".to_owned()
            }
            io::ErrorKind::IsADirectory => "it is a directory".to_owned(),
            _ => error.to_string(),
        };
        file_fault(setting, path, rule)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_of_credentials_name_the_setting_and_not_the_seed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("relay.creds");
        let seed = KeyPair::new_user().seed().expect("a seed");
        let whole = format!(
            "-----BEGIN NATS USER JWT-----\na.b.c\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        std::fs::write(&path, &whole).expect("written");
        assert_eq!(Credentials::read(&path).expect("fine").jwt, "a.b.c");
        for (bad, wanted) in [
            (String::new(), "nsc generate creds"),
            (seed.clone(), "nsc generate creds"),
            (whole.replace("a.b.c\n", ""), "nsc generate creds"),
            (whole.replace("USER NKEY", "OTHER"), "below the JWT"),
            (whole.replace(&seed, &seed[1..]), "no nkey"),
        ] {
            std::fs::write(&path, bad).expect("written");
            let error = check_credentials(&path).expect_err("bad").to_string();
            assert!(error.starts_with("[nats] credentials_file "), "{error}");
            assert!(error.contains(wanted), "{error}");
            assert!(!error.contains(&seed[1..20]), "{error}");
        }
    }
}
