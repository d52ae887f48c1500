//! Tells delivery of new work, watchers of changes, and callers that wait for
//! their capture that it is settled.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, futures::OwnedNotified, watch};

use super::{
    LaneKey,
    feed::{Feed, Watcher},
};
use crate::{
    event::EventType, integration::IntegrationId, status::CaptureRecord, time::UnixMillis,
};

/// One event of a capture has changed its state.
#[derive(Clone, Debug)]
pub struct Change {
    /// The capture with the state from now on.
    pub record: Arc<CaptureRecord>,
    /// The event that changed.
    pub event: EventType,
    /// When.
    pub time: UnixMillis,
}

type CaptureKey = (IntegrationId, String);

/// Wakes those who wait for something in the outbox. All its memory is bounded
/// by the number of lanes, of waiting calls, and of watchers with their queues.
#[derive(Debug)]
pub struct Signals {
    ready_lanes: Mutex<HashSet<LaneKey>>,
    work: Notify,
    feed: Arc<Feed>,
    waiting: Mutex<HashMap<CaptureKey, Arc<Notify>>>,
    writable: watch::Sender<bool>,
}

impl Default for Signals {
    fn default() -> Self {
        Self {
            ready_lanes: Mutex::default(),
            work: Notify::new(),
            feed: Arc::default(),
            waiting: Mutex::default(),
            writable: watch::Sender::new(true),
        }
    }
}

impl Signals {
    /// Notes that there may be something to do in these lanes.
    pub fn wake_lanes(&self, lanes: impl IntoIterator<Item = LaneKey>) {
        let mut ready = lock(&self.ready_lanes);
        let before = ready.len();
        ready.extend(lanes);
        if ready.len() > before {
            drop(ready);
            self.work.notify_one();
        }
    }

    /// Waits until there may be something to do, and takes the lanes. For one
    /// caller at a time.
    pub async fn ready_lanes(&self) -> HashSet<LaneKey> {
        loop {
            let ready = std::mem::take(&mut *lock(&self.ready_lanes));
            if !ready.is_empty() {
                return ready;
            }
            self.work.notified().await;
        }
    }

    /// The changes from now on that are wanted.
    pub fn watch(&self, wants: impl Fn(&Change) -> bool + Send + Sync + 'static) -> Watcher {
        self.feed.watch(wants)
    }

    /// Whether somebody watches: without, nobody needs to describe changes.
    pub(super) fn is_watched(&self) -> bool {
        self.feed.is_watched()
    }

    /// Whether somebody waits for a capture.
    pub(super) fn is_expected(&self) -> bool {
        !lock(&self.waiting).is_empty()
    }

    /// The captures for which callers wait.
    pub(super) fn expected(&self) -> Vec<CaptureKey> {
        lock(&self.waiting).keys().cloned().collect()
    }

    /// Tells the watchers. Never waits for a slow one.
    pub(super) fn publish(&self, change: &Change) {
        self.feed.publish(change);
    }

    /// Whether the last attempt to write went well, now and from now on.
    #[must_use]
    pub fn writable(&self) -> watch::Receiver<bool> {
        self.writable.subscribe()
    }

    /// Whether the last attempt to write went well.
    pub(super) fn is_writable(&self) -> bool {
        *self.writable.borrow()
    }

    /// Notes whether writing goes well.
    pub(super) fn set_writable(&self, writable: bool) {
        self.writable
            .send_if_modified(|before| std::mem::replace(before, writable) != writable);
    }

    /// Prepares to wait for a capture. Look at its state after this call, and
    /// only then wait: so no change slips through between the two.
    #[must_use]
    pub fn expect(&self, integration_id: &IntegrationId, capture_id: &str) -> Expectation<'_> {
        let key = (integration_id.clone(), capture_id.to_owned());
        let notify = Arc::clone(lock(&self.waiting).entry(key.clone()).or_default());
        Expectation {
            signals: self,
            key,
            notify,
        }
    }

    /// Wakes those who wait for this capture.
    pub(super) fn settled(&self, integration_id: &IntegrationId, capture_id: &str) {
        let waiting = lock(&self.waiting);
        if waiting.is_empty() {
            return;
        }
        if let Some(notify) = waiting.get(&(integration_id.clone(), capture_id.to_owned())) {
            notify.notify_waiters();
        }
    }
}

/// Somebody waits for a capture to be settled.
#[derive(Debug)]
pub struct Expectation<'a> {
    signals: &'a Signals,
    key: CaptureKey,
    notify: Arc<Notify>,
}

impl Expectation<'_> {
    /// Ready at the next change to a final state after this call.
    pub fn next_change(&self) -> OwnedNotified {
        Arc::clone(&self.notify).notified_owned()
    }
}

impl Drop for Expectation<'_> {
    fn drop(&mut self) {
        let mut waiting = lock(&self.signals.waiting);
        // The map and this expectation hold one reference each; another one
        // means that somebody else waits for the same capture.
        if Arc::strong_count(&self.notify) == 2 {
            waiting.remove(&self.key);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Region;

    fn lane(shard: u16) -> LaneKey {
        LaneKey {
            integration_id: IntegrationId::new("acme").expect("valid"),
            region: Region::Eu,
            shard,
        }
    }

    #[tokio::test]
    async fn lanes_woken_before_and_while_somebody_waits_are_all_taken() {
        let signals = Signals::default();
        signals.wake_lanes([lane(0), lane(1), lane(0)]);
        assert_eq!(
            signals.ready_lanes().await,
            HashSet::from([lane(0), lane(1)])
        );
        let (ready, ()) = tokio::join!(signals.ready_lanes(), async {
            signals.wake_lanes([lane(2)]);
        });
        assert_eq!(ready, HashSet::from([lane(2)]));
    }

    #[tokio::test]
    async fn whoever_waits_for_a_capture_is_woken_and_leaves_nothing_behind() {
        let signals = Signals::default();
        let id = IntegrationId::new("acme").expect("valid");
        let (first, second) = (signals.expect(&id, "c"), signals.expect(&id, "c"));
        let (a, b) = (first.next_change(), second.next_change());
        signals.settled(&id, "c");
        tokio::join!(a, b);
        drop(first);
        assert_eq!(lock(&signals.waiting).len(), 1);
        drop(second);
        assert_eq!(lock(&signals.waiting).len(), 0);
    }
}
