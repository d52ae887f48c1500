//! Certificate authorities of our own, and what they sign.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use tempfile::TempDir;

/// A certificate with its key, as files and as text.
pub(crate) struct Certified {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// A certificate authority.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a CA"))
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for DNS names and URIs; `uri:` before a name makes it a URI.
    pub(crate) fn issue(&self, names: &[&str]) -> Certified {
        self.sign(names, |_| {})
    }

    /// One that was good until 2020.
    pub(crate) fn issue_expired(&self, names: &[&str]) -> Certified {
        self.sign(names, |params| {
            params.not_before = date_time_ymd(2019, 1, 1);
            params.not_after = date_time_ymd(2020, 1, 1);
        })
    }

    fn sign(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Certified {
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        for name in names {
            let uri = name.strip_prefix("uri:");
            let text = uri.unwrap_or(name).try_into().expect("ASCII");
            params
                .subject_alt_names
                .push(if uri.is_some() || name.contains("://") {
                    SanType::URI(text)
                } else if let Ok(address) = name.parse() {
                    SanType::IpAddress(address)
                } else {
                    SanType::DnsName(text)
                });
        }
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("signed");
        Certified {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        }
    }
}

/// A directory of PEM files.
pub(crate) struct Files(TempDir);

impl Files {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Puts a file in the place of one of the same name, in one step.
    pub(crate) fn put(&self, name: &str, content: &str) -> PathBuf {
        let (path, next) = (self.path(name), self.path(&format!("{name}.next")));
        std::fs::write(&next, content).expect("written");
        std::fs::rename(&next, &path).expect("put in place");
        path
    }

    pub(crate) fn put_pair(&self, name: &str, pair: &Certified) {
        self.put(&format!("{name}.key"), &pair.key);
        self.put(&format!("{name}.pem"), &pair.certificate);
    }

    /// `[server.tls]` with the pair `server`, and a client CA where its file is there.
    pub(crate) fn server_settings(&self, client_certificate: &str) -> String {
        let shown = |name: &str| self.path(name).display().to_string();
        let client_ca = if self.path("client-ca.pem").exists() {
            format!("client_ca_file = \"{}\"\n", shown("client-ca.pem"))
        } else {
            String::new()
        };
        format!(
            "[server.tls]\ncertificate_file = \"{}\"\nkey_file = \"{}\"\nreload_interval_ms = 100\n\
             client_certificate = \"{client_certificate}\"\n{client_ca}",
            shown("server.pem"),
            shown("server.key"),
        )
    }
}

impl AsRef<Path> for Files {
    fn as_ref(&self) -> &Path {
        self.0.path()
    }
}
