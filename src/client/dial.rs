//! Connects to a relay over TCP or a Unix socket; TLS lies above.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore, SignatureScheme,
        client::ResolvesClientCert,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
        sign::CertifiedKey,
    },
};
use tonic::codegen::BoxFuture;
use tower_service::Service;

use super::seen::{Seen, Stream, Watched};

/// Longest wait for a port that is asked whether it speaks TLS.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Connects, and notes what comes back first.
#[derive(Clone)]
pub(super) struct Connector {
    /// Its file, where the relay is reached by a Unix socket.
    pub(super) socket: Option<PathBuf>,
    pub(super) seen: Arc<Seen>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Watched>;
    type Error = io::Error;
    type Future = BoxFuture<Self::Response, io::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        let Self { socket, seen } = self.clone();
        Box::pin(async move {
            let stream: Box<dyn Stream> = match socket {
                Some(path) => Box::new(UnixStream::connect(path).await?),
                None => Box::new(dial(&url).await?),
            };
            Ok(TokioIo::new(Watched::new(stream, seen)))
        })
    }
}

/// Connects to one of a host's addresses.
async fn dial(url: &Uri) -> io::Result<TcpStream> {
    let host = url.host().unwrap_or_default();
    let host = host.trim_matches(['[', ']']);
    let port = url.port_u16();
    let port = port.unwrap_or(if url.scheme_str() == Some("https") {
        443
    } else {
        80
    });
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Whether a port answers to a broken message of TLS with an alert of TLS.
pub(super) async fn speaks_tls(url: &str) -> bool {
    // A handshake message of a type that there is not (RFC 8446, 5.1, 4 and 6).
    const BROKEN: [u8; 9] = [0x16, 3, 1, 0, 4, 0xff, 0, 0, 0];
    let asked = async {
        let mut stream = dial(&url.parse().ok()?).await.ok()?;
        stream.write_all(&BROKEN).await.ok()?;
        let mut first = [0; 2];
        stream.read_exact(&mut first).await.ok()?;
        Some(first == [0x15, 3])
    };
    let answered = timeout(PROBE_TIMEOUT, asked).await;
    matches!(answered, Ok(Some(true)))
}

/// Whether a relay asks for a client certificate in its TLS handshake. `ca` is PEM; without
/// it the CAs of this machine count. TLS 1.3 refuses a client without one after the handshake,
/// when the refusal can get lost behind what the client has sent.
pub(super) async fn asks_for_certificate(url: &str, ca: Option<&str>) -> bool {
    let asked = Arc::new(Asked::default());
    let shake = async {
        let url: Uri = url.parse().ok()?;
        let mut roots = RootCertStore::empty();
        match ca {
            Some(pem) => roots.add_parsable_certificates(
                CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(Result::ok),
            ),
            None => roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
        };
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .ok()?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::clone(&asked) as Arc<dyn ResolvesClientCert>);
        config.alpn_protocols = vec![b"h2".to_vec()];
        let host = url.host()?.trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host).ok()?;
        let connector = TlsConnector::from(Arc::new(config));
        connector.connect(name, dial(&url).await.ok()?).await.ok()
    };
    let _ = timeout(PROBE_TIMEOUT, shake).await;
    asked.0.load(Ordering::Relaxed)
}

/// Has no certificate, and notes that it was asked for one.
#[derive(Debug, Default)]
struct Asked(AtomicBool);

impl ResolvesClientCert for Asked {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.store(true, Ordering::Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        true
    }
}
