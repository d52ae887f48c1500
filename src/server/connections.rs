//! Takes connections and serves each in a task of its own: not too many, none
//! that dawdles, none that idles, and each of an age of its own.

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    http2,
    listener::{Accepted, Listener},
    tls::Tls,
    transport::{Connection, shown},
};
use crate::{
    config,
    grpc::{Access, Calls, Dispatch, Peer},
};

/// Wait after the system could not give a connection, e.g. for want of files.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

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
    pub(super) async fn serve(self, listener: Listener, closing: CancellationToken) {
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
                (Ok(accepted), place) => {
                    let connections = Arc::clone(&connections);
                    let closing = closing.clone();
                    tasks.spawn(async move {
                        connections.serve_one(accepted, closing).await;
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

    async fn serve_one(&self, accepted: Accepted, closing: CancellationToken) {
        let options = &self.options;
        let shown = shown(accepted.peer());
        let acceptor = self.tls.as_ref().map(|tls| tls.acceptor());
        let established = tokio::select! {
            () = closing.cancelled() => return,
            established = Connection::establish(accepted, acceptor, options.handshake_timeout) => established,
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

    async fn answer(
        &self,
        connection: Connection,
        peer: Peer,
        closing: CancellationToken,
    ) -> Result<(), h2::Error> {
        let options = &self.options;
        let (access, services) = (Arc::clone(&self.access), self.services.clone());
        let activity = Arc::clone(&peer.activity);
        let calls = Calls::new(access, services, options.request_timeout, peer);
        http2::serve(connection, options, activity, calls, closing).await
    }
}
