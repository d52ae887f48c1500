//! Connects to a relay over TCP or a Unix socket; TLS lies above.

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    task::{Context, Poll},
};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tonic::codegen::BoxFuture;
use tower_service::Service;

use super::seen::{Seen, Stream, Watched};

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
