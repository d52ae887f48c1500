//! Takes connections and serves each in a task of its own: not too many, none
//! that dawdles, none that idles, and each of an age of its own.

use std::{future::ready, io, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    tls::Tls,
    transport::{Connection, shown},
};
use crate::{
    config,
    grpc::{AccessLayer, Dispatch, Peer},
};

/// Size of all headers of a call, in bytes.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Streams that a client may open and reset before its connection is closed:
/// against rapid reset (CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 64;
/// Wait after the system could not give a connection, e.g. for want of files.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// The share of a connection's age by which it may be older or younger, so that
/// those of one moment don't all end in one.
const AGE_JITTER: f64 = 0.1;

/// What every connection is served with.
pub(super) struct Connections {
    pub(super) options: Arc<config::Server>,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) access: AccessLayer,
    pub(super) services: Dispatch,
}

impl Connections {
    /// Serves until `closing`; then takes no more, and ends when the calls in hand
    /// have ended.
    pub(super) async fn serve(self, listener: TcpListener, closing: CancellationToken) {
        let places = Arc::new(Semaphore::new(self.options.max_connections));
        let tasks = TaskTracker::new();
        let connections = Arc::new(self);
        loop {
            let accepted = tokio::select! {
                () = closing.cancelled() => break,
                accepted = async {
                    // Never closed.
                    let place = Arc::clone(&places).acquire_owned().await.ok();
                    (listener.accept().await, place)
                } => accepted,
            };
            match accepted {
                (Ok((tcp, _)), place) => {
                    let connections = Arc::clone(&connections);
                    let closing = closing.clone();
                    tasks.spawn(async move {
                        connections.serve_one(tcp, closing).await;
                        drop(place);
                    });
                }
                (Err(error), _) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
        drop(listener);
        tasks.close();
        tasks.wait().await;
    }

    async fn serve_one(&self, tcp: TcpStream, closing: CancellationToken) {
        let ended = CancellationToken::new();
        let peer = shown(tcp.peer_addr().ok());
        let acceptor = self.tls.as_ref().map(|tls| tls.acceptor());
        let established = tokio::select! {
            () = closing.cancelled() => return,
            established = Connection::establish(
                tcp,
                acceptor,
                self.options.handshake_timeout,
                ended.clone(),
            ) => established,
        };
        let connection = match established {
            Ok(connection) => connection,
            Err(error) => {
                tracing::debug!(peer, %error, "a connection failed in its handshake");
                return;
            }
        };
        let idle = idle(connection.peer().clone(), self.options.max_connection_idle);
        // One connection; more never come.
        let incoming = stream::once(ready(Ok::<_, io::Error>(connection))).chain(stream::pending());
        let over = async move {
            tokio::select! {
                () = closing.cancelled() => {}
                () = idle => {}
                () = ended.cancelled() => {}
            }
        };
        let served = self
            .builder()
            .layer(self.access.clone())
            .serve_with_incoming_shutdown(self.services.clone(), incoming, over);
        if let Err(error) = served.await {
            tracing::debug!(peer, %error, "a connection failed");
        }
    }

    fn builder(&self) -> tonic::transport::Server {
        let options = &self.options;
        tonic::transport::Server::builder()
            .max_concurrent_streams(options.max_concurrent_streams)
            .timeout(options.request_timeout)
            .http2_keepalive_interval(Some(options.keepalive_interval))
            .http2_keepalive_timeout(Some(options.keepalive_timeout))
            .max_connection_age(age(options.max_connection_age, fastrand::f64()))
            .max_connection_age_grace(options.max_connection_age_grace)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
    }
}

/// The age of one connection; `random` is from 0 to 1.
fn age(middle: Duration, random: f64) -> Duration {
    middle.mul_f64(1.0 + AGE_JITTER * (2.0 * random - 1.0))
}

/// Ready when the peer has had no call for `longest`.
async fn idle(peer: Peer, longest: Duration) {
    let mut since = Instant::now();
    loop {
        match peer.activity.idle_since() {
            None => since = Instant::now(),
            Some(ended) => since = ended.map_or(since, |moment| moment.max(since)),
        }
        let left = (since + longest).saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_of_one_moment_end_within_a_fifth_of_their_age() {
        let ages = [0.0, 0.5, 1.0].map(|random| age(Duration::from_secs(1_000), random));
        assert_eq!(ages, [900, 1_000, 1_100].map(Duration::from_secs));
    }
}
