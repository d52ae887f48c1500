//! The live feed of changes: each watcher has a queue of what it wants to see, and nothing else
//! counts for it. So what it has missed says nothing of the traffic of others.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Notify;

use super::Change;

/// Changes that a watcher may lag behind before it misses some.
const LENGTH: usize = 4_096;

/// What a watcher is told.
#[derive(Clone, Debug)]
pub enum Watched {
    /// A change that it wants to see.
    Change(Change),
    /// So many such changes came faster than they were taken.
    Missed(u64),
}

type Wants = Box<dyn Fn(&Change) -> bool + Send + Sync>;

/// The watchers.
#[derive(Debug, Default)]
pub(super) struct Feed {
    queues: Mutex<Vec<Arc<Queue>>>,
    /// How many they are, without a lock.
    count: AtomicUsize,
}

struct Queue {
    wants: Wants,
    /// At most [`LENGTH`] changes, and one notice behind them.
    waiting: Mutex<VecDeque<Watched>>,
    more: Notify,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

impl Feed {
    pub(super) fn watch(
        self: &Arc<Self>,
        wants: impl Fn(&Change) -> bool + Send + Sync + 'static,
    ) -> Watcher {
        let queue = Arc::new(Queue {
            wants: Box::new(wants),
            waiting: Mutex::default(),
            more: Notify::new(),
        });
        lock(&self.queues).push(Arc::clone(&queue));
        self.count.fetch_add(1, Ordering::AcqRel);
        Watcher {
            feed: Arc::clone(self),
            queue,
        }
    }

    pub(super) fn is_watched(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// Never waits for a slow watcher.
    pub(super) fn publish(&self, change: &Change) {
        for queue in lock(&self.queues).iter() {
            if (queue.wants)(change) {
                queue.push(change);
            }
        }
    }
}

impl Queue {
    fn push(&self, change: &Change) {
        let mut waiting = lock(&self.waiting);
        if waiting.len() < LENGTH {
            waiting.push_back(Watched::Change(change.clone()));
        } else if let Some(Watched::Missed(missed)) = waiting.back_mut() {
            *missed += 1;
        } else {
            waiting.push_back(Watched::Missed(1));
        }
        drop(waiting);
        self.more.notify_one();
    }
}

/// One who watches, for as long as it lives.
#[derive(Debug)]
pub struct Watcher {
    feed: Arc<Feed>,
    queue: Arc<Queue>,
}

impl Watcher {
    /// The next change, or the notice that some were missed.
    pub async fn next(&mut self) -> Watched {
        loop {
            if let Some(next) = self.take() {
                return next;
            }
            self.queue.more.notified().await;
        }
    }

    /// The same, if it is there already.
    pub fn take(&mut self) -> Option<Watched> {
        lock(&self.queue.waiting).pop_front()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        lock(&self.feed.queues).retain(|queue| !Arc::ptr_eq(queue, &self.queue));
        self.feed.count.fetch_sub(1, Ordering::AcqRel);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::EventType,
        integration::IntegrationId,
        region::Region,
        status::{CaptureRecord, EventStatus, State},
        time::UnixMillis,
    };

    fn change(integration: &str) -> Change {
        Change {
            record: Arc::new(CaptureRecord {
                integration_id: IntegrationId::new(integration).expect("valid"),
                capture_id: "c".to_owned(),
                region: Region::Eu,
                mapping_version: 1,
                accept_time: UnixMillis(0),
                queue_time: UnixMillis(0),
                identify: EventStatus::new(State::Queued),
                track: EventStatus::new(State::Queued),
                attempts: Vec::new(),
                trace: None,
            }),
            event: EventType::Track,
            time: UnixMillis(0),
        }
    }

    fn of(feed: &Arc<Feed>, integration: &'static str) -> Watcher {
        feed.watch(move |change| change.record.integration_id.name() == integration)
    }

    #[tokio::test]
    async fn traffic_of_others_neither_wakes_a_watcher_nor_counts_as_missed() {
        let feed = Arc::new(Feed::default());
        let (mut quiet, mut busy) = (of(&feed, "quiet"), of(&feed, "busy"));
        for _ in 0..LENGTH + 7 {
            feed.publish(&change("busy"));
        }
        assert!(quiet.take().is_none());
        feed.publish(&change("quiet"));
        assert!(matches!(quiet.next().await, Watched::Change(_)));
        assert!(quiet.take().is_none());
        for _ in 0..LENGTH {
            assert!(matches!(busy.next().await, Watched::Change(_)));
        }
        // In its place: what comes after it follows.
        feed.publish(&change("busy"));
        assert!(matches!(busy.next().await, Watched::Missed(7)));
        assert!(matches!(busy.next().await, Watched::Change(_)));
        assert!(busy.take().is_none());
    }

    #[tokio::test]
    async fn a_watcher_that_has_gone_leaves_nothing_behind() {
        let feed = Arc::new(Feed::default());
        let (one, other) = (of(&feed, "a"), of(&feed, "a"));
        drop(one);
        assert!(feed.is_watched());
        assert_eq!(lock(&feed.queues).len(), 1);
        drop(other);
        assert!(!feed.is_watched());
        feed.publish(&change("a"));
    }
}
