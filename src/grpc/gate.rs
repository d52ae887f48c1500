//! Lets calls in: not too many at once, and none once the relay drains.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{RelayError, usage::CallerPermit};

/// A call's place among those in flight, and among its caller's; both are free again when the
/// last copy goes.
#[derive(Clone, Debug)]
pub(super) struct Place {
    _place: Arc<OwnedSemaphorePermit>,
    _turn: Option<Arc<CallerPermit>>,
}

/// Counts calls and streams. Cheap to ask.
#[derive(Debug)]
pub struct Gate {
    calls: Arc<Semaphore>,
    watchers: Arc<Semaphore>,
    draining: CancellationToken,
    /// Streams run beside the call that opened them.
    pub(super) streams: TaskTracker,
}

impl Gate {
    /// A gate with bounds on calls (streams of captures included) and watchers.
    #[must_use]
    pub fn new(max_calls: usize, max_watchers: usize, draining: CancellationToken) -> Self {
        Self {
            calls: Arc::new(Semaphore::new(max_calls)),
            watchers: Arc::new(Semaphore::new(max_watchers)),
            draining,
            streams: TaskTracker::new(),
        }
    }

    /// Lets a call in for as long as it has its place.
    pub(super) fn enter(&self, turn: Option<Arc<CallerPermit>>) -> Result<Place, RelayError> {
        self.open()?;
        let permit = Arc::clone(&self.calls).try_acquire_owned();
        let permit = permit.map_err(|_| RelayError::Busy("calls"))?;
        Ok(Place {
            _place: Arc::new(permit),
            _turn: turn,
        })
    }

    /// Lets a watcher in for as long as the permit lives.
    pub(super) fn enter_watcher(&self) -> Result<OwnedSemaphorePermit, RelayError> {
        self.open()?;
        Arc::clone(&self.watchers)
            .try_acquire_owned()
            .map_err(|_| RelayError::Busy("watchers"))
    }

    fn open(&self) -> Result<(), RelayError> {
        if self.draining.is_cancelled() {
            Err(RelayError::Draining)
        } else {
            Ok(())
        }
    }

    /// Ready once the relay drains.
    pub(super) async fn draining(&self) {
        self.draining.cancelled().await;
    }

    /// Waits until all streams have ended.
    pub async fn drained(&self) {
        self.streams.close();
        self.streams.wait().await;
    }
}
