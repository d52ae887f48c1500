//! Starts a worker for each lane that has something to do, and ends them all.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{LaneOptions, RateLimits, VitalsBoard, breaker::Breaker, worker};
use crate::{
    outbox::{LaneKey, Outbox, OutboxError},
    region::PerRegion,
    registry::Registry,
    segment::SegmentClient,
};

/// What delivery works with.
#[derive(Clone)]
pub struct DeliveryParts {
    /// Where events come from.
    pub outbox: Arc<dyn Outbox>,
    /// Where they go.
    pub segment: Arc<SegmentClient>,
    /// Whose they are.
    pub registry: Arc<Registry>,
    /// How it went.
    pub vitals: Arc<VitalsBoard>,
    /// How fast each integration may send.
    pub rates: Arc<RateLimits>,
    /// Bounds of each lane.
    pub lanes: LaneOptions,
    /// Requests in flight at the most, of all lanes.
    pub max_requests_in_flight: usize,
}

/// Delivery under way.
pub struct Delivery {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Delivery {
    /// Starts delivery of what waits and of what will come.
    ///
    /// # Errors
    /// The outbox can't be read.
    pub async fn start(parts: DeliveryParts) -> Result<Self, OutboxError> {
        let waiting = parts.outbox.waiting_lanes().await?;
        parts.outbox.signals().wake_lanes(waiting);
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let permits = Semaphore::new(parts.max_requests_in_flight);
        let dispatcher = Dispatcher {
            parts: Arc::new(parts),
            shared: Arc::new(Shared {
                permits,
                breakers: PerRegion::default(),
            }),
            lanes: HashMap::new(),
            stop: stop.clone(),
            tasks: tasks.clone(),
        };
        tasks.spawn(dispatcher.run());
        Ok(Self { stop, tasks })
    }

    /// Takes no new leases; returns when the requests in flight are settled.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// What lanes share beside the parts.
pub(super) struct Shared {
    pub(super) permits: Semaphore,
    pub(super) breakers: PerRegion<Breaker>,
}

struct Dispatcher {
    parts: Arc<DeliveryParts>,
    shared: Arc<Shared>,
    lanes: HashMap<LaneKey, Arc<Bell>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Dispatcher {
    async fn run(mut self) {
        let parts = Arc::clone(&self.parts);
        loop {
            let ready = tokio::select! {
                () = self.stop.cancelled() => return,
                ready = parts.outbox.signals().ready_lanes() => ready,
            };
            self.wake(ready);
        }
    }

    fn wake(&mut self, ready: HashSet<LaneKey>) {
        for key in ready {
            if self.lanes.get(&key).is_some_and(|bell| bell.ring()) {
                continue;
            }
            // Those who went home leave their bells here; few enough to look
            // through each time that somebody comes.
            self.lanes.retain(|_, bell| !bell.has_left());
            let bell = Arc::new(Bell::default());
            self.lanes.insert(key.clone(), Arc::clone(&bell));
            let worker = worker::Worker::new(
                key,
                Arc::clone(&self.parts),
                Arc::clone(&self.shared),
                bell,
                self.stop.clone(),
            );
            self.tasks.spawn(worker.run());
        }
    }
}

/// Calls one worker. A worker that leaves while it is called is not missed:
/// both happen under one lock.
#[derive(Debug, Default)]
pub(super) struct Bell {
    state: Mutex<BellState>,
    rung: Notify,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum BellState {
    #[default]
    Quiet,
    Rung,
    Left,
}

impl Bell {
    /// Calls the worker. Returns whether it is still there.
    fn ring(&self) -> bool {
        let mut state = self.lock();
        if *state == BellState::Left {
            return false;
        }
        *state = BellState::Rung;
        drop(state);
        self.rung.notify_one();
        true
    }

    fn has_left(&self) -> bool {
        *self.lock() == BellState::Left
    }

    /// Waits to be called.
    pub(super) async fn heard(&self) {
        loop {
            {
                let mut state = self.lock();
                if *state == BellState::Rung {
                    *state = BellState::Quiet;
                    return;
                }
            }
            self.rung.notified().await;
        }
    }

    /// Goes home, unless somebody calls. Returns whether it may.
    pub(super) fn leave(&self) -> bool {
        let mut state = self.lock();
        let quiet = *state != BellState::Rung;
        if quiet {
            *state = BellState::Left;
        }
        quiet
    }

    fn lock(&self) -> MutexGuard<'_, BellState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bell_is_heard_also_if_it_rang_before_and_keeps_a_worker_from_leaving() {
        let bell = Bell::default();
        assert!(bell.ring());
        assert!(!bell.leave());
        bell.heard().await;
        assert!(bell.leave());
        assert!(bell.has_left());
        assert!(!bell.ring());
    }
}
