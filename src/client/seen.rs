//! What was seen of a connection, and what that says of a call that failed: the errors of TLS
//! and HTTP/2 name what they met, and not what is wrong.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes of an answer that show what answers.
const KEPT: usize = 8;

pub(super) const SPEAKS_TLS: &str = "the port speaks TLS: use https://";
pub(super) const ASKS_FOR_CERTIFICATE: &str =
    "the relay asks for a client certificate: give --certificate-file and --key-file";
pub(super) const SILENT: &str =
    "the connection was taken and nothing was said: is it the port of a relay?";

/// The first bytes that came over a connection.
#[derive(Debug, Default)]
pub(super) struct Seen {
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    is_connected: bool,
    first: [u8; KEPT],
    length: usize,
}

impl Seen {
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is wrong, where that is known; `causes` are those of the error.
    pub(super) fn diagnosis(&self, is_tls: bool, causes: &str) -> Option<&'static str> {
        let state = self.with(|state| *state);
        let first = &state.first[..state.length];
        // Records of TLS: an alert, a handshake (RFC 8446, 5.1).
        let speaks_tls = matches!(first, [0x15 | 0x16, 3, ..]);
        let any = |words: &[&str]| words.iter().any(|word| causes.contains(word));
        if first.starts_with(b"HTTP/") {
            return Some("an HTTP/1 server answers there, and no gRPC server");
        }
        if !is_tls {
            return match first {
                _ if speaks_tls => Some(SPEAKS_TLS),
                [] if state.is_connected => Some(SILENT),
                _ => None,
            };
        }
        if !first.is_empty() && !speaks_tls {
            return Some("the port does not speak TLS: use http://");
        }
        if any(&["CertificateRequired"]) {
            return Some(ASKS_FOR_CERTIFICATE);
        }
        if any(&["UnknownIssuer", "BadSignature"]) {
            return Some(
                "the certificate there is signed by no CA that is known here: give --ca-file",
            );
        }
        if any(&["HTTP/2 was not negotiated"]) {
            return Some("an HTTP/1 server answers there, and no gRPC server");
        }
        if state.is_connected && first.is_empty() {
            return Some(SILENT);
        }
        None
    }
}

/// A connection of any kind.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection whose first bytes are noted.
pub(super) struct Watched {
    io: Box<dyn Stream>,
    seen: Arc<Seen>,
}

impl Watched {
    pub(super) fn new(io: Box<dyn Stream>, seen: Arc<Seen>) -> Self {
        // What a former one has shown stays: a channel tries again by itself.
        seen.with(|state| state.is_connected = true);
        Self { io, seen }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        let new = &buffer.filled()[before..];
        if !new.is_empty() {
            self.seen.with(|state| {
                for byte in new.iter().take(KEPT - state.length) {
                    state.first[state.length] = *byte;
                    state.length += 1;
                }
            });
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

/// An error with all that it comes from.
pub(super) fn causes(error: &(dyn std::error::Error + Send + Sync + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
