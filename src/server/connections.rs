//! Takes connections and serves each in a task of its own: not too many, none
//! that dawdles, none that idles, and each of an age of its own.

use std::{pin::pin, sync::Arc, time::Duration};

use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
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
    grpc::{Access, Activity, Calls, Dispatch, Peer},
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
    pub(super) access: Arc<Access>,
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
        let options = &self.options;
        let shown = shown(tcp.peer_addr().ok());
        let acceptor = self.tls.as_ref().map(|tls| tls.acceptor());
        let established = tokio::select! {
            () = closing.cancelled() => return,
            established = Connection::establish(tcp, acceptor, options.handshake_timeout) => established,
        };
        match established {
            Ok((connection, peer)) => {
                if let Err(error) = self.answer(connection, peer, closing).await {
                    // With its cause.
                    tracing::debug!(peer = shown, ?error, "a connection failed");
                }
            }
            Err(error) => {
                tracing::debug!(peer = shown, %error, "a connection failed in its handshake");
            }
        }
    }

    /// Answers the calls of a connection until it ends: of itself, or asked to for its age
    /// or its idleness, within the grace; or, once `closing`, when its calls have ended.
    async fn answer(
        &self,
        connection: Connection,
        peer: Peer,
        closing: CancellationToken,
    ) -> hyper::Result<()> {
        let options = &self.options;
        let idle = idle(Arc::clone(&peer.activity), options.max_connection_idle);
        let age = age(options.max_connection_age, fastrand::f64());
        let (access, services) = (Arc::clone(&self.access), self.services.clone());
        let calls = Arc::new(Calls::new(access, services, options.request_timeout, peer));
        let service = service_fn(move |request| Arc::clone(&calls).answer(request));
        let io = TokioIo::new(connection);
        let mut connection = pin!(self.http().serve_connection(io, service));
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = closing.cancelled() => {
                connection.as_mut().graceful_shutdown();
                return connection.await;
            }
            () = idle => {}
            () = tokio::time::sleep(age) => {}
        }
        connection.as_mut().graceful_shutdown();
        // What is left is cut off.
        let ended = tokio::time::timeout(options.max_connection_age_grace, connection).await;
        ended.unwrap_or(Ok(()))
    }

    /// HTTP/2 alone; what is not named here is as hyper has it, e.g. windows of 1 MiB.
    fn http(&self) -> http2::Builder<TokioExecutor> {
        let options = &self.options;
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .max_concurrent_streams(options.max_concurrent_streams)
            .keep_alive_interval(options.keepalive_interval)
            .keep_alive_timeout(options.keepalive_timeout)
            .max_header_list_size(MAX_HEADER_BYTES)
            .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
            // gRPC has no use for it.
            .auto_date_header(false)
            // Of ours: a call that is refused while its body comes is one, and no fault.
            .max_local_error_reset_streams(None);
        http
    }
}

/// The age of one connection; `random` is from 0 to 1.
fn age(middle: Duration, random: f64) -> Duration {
    middle.mul_f64(1.0 + AGE_JITTER * (2.0 * random - 1.0))
}

/// Ready when the peer has had no call for `longest`.
async fn idle(activity: Arc<Activity>, longest: Duration) {
    let mut since = Instant::now();
    loop {
        match activity.idle_since() {
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
