//! One connection as gRPC sees it: plain or TLS, with what is known of the peer,
//! and closed when it does not begin to speak in time.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, rustls::pki_types::CertificateDer, server::TlsStream};

use super::listener::Accepted;
use crate::{
    grpc::{Activity, Peer},
    permission::CertificateName,
};

/// Length of HTTP/2's preface (RFC 9113, 3.4), in bytes.
const PREFACE_BYTES: usize = 24;

/// A connection that is ready for HTTP/2.
pub(super) struct Connection {
    stream: Stream,
    /// Bytes of the preface that have not come yet, and until when they have to.
    preface: Option<(usize, Pin<Box<Sleep>>)>,
    /// Whether what is written now has waited for others: see [`Self::gather`].
    gathered: bool,
    /// Set whenever the peer has sent something.
    heard: Arc<AtomicBool>,
}

enum Stream {
    Plain(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    /// Does the TLS handshake, if there is to be one, and tells what is known of the peer
    /// then. Both it and the preface have to come within `timeout`.
    ///
    /// # Errors
    /// The handshake failed or took too long.
    pub(super) async fn establish(
        accepted: Accepted,
        tls: Option<TlsAcceptor>,
        timeout: Duration,
    ) -> io::Result<(Self, Peer)> {
        let deadline = tokio::time::Instant::now() + timeout;
        let address = accepted.peer();
        if let Accepted::Tcp(tcp) = &accepted {
            tcp.set_nodelay(true)?;
        }
        let (stream, certificate_names) = match (accepted, tls) {
            (Accepted::Unix(unix), _) => (Stream::Unix(unix), Vec::new()),
            (Accepted::Tcp(tcp), None) => (Stream::Plain(tcp), Vec::new()),
            (Accepted::Tcp(tcp), Some(acceptor)) => {
                let stream = tokio::time::timeout_at(deadline, acceptor.accept(tcp)).await??;
                let names = certificate_names(&stream);
                (Stream::Tls(Box::new(stream)), names)
            }
        };
        let peer = Peer {
            address,
            certificate_names: certificate_names.into(),
            activity: Arc::new(Activity::default()),
        };
        let connection = Self {
            stream,
            preface: Some((PREFACE_BYTES, Box::pin(tokio::time::sleep_until(deadline)))),
            gathered: false,
            heard: Arc::default(),
        };
        Ok((connection, peer))
    }

    /// A flag that is set whenever the peer has sent something.
    pub(super) fn heard(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.heard)
    }

    /// Lets other tasks run once before a write, so that the answers of calls that end
    /// at the same time leave in one.
    fn gather(&mut self, context: &Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.gathered, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

/// DNS names and URIs of the client's certificate, which the handshake has
/// verified. A common name is none (RFC 9525, 2).
fn certificate_names(stream: &TlsStream<TcpStream>) -> Vec<CertificateName> {
    let (_, session) = stream.get_ref();
    let leaf: Option<&CertificateDer<'_>> = session.peer_certificates().and_then(<[_]>::first);
    let Some(certificate) = leaf.and_then(|leaf| webpki::EndEntityCert::try_from(leaf).ok()) else {
        return Vec::new();
    };
    let dns = certificate.valid_dns_names().map(CertificateName::dns);
    let uris = certificate.valid_uri_names();
    let uris = uris.map(|uri| CertificateName::Uri(uri.to_owned()));
    dns.chain(uris).collect()
}

impl Stream {
    fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }

    fn as_write(&mut self) -> Pin<&mut (dyn AsyncWrite + Unpin)> {
        match self {
            Self::Plain(stream) => Pin::new(stream),
            Self::Unix(stream) => Pin::new(stream),
            Self::Tls(stream) => Pin::new(stream),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = this.stream.poll_read(context, buffer);
        if buffer.filled().len() > before {
            this.heard.store(true, Ordering::Relaxed);
        }
        if let Some((missing, deadline)) = &mut this.preface {
            *missing = missing.saturating_sub(buffer.filled().len() - before);
            if *missing == 0 {
                this.preface = None;
            } else if read.is_pending() && deadline.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.gather(context));
        self.stream.as_write().poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.gather(context));
        self.stream.as_write().poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Unix(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.gathered = false;
        self.stream.as_write().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_write().poll_shutdown(context)
    }
}

/// Where the peer is, for logs.
pub(super) fn shown(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "unknown".to_owned(), |address| address.to_string())
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, task::Waker};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn each_flush_is_preceded_by_one_turn_of_others() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut client, (tcp, _)) = (client.expect("connected"), accepted.expect("accepted"));
        let timeout = Duration::from_secs(5);
        let connection = Connection::establish(Accepted::Tcp(tcp), None, timeout);
        let (mut connection, _) = connection.await.expect("plain");
        for round in 0..2 {
            let mut nobody = Context::from_waker(Waker::noop());
            let mut first = Pin::new(&mut connection);
            assert!(first.as_mut().poll_write(&mut nobody, b"a").is_pending());
            let second = first.poll_write(&mut nobody, b"b");
            assert!(matches!(second, Poll::Ready(Ok(1))), "{round}: {second:?}");
            let more = poll_fn(|context| Pin::new(&mut connection).poll_write(context, b"c"));
            assert_eq!(more.await.expect("written"), 1, "the same flush");
            connection.flush().await.expect("flushed");
            let mut read = [0; 2];
            client.read_exact(&mut read).await.expect("read");
            assert_eq!(&read, b"bc");
        }
        connection
            .write_all(b"whole")
            .await
            .expect("woken by itself");
    }
}
