//! What waits, as far as this relay knows: the sums of `backlog` when it last saw them.

use std::collections::HashMap;

use crate::outbox::{Limits, Quota};

/// Waiting events and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) events: i64,
    pub(super) bytes: i64,
}

impl Load {
    pub(super) fn add(&mut self, other: Self) {
        self.events += other.events;
        self.bytes += other.bytes;
    }

    fn plus(mut self, other: Self) -> Self {
        self.add(other);
        self
    }

    fn exceeds(self, events: u64, bytes: u64) -> (bool, bool) {
        let above = |value: i64, limit: u64| u64::try_from(value).is_ok_and(|it| it > limit);
        (above(self.events, events), above(self.bytes, bytes))
    }
}

/// The loads of all integrations. The sum of one integration is read with every capture that
/// is accepted; the total is as old as the last heartbeat, and this relay's changes since.
#[derive(Debug)]
pub(super) struct Counts {
    limits: Limits,
    by_integration: HashMap<i64, Load>,
    total: Load,
}

impl Counts {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            by_integration: HashMap::new(),
            total: Load::default(),
        }
    }

    /// Notes the sums of all integrations.
    pub(super) fn set_all(&mut self, loads: impl Iterator<Item = (i64, Load)>) {
        self.by_integration = loads.collect();
        self.total = Load::default();
        for load in self.by_integration.values() {
            self.total.add(*load);
        }
    }

    /// Notes the sum of one integration.
    pub(super) fn set(&mut self, integration: i64, load: Load) {
        let before = self.by_integration.insert(integration, load);
        let before = before.unwrap_or_default();
        self.total.add(Load {
            events: load.events - before.events,
            bytes: load.bytes - before.bytes,
        });
    }

    pub(super) fn of(&self, integration: i64) -> Load {
        let load = self.by_integration.get(&integration);
        load.copied().unwrap_or_default()
    }

    /// The bound that more of an integration's events would pass. `new` is the integration's
    /// own, `all` that of all integrations, both not counted yet.
    pub(super) fn full(&self, integration: i64, new: Load, all: Load) -> Option<Quota> {
        let limits = &self.limits;
        let own = self.of(integration).plus(new);
        match own.exceeds(limits.max_integration_events, limits.max_integration_bytes) {
            (true, _) => return Some(Quota::IntegrationEvents),
            (_, true) => return Some(Quota::IntegrationBytes),
            _ => {}
        }
        let total = self.total.plus(all);
        match total.exceeds(limits.max_events, limits.max_bytes) {
            (true, _) => Some(Quota::Events),
            (_, true) => Some(Quota::Bytes),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(events: i64, bytes: i64) -> Load {
        Load { events, bytes }
    }

    #[test]
    fn each_bound_is_named_and_own_bounds_come_first() {
        let mut counts = Counts::new(Limits {
            max_events: 10,
            max_bytes: 100,
            max_integration_events: 4,
            max_integration_bytes: 40,
        });
        counts.set_all([(1, load(2, 10)), (2, load(4, 40))].into_iter());
        let full = |counts: &Counts, new, all| counts.full(1, new, all);
        assert_eq!(full(&counts, load(2, 10), load(2, 10)), None);
        let quota = full(&counts, load(4, 10), load(4, 10));
        assert_eq!(quota, Some(Quota::IntegrationEvents));
        let quota = full(&counts, load(2, 40), load(2, 40));
        assert_eq!(quota, Some(Quota::IntegrationBytes));
        assert_eq!(full(&counts, load(2, 0), load(6, 0)), Some(Quota::Events));
        assert_eq!(full(&counts, load(2, 0), load(2, 60)), Some(Quota::Bytes));
        counts.set(2, load(8, 40));
        assert_eq!(full(&counts, load(2, 0), load(2, 0)), Some(Quota::Events));
        counts.set(2, Load::default());
        assert_eq!(full(&counts, load(2, 0), load(6, 0)), None);
    }
}
