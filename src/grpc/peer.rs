//! What is known of the other end of a connection.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::time::Instant;

use crate::permission::CertificateName;

/// The other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address.
    pub address: Option<SocketAddr>,
    /// DNS names and URIs of its certificate, as the TLS handshake has verified it.
    pub certificate_names: Arc<[CertificateName]>,
    /// The calls on the connection.
    pub activity: Arc<Activity>,
}

/// Counts the calls on a connection.
#[derive(Debug, Default)]
pub struct Activity {
    calls: AtomicUsize,
    /// Those that anybody may make.
    open_calls: Arc<AtomicUsize>,
    last_end: Mutex<Option<Instant>>,
}

impl Activity {
    /// Notes a call for as long as the guard lives.
    pub(super) fn begin(self: &Arc<Self>) -> ActiveCall {
        self.calls.fetch_add(1, Ordering::Relaxed);
        ActiveCall(Arc::clone(self))
    }

    /// Notes a call that anybody may make, if there are fewer than `most` of them.
    pub(super) fn begin_open(&self, most: usize) -> Option<OpenCall> {
        let call = OpenCall(Arc::clone(&self.open_calls));
        let before = self.open_calls.fetch_add(1, Ordering::Relaxed);
        (before < most).then_some(call)
    }

    /// When the last call ended, or the connection began; `None` while one is under way.
    #[must_use]
    pub fn idle_since(&self) -> Option<Option<Instant>> {
        let last_end = self.last_end.lock().unwrap_or_else(PoisonError::into_inner);
        (self.calls.load(Ordering::Relaxed) == 0).then_some(*last_end)
    }
}

/// A call that is under way.
#[derive(Debug)]
pub(super) struct ActiveCall(Arc<Activity>);

/// A call under way whose caller nobody has asked for a name.
#[derive(Debug)]
pub(super) struct OpenCall(Arc<AtomicUsize>);

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for ActiveCall {
    fn drop(&mut self) {
        let mut last_end = self
            .0
            .last_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *last_end = Some(Instant::now());
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}
