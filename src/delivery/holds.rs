//! One at a time works with what waits in a lane: its worker from a lease to the
//! settlement, or whoever takes events away from it. And nothing comes back from the
//! dead letters while a person's data is erased.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedMutexGuard, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use crate::{integration::IntegrationId, outbox::LaneKey};

/// Lanes that are remembered although nobody holds them.
const KEPT: usize = 4_096;

/// Who holds which lane.
#[derive(Debug, Default)]
pub struct LaneHolds {
    lanes: Mutex<HashMap<LaneKey, Arc<tokio::sync::Mutex<()>>>>,
    /// Held whole by what may touch all integrations, and shared by what names its own.
    replays: Arc<RwLock<()>>,
    own_replays: Mutex<HashMap<IntegrationId, Arc<tokio::sync::Mutex<()>>>>,
}

/// Keeps others from moving dead letters into lanes.
#[derive(Debug)]
pub struct ReplayHold {
    _whole: Option<OwnedRwLockWriteGuard<()>>,
    _own: Vec<OwnedMutexGuard<()>>,
    _shared: Option<OwnedRwLockReadGuard<()>>,
}

impl LaneHolds {
    /// Waits until nobody holds the lane, and holds it for as long as the guard lives.
    /// Whoever needs several takes them in their order.
    pub async fn hold(&self, lane: &LaneKey) -> OwnedMutexGuard<()> {
        kept(&self.lanes, lane).lock_owned().await
    }

    /// Waits until nobody moves dead letters into lanes, and keeps others from it for as
    /// long as the guard lives. Whoever holds lanes too takes this first. It is this
    /// process's: a shared outbox keeps other relays' replays from erasures itself.
    /// `names` are the integrations that are concerned, where not all may be: those who work
    /// for others do not wait.
    pub async fn hold_replays(&self, names: Option<&[IntegrationId]>) -> ReplayHold {
        let Some(names) = names else {
            return ReplayHold {
                _whole: Some(Arc::clone(&self.replays).write_owned().await),
                _own: Vec::new(),
                _shared: None,
            };
        };
        let shared = Arc::clone(&self.replays).read_owned().await;
        // In their order, so that no two wait for each other.
        let names: BTreeSet<_> = names.iter().map(|id| id.of_incarnation(1)).collect();
        let mut own = Vec::with_capacity(names.len());
        for name in &names {
            own.push(kept(&self.own_replays, name).lock_owned().await);
        }
        ReplayHold {
            _whole: None,
            _own: own,
            _shared: Some(shared),
        }
    }
}

fn kept<K: Clone + Eq + Hash>(
    holds: &Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>,
    key: &K,
) -> Arc<tokio::sync::Mutex<()>> {
    let mut holds = holds.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = holds.get(key) {
        return Arc::clone(found);
    }
    if holds.len() >= KEPT {
        holds.retain(|_, hold| Arc::strong_count(hold) > 1);
    }
    Arc::clone(holds.entry(key.clone()).or_default())
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn replays_of_others_do_not_wait_and_what_concerns_all_waits_for_each() {
        let holds = LaneHolds::default();
        let names = |names: &[&str]| -> Vec<_> {
            let ids = names.iter().map(|name| IntegrationId::new(name));
            ids.map(|id| id.expect("valid")).collect()
        };
        let (a, b, both) = (names(&["a"]), names(&["b"]), names(&["b", "a", "b"]));
        let held = holds.hold_replays(Some(&a)).await;
        let other = holds.hold_replays(Some(&b)).now_or_never();
        drop(other.expect("another integration"));
        assert!(holds.hold_replays(Some(&a)).now_or_never().is_none());
        assert!(holds.hold_replays(Some(&both)).now_or_never().is_none());
        assert!(holds.hold_replays(None).now_or_never().is_none());
        drop(held);
        let whole = holds.hold_replays(None).await;
        assert!(holds.hold_replays(Some(&a)).now_or_never().is_none());
        drop(whole);
        holds.hold_replays(Some(&both)).await;
    }
}
