//! What waits, counted by lane, by integration, and in all; and what room is reserved.

use foldhash::HashMap;

use crate::{
    integration::IntegrationId,
    outbox::{EventSet, LaneKey, Limits, Quota},
};

/// Events and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) events: u64,
    pub(super) bytes: u64,
}

impl Waiting {
    pub(super) fn add(&mut self, events: u64, bytes: u64) {
        self.events += events;
        self.bytes += bytes;
    }

    pub(super) fn remove(&mut self, events: u64, bytes: u64) {
        self.events = self.events.saturating_sub(events);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    fn and(mut self, other: Self) -> Self {
        self.add(other.events, other.bytes);
        self
    }
}

/// Room that is reserved, in all and by integration.
#[derive(Debug, Default)]
pub(super) struct Reserved {
    total: Waiting,
    by_integration: HashMap<IntegrationId, Waiting>,
}

impl Reserved {
    pub(super) fn is_empty(&self) -> bool {
        self.total == Waiting::default()
    }

    pub(super) fn total(&self) -> Waiting {
        self.total
    }

    pub(super) fn of(&self, id: &IntegrationId) -> Waiting {
        self.by_integration.get(id).copied().unwrap_or_default()
    }

    pub(super) fn add(&mut self, id: &IntegrationId, bytes: u64) {
        let events = EventSet::BOTH.len() as u64;
        self.total.add(events, bytes);
        let own = self.by_integration.entry(id.clone()).or_default();
        own.add(events, bytes);
    }

    pub(super) fn give_back(&mut self, part: &Self) {
        self.total.remove(part.total.events, part.total.bytes);
        for (id, part) in &part.by_integration {
            let Some(own) = self.by_integration.get_mut(id) else {
                continue;
            };
            own.remove(part.events, part.bytes);
            if *own == Waiting::default() {
                self.by_integration.remove(id);
            }
        }
    }
}

/// See the module's description.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    total: Waiting,
    by_integration: HashMap<IntegrationId, Waiting>,
    lanes: HashMap<LaneKey, Waiting>,
}

impl Tally {
    pub(super) fn add(&mut self, lane: &LaneKey, events: u64, bytes: u64) {
        self.change(lane, |waiting| waiting.add(events, bytes));
    }

    pub(super) fn remove(&mut self, lane: &LaneKey, events: u64, bytes: u64) {
        self.change(lane, |waiting| waiting.remove(events, bytes));
    }

    fn change(&mut self, lane: &LaneKey, change: impl Fn(&mut Waiting)) {
        if let Some(waiting) = self.lanes.get_mut(lane) {
            change(waiting);
        } else {
            change(self.lanes.entry(lane.clone()).or_default());
        }
        if let Some(waiting) = self.by_integration.get_mut(&lane.integration_id) {
            change(waiting);
        } else {
            let id = lane.integration_id.clone();
            change(self.by_integration.entry(id).or_default());
        }
        change(&mut self.total);
    }

    /// What waits in a lane.
    pub(super) fn lane(&self, lane: &LaneKey) -> Waiting {
        self.lanes.get(lane).copied().unwrap_or_default()
    }

    /// Whether something waits in a lane.
    pub(super) fn waits(&self, lane: &LaneKey) -> bool {
        let waiting = self.lanes.get(lane);
        waiting.is_some_and(|waiting| waiting.events > 0)
    }

    /// The lanes in which something waits.
    pub(super) fn waiting_lanes(&self) -> impl Iterator<Item = (&LaneKey, &Waiting)> {
        self.lanes.iter().filter(|(_, waiting)| waiting.events > 0)
    }

    /// The bound that leaves no room for two more events of `bytes`, if there is one.
    pub(super) fn full(&self, limits: &Limits, id: &IntegrationId, bytes: u64) -> Option<Quota> {
        self.full_beside(&Reserved::default(), limits, id, bytes)
    }

    /// The same, where others have room reserved.
    pub(super) fn full_beside(
        &self,
        reserved: &Reserved,
        limits: &Limits,
        id: &IntegrationId,
        bytes: u64,
    ) -> Option<Quota> {
        let waiting = self.by_integration.get(id).copied().unwrap_or_default();
        let own = waiting.and(reserved.of(id));
        let total = self.total.and(reserved.total());
        let beyond = |waiting: u64, more: u64, max: u64| waiting.saturating_add(more) > max;
        if beyond(own.events, 2, limits.max_integration_events) {
            Some(Quota::IntegrationEvents)
        } else if beyond(own.bytes, bytes, limits.max_integration_bytes) {
            Some(Quota::IntegrationBytes)
        } else if beyond(total.events, 2, limits.max_events) {
            Some(Quota::Events)
        } else if beyond(total.bytes, bytes, limits.max_bytes) {
            Some(Quota::Bytes)
        } else {
            None
        }
    }
}
