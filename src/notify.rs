//! Webhooks to the people who look after integrations, by the rules of Standard
//! Webhooks 1.0 (<https://www.standardwebhooks.com>).
//!
//! A notice is durable before it is sent, and is tried until the receiver answers
//! 2xx, at most for three days. One at a time, oldest first; while the receiver
//! fails, all wait.

mod sender;

use std::sync::Arc;

use tokio::sync::Notify as Bell;

use crate::{
    notice::Notice,
    outbox::{Outbox, OutboxError},
};

pub use sender::{SenderOptions, run};

/// Takes notices, where there is somebody to tell.
#[derive(Clone)]
pub struct Notices(Option<Arc<Inner>>);

struct Inner {
    outbox: Arc<dyn Outbox>,
    bell: Bell,
}

impl Notices {
    /// Notices go into this outbox.
    #[must_use]
    pub fn new(outbox: Arc<dyn Outbox>) -> Self {
        let bell = Bell::new();
        Self(Some(Arc::new(Inner { outbox, bell })))
    }

    /// Nobody is told.
    #[must_use]
    pub fn nobody() -> Self {
        Self(None)
    }

    /// Makes a notice durable; it is sent soon. One that can't be stored is told to
    /// the log alone: what it is about has happened.
    pub async fn tell(&self, notice: Notice) {
        let Some(inner) = &self.0 else { return };
        match inner.outbox.put_notice(notice).await {
            Ok(()) => inner.bell.notify_one(),
            Err(error) => tracing::error!(%error, "a notification is lost"),
        }
    }

    async fn stored(&self, limit: usize) -> Result<Vec<Notice>, OutboxError> {
        match &self.0 {
            Some(inner) => inner.outbox.notices(limit).await,
            None => Ok(Vec::new()),
        }
    }

    async fn done(&self, id: &str) -> Result<(), OutboxError> {
        match &self.0 {
            Some(inner) => inner.outbox.delete_notice(id).await,
            None => Ok(()),
        }
    }

    async fn rung(&self) {
        match &self.0 {
            Some(inner) => inner.bell.notified().await,
            None => std::future::pending().await,
        }
    }
}
