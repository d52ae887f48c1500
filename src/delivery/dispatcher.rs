//! Starts a worker for each lane that has something to do, and ends them all.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    bell::Bell,
    parts::{DeliveryParts, Shared},
    worker::Worker,
};
use crate::{
    outbox::{LaneKey, OutboxError},
    region::{PerRegion, Region},
};

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
        let dispatcher = Dispatcher {
            parts: Arc::new(parts),
            shared: Arc::new(Shared {
                breakers: PerRegion::default(),
            }),
            lanes: HashMap::new(),
            stop: stop.clone(),
            tasks: tasks.clone(),
        };
        for region in Region::ALL {
            // A gauge that has never been set is no 0 to whoever reads it.
            dispatcher.parts.metrics.breaker(region, false);
        }
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
            let worker = Worker::new(
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
