//! One at a time works with what waits in a lane: its worker from a lease to the
//! settlement, or whoever takes events away from it. And nothing comes back from the
//! dead letters while a person's data is erased.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{MutexGuard, OwnedMutexGuard};

use crate::outbox::LaneKey;

/// Lanes that are remembered although nobody holds them.
const KEPT: usize = 4_096;

/// Who holds which lane.
#[derive(Debug, Default)]
pub struct LaneHolds {
    lanes: Mutex<HashMap<LaneKey, Arc<tokio::sync::Mutex<()>>>>,
    replays: tokio::sync::Mutex<()>,
}

impl LaneHolds {
    /// Waits until nobody holds the lane, and holds it for as long as the guard lives.
    /// Whoever needs several takes them in their order.
    pub async fn hold(&self, lane: &LaneKey) -> OwnedMutexGuard<()> {
        self.of(lane).lock_owned().await
    }

    /// Waits until nobody moves dead letters into lanes, and keeps others from it for as
    /// long as the guard lives. Whoever holds lanes too takes this first. It is this
    /// process's: a shared outbox keeps other relays' replays from erasures itself.
    pub async fn hold_replays(&self) -> MutexGuard<'_, ()> {
        self.replays.lock().await
    }

    fn of(&self, lane: &LaneKey) -> Arc<tokio::sync::Mutex<()>> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = lanes.get(lane) {
            return Arc::clone(found);
        }
        if lanes.len() >= KEPT {
            lanes.retain(|_, hold| Arc::strong_count(hold) > 1);
        }
        Arc::clone(lanes.entry(lane.clone()).or_default())
    }
}
