//! TLS of the gRPC server: certificates from files, read again when they change.

use std::{
    fs,
    io::{self, Read},
    path::Path,
    sync::{Arc, PoisonError, RwLock},
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    server::{NoClientAuth, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use sha2::{Digest, Sha256};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_util::sync::CancellationToken;

use crate::config;

/// Largest file of certificates or a key, in bytes.
const MAX_PEM_BYTES: u64 = 1024 * 1024;
/// TLS sessions that can be resumed, for connections that come again soon.
const KEPT_SESSIONS: usize = 1_024;

/// Why TLS can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("[server.tls] {setting}: {path}: {source}")]
    Read {
        /// Which file.
        setting: &'static str,
        /// Its path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("[server.tls] {setting}: {path}: {rule}")]
    Content {
        /// Which file.
        setting: &'static str,
        /// Its path.
        path: String,
        /// What it has to hold.
        rule: String,
    },
    /// Certificate and key don't fit together, or are not taken.
    #[error("[server.tls] certificate_file and key_file: {0}")]
    Unfit(rustls::Error),
}

/// The current TLS set-up.
pub(super) struct Tls {
    options: config::Tls,
    current: RwLock<Current>,
}

struct Current {
    acceptor: TlsAcceptor,
    fingerprint: [u8; 32],
}

/// What the files hold.
struct Files {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Tls {
    /// Reads the files.
    pub(super) fn new(options: config::Tls) -> Result<Self, TlsError> {
        let files = Files::read(&options)?;
        let current = Current {
            acceptor: acceptor(&options, &files)?,
            fingerprint: files.fingerprint(),
        };
        Ok(Self {
            options,
            current: RwLock::new(current),
        })
    }

    /// For the next connection.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.acceptor.clone()
    }

    /// Looks at the files now and then, until `stop`.
    pub(super) async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut last_error = String::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.options.reload_interval) => {}
            }
            let tls = Arc::clone(&self);
            let reloaded = tokio::task::spawn_blocking(move || tls.reload()).await;
            match reloaded {
                Ok(Ok(changed)) => {
                    if changed {
                        tracing::info!("the TLS certificates were read again");
                    }
                    last_error.clear();
                }
                Ok(Err(error)) if error.to_string() != last_error => {
                    tracing::error!(%error, "the former TLS certificates are used on");
                    last_error = error.to_string();
                }
                Ok(Err(_)) => {}
                Err(_) => return,
            }
        }
    }

    /// Takes changed files over; returns whether they had changed.
    fn reload(&self) -> Result<bool, TlsError> {
        let files = Files::read(&self.options)?;
        let fingerprint = files.fingerprint();
        let known = self.current.read().unwrap_or_else(PoisonError::into_inner);
        if known.fingerprint == fingerprint {
            return Ok(false);
        }
        drop(known);
        let acceptor = acceptor(&self.options, &files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Current {
            acceptor,
            fingerprint,
        };
        Ok(true)
    }
}

impl Files {
    fn read(options: &config::Tls) -> Result<Self, TlsError> {
        Ok(Self {
            certificate: read("certificate_file", &options.certificate_file)?,
            key: read("key_file", &options.key_file)?,
            client_ca: match &options.client_ca_file {
                Some(path) => Some(read("client_ca_file", path)?),
                None => None,
            },
        })
    }

    /// By content: a mounted secret is changed by changing a link.
    fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for file in [
            Some(&self.certificate),
            Some(&self.key),
            self.client_ca.as_ref(),
        ] {
            let file = file.map_or(&[][..], Vec::as_slice);
            hash.update((file.len() as u64).to_le_bytes());
            hash.update(file);
        }
        hash.finalize().into()
    }
}

fn read(setting: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let read = || {
        let mut content = Vec::new();
        fs::File::open(path)?
            .take(MAX_PEM_BYTES + 1)
            .read_to_end(&mut content)?;
        if content.len() as u64 > MAX_PEM_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(content)
    };
    read().map_err(|source| TlsError::Read {
        setting,
        path: path.display().to_string(),
        source,
    })
}

fn acceptor(options: &config::Tls, files: &Files) -> Result<TlsAcceptor, TlsError> {
    let content = |setting, path: &Path, rule: String| TlsError::Content {
        setting,
        path: path.display().to_string(),
        rule,
    };
    let chain = certificates(&files.certificate)
        .map_err(|rule| content("certificate_file", &options.certificate_file, rule))?;
    let key = PrivateKeyDer::from_pem_slice(&files.key).map_err(|_| {
        let rule = "has to hold a private key in PEM (PKCS #8, PKCS #1 or SEC 1)".to_owned();
        content("key_file", &options.key_file, rule)
    })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = match (&files.client_ca, &options.client_ca_file) {
        (Some(pem), Some(path)) => client_verifier(options, &provider, pem)
            .map_err(|rule| content("client_ca_file", path, rule))?,
        _ => Arc::new(NoClientAuth),
    };
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Unfit)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(TlsError::Unfit)?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.session_storage = rustls::server::ServerSessionMemoryCache::new(KEPT_SESSIONS);
    Ok(TlsAcceptor::from(Arc::new(server)))
}

fn client_verifier(
    options: &config::Tls,
    provider: &Arc<CryptoProvider>,
    pem: &[u8],
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    let builder =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
    let builder = if options.client_certificate_required {
        builder
    } else {
        builder.allow_unauthenticated()
    };
    builder.build().map_err(|error| error.to_string())
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    found
        .ok()
        .filter(|found| !found.is_empty())
        .ok_or_else(|| "has to hold certificates in PEM".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["relay.internal".to_owned()]);
        let made = made.expect("made");
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    /// Keeps what is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

    impl Log {
        /// How many lines have a text.
        fn count(&self, text: &str) -> usize {
            let lines = self.0.lock().expect("sound");
            String::from_utf8_lossy(&lines).matches(text).count()
        }
    }

    impl io::Write for Log {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("sound").write(line)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_new_fault_of_the_files_is_told_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let put = |name: &str, content: &str| {
            let path = directory.path().join(name);
            fs::write(&path, content).expect("written");
            path
        };
        let log = Log::default();
        let written = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || written.clone());
        let _guard = tracing::subscriber::set_default(subscriber.finish());
        let (certificate, key) = pair();
        let tls = Tls::new(config::Tls {
            certificate_file: put("certificate", &certificate),
            key_file: put("key", &key),
            client_ca_file: None,
            client_certificate_required: true,
            reload_interval: std::time::Duration::from_secs(10),
        });
        let stop = CancellationToken::new();
        let following = tokio::spawn(Arc::new(tls.expect("fits")).follow(stop.clone()));
        for round in 1..=2 {
            put("certificate", "-----BEGIN CERT");
            tokio::time::sleep(std::time::Duration::from_secs(35)).await;
            assert_eq!(log.count("the former TLS certificates are used on"), round);
            assert_eq!(log.count("certificate_file"), round);
            // Mended, and looked at but once before it breaks again.
            let (certificate, key) = pair();
            put("certificate", &certificate);
            put("key", &key);
            tokio::time::sleep(std::time::Duration::from_secs(10)).await;
            assert_eq!(log.count("the TLS certificates were read again"), round);
        }
        stop.cancel();
        following.await.expect("ended");
    }

    #[test]
    fn changed_files_are_taken_over_and_unfit_ones_change_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let put = |name: &str, content: &str| {
            let path = directory.path().join(name);
            fs::write(&path, content).expect("written");
            path
        };
        let (certificate, key) = pair();
        let tls = Tls::new(config::Tls {
            certificate_file: put("certificate", &certificate),
            key_file: put("key", &key),
            client_ca_file: None,
            client_certificate_required: true,
            reload_interval: std::time::Duration::from_secs(1),
        });
        let tls = tls.expect("fits");
        assert!(matches!(tls.reload(), Ok(false)));
        put("certificate", "-----BEGIN CERT");
        assert!(matches!(tls.reload(), Err(TlsError::Content { .. })));
        let (other, other_key) = pair();
        put("certificate", &other);
        let unfit = tls.reload().expect_err("the key is another's");
        assert!(matches!(unfit, TlsError::Unfit(_)), "{unfit}");
        fs::remove_file(directory.path().join("key")).expect("removed");
        assert!(matches!(tls.reload(), Err(TlsError::Read { .. })));
        put("key", &other_key);
        assert!(matches!(tls.reload(), Ok(true)));
        assert!(matches!(tls.reload(), Ok(false)));
    }
}
