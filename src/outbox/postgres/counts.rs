//! What waits, as far as this relay knows: the sums of `backlog` when it last saw them.

use std::{collections::HashMap, ops::AddAssign};

use tokio_postgres::Row;

use super::sql::{Columns, columns};
use crate::outbox::{Limits, Quota};

/// Waiting events and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) events: i64,
    pub(super) bytes: i64,
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        self.events += other.events;
        self.bytes += other.bytes;
    }
}

impl Load {
    /// Two columns of a row.
    pub(super) fn of(row: &Row, first: usize) -> Self {
        let (events, bytes) = (row.get(first), row.get(first + 1));
        Self { events, bytes }
    }

    pub(super) fn negated(self) -> Self {
        let (events, bytes) = (-self.events, -self.bytes);
        Self { events, bytes }
    }

    fn exceeds(self, events: u64, bytes: u64) -> (bool, bool) {
        let above = |value: i64, limit: u64| u64::try_from(value).is_ok_and(|it| it > limit);
        (above(self.events, events), above(self.bytes, bytes))
    }
}

/// The loads of integrations.
#[derive(Debug, Default)]
pub(super) struct Loads(HashMap<i64, Load>);

impl Loads {
    pub(super) fn add(&mut self, integration: i64, load: Load) {
        *self.0.entry(integration).or_default() += load;
    }

    /// As the columns of [`COUNT`], in one order: two transactions never wait for each other.
    pub(super) fn columns(&self) -> Columns<'_> {
        let mut sorted: Vec<_> = self.0.iter().collect();
        sorted.sort_unstable_by_key(|(key, _)| **key);
        columns!(sorted, one => *one.0, one.1.events, one.1.bytes)
    }
}

/// Adds loads, $1 to $3, to the rows of relay $4 and slot $5.
pub(super) const COUNT: &str = "
    INSERT INTO backlog (integration, relay, slot, events, bytes)
    SELECT i.integration, $4, $5, i.events, i.bytes
    FROM unnest($1::int8[], $2::int8[], $3::int8[]) AS i (integration, events, bytes)
    ON CONFLICT (integration, relay, slot) DO UPDATE
    SET events = backlog.events + excluded.events, bytes = backlog.bytes + excluded.bytes";

/// The slots of `backlog` for new captures, and for replays and erasures.
pub(super) const SLOT: i16 = 0;
pub(super) const OTHER_SLOT: i16 = 9;

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
        let (by_integration, total) = (HashMap::new(), Load::default());
        Self {
            limits,
            by_integration,
            total,
        }
    }

    /// Notes the sums of all integrations.
    pub(super) fn set_all(&mut self, loads: impl Iterator<Item = (i64, Load)>) {
        self.by_integration = loads.collect();
        self.total = Load::default();
        for load in self.by_integration.values() {
            self.total += *load;
        }
    }

    /// Notes the sum of one integration.
    pub(super) fn set(&mut self, integration: i64, load: Load) {
        let before = self.by_integration.insert(integration, load);
        self.total += before.unwrap_or_default().negated();
        self.total += load;
    }

    /// Notes a change that this relay has made.
    pub(super) fn add(&mut self, integration: i64, load: Load) {
        *self.by_integration.entry(integration).or_default() += load;
        self.total += load;
    }

    /// The room that is left.
    pub(super) fn room(&self) -> Room<'_> {
        let (own, total) = (HashMap::new(), self.total);
        Room {
            counts: self,
            own,
            total,
        }
    }
}

/// Gives room to one load after another.
pub(super) struct Room<'a> {
    counts: &'a Counts,
    own: HashMap<i64, Load>,
    total: Load,
}

impl Room<'_> {
    /// Takes room for events of an integration.
    ///
    /// # Errors
    /// The bound that they would pass; then they take none.
    pub(super) fn take(&mut self, integration: i64, load: Load) -> Result<(), Quota> {
        let Counts {
            limits,
            by_integration,
            ..
        } = self.counts;
        let taken = self
            .own
            .get(&integration)
            .or(by_integration.get(&integration));
        let (mut own, mut total) = (taken.copied().unwrap_or_default(), self.total);
        own += load;
        total += load;
        match own.exceeds(limits.max_integration_events, limits.max_integration_bytes) {
            (true, _) => return Err(Quota::IntegrationEvents),
            (_, true) => return Err(Quota::IntegrationBytes),
            _ => {}
        }
        match total.exceeds(limits.max_events, limits.max_bytes) {
            (true, _) => return Err(Quota::Events),
            (_, true) => return Err(Quota::Bytes),
            _ => {}
        }
        self.own.insert(integration, own);
        self.total = total;
        Ok(())
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
        let take = |counts: &Counts, events, bytes| counts.room().take(1, load(events, bytes));
        assert_eq!(take(&counts, 2, 10), Ok(()));
        assert_eq!(take(&counts, 4, 10), Err(Quota::IntegrationEvents));
        assert_eq!(take(&counts, 2, 40), Err(Quota::IntegrationBytes));
        counts.set(2, load(8, 40));
        assert_eq!(take(&counts, 2, 0), Err(Quota::Events));
        counts.set(2, load(0, 95));
        assert_eq!(take(&counts, 2, 10), Err(Quota::Bytes));
        counts.set(2, Load::default());
        let mut room = counts.room();
        assert_eq!(room.take(1, load(2, 0)), Ok(()));
        assert_eq!(room.take(1, load(2, 0)), Err(Quota::IntegrationEvents));
        assert_eq!(room.take(2, load(4, 0)), Ok(()));
    }
}
