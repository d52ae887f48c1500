//! What waits, as far as this relay knows: read from the servers now and then, and
//! corrected by what it does itself in between.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, Limits, Quota},
};

/// Bytes of a capture's events before one was seen.
const FIRST_GUESS: f64 = 1_400.0;
/// Weight of a new size in the mean.
const NEWEST: f64 = 0.001;

pub(super) struct Counts {
    limits: Limits,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// Captures that wait in each lane.
    lanes: HashMap<LaneKey, u64>,
    /// The same by integration, and of all.
    integrations: HashMap<IntegrationId, u64>,
    all: u64,
    /// What changed since the servers were asked.
    since: HashMap<LaneKey, i64>,
    mean_bytes: Option<f64>,
}

impl Counts {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            known: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bound that leaves no room for one more capture beside `more` of the
    /// integration and `others` in all, that are about to be stored.
    pub(super) fn full(
        &self,
        id: &IntegrationId,
        bytes: usize,
        (more, others): (u64, u64),
    ) -> Option<Quota> {
        let known = self.lock();
        let mean = known.mean_bytes.unwrap_or(FIRST_GUESS);
        let size = |captures: u64| (captures as f64 * mean) as u64 + bytes as u64;
        let own = known.integrations.get(id).copied().unwrap_or(0) + more;
        let all = known.all + others;
        let limits = &self.limits;
        if own * 2 + 2 > limits.max_integration_events {
            Some(Quota::IntegrationEvents)
        } else if size(own) > limits.max_integration_bytes {
            Some(Quota::IntegrationBytes)
        } else if all * 2 + 2 > limits.max_events {
            Some(Quota::Events)
        } else if size(all) > limits.max_bytes {
            Some(Quota::Bytes)
        } else {
            None
        }
    }

    /// Captures that now wait, with the bytes of their events.
    pub(super) fn add(&self, lane: &LaneKey, captures: u64, bytes: usize) {
        let mut known = self.lock();
        let size = bytes as f64 / captures.max(1) as f64;
        let mean = known.mean_bytes.unwrap_or(size);
        known.mean_bytes = Some(mean + (size - mean) * (NEWEST * captures as f64).min(1.0));
        known.change(lane, i64::try_from(captures).unwrap_or(0));
    }

    /// Captures that no longer wait.
    pub(super) fn remove(&self, lane: &LaneKey, captures: u64) {
        self.lock()
            .change(lane, -i64::try_from(captures).unwrap_or(0));
    }

    /// Bytes of the events of a capture, on average.
    pub(super) fn mean_bytes(&self) -> f64 {
        self.lock().mean_bytes.unwrap_or(FIRST_GUESS)
    }

    /// From now on changes are noted, since the servers are asked.
    pub(super) fn begin(&self) {
        self.lock().since.clear();
    }

    /// What the servers said.
    pub(super) fn set(&self, lanes: HashMap<LaneKey, u64>) {
        let mut known = self.lock();
        let since = std::mem::take(&mut known.since);
        known.integrations.clear();
        known.all = 0;
        known.lanes = HashMap::new();
        for (lane, count) in lanes {
            known.change(&lane, i64::try_from(count).unwrap_or(i64::MAX));
        }
        for (lane, change) in since {
            known.change(&lane, change);
        }
        known.since.clear();
    }
}

impl Known {
    fn change(&mut self, lane: &LaneKey, change: i64) {
        let before = self.lanes.get(lane).copied().unwrap_or(0);
        let after = before.saturating_add_signed(change);
        self.lanes.insert(lane.clone(), after);
        let own = self
            .integrations
            .entry(lane.integration_id.clone())
            .or_default();
        *own = (*own + after).saturating_sub(before);
        self.all = (self.all + after).saturating_sub(before);
        *self.since.entry(lane.clone()).or_default() += change;
    }
}
