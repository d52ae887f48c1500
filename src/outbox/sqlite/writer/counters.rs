//! What waits, counted by lane: in memory for quick decisions, in the `lane`
//! table so that it is known at once after a start.

use std::collections::{BTreeSet, HashMap};

use rusqlite::{Connection, Transaction, params};

use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, Limits, Quota, sqlite::row::region_number},
};

#[derive(Clone, Copy, Debug, Default)]
struct Waiting {
    events: u64,
    bytes: u64,
}

impl Waiting {
    fn add(&mut self, events: u64, bytes: u64) {
        self.events += events;
        self.bytes += bytes;
    }

    fn remove(&mut self, events: u64, bytes: u64) {
        self.events = self.events.saturating_sub(events);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

#[derive(Debug)]
struct Lane {
    integration_id: IntegrationId,
    waiting: Waiting,
}

#[derive(Debug)]
pub(super) struct Counters {
    limits: Limits,
    total: Waiting,
    by_integration: HashMap<IntegrationId, Waiting>,
    lanes: HashMap<i64, Lane>,
    lane_ids: HashMap<LaneKey, i64>,
    touched: BTreeSet<i64>,
}

impl Counters {
    pub(super) fn load(connection: &Connection, limits: Limits) -> rusqlite::Result<Self> {
        let mut counters = Self {
            limits,
            total: Waiting::default(),
            by_integration: HashMap::new(),
            lanes: HashMap::new(),
            lane_ids: HashMap::new(),
            touched: BTreeSet::new(),
        };
        let mut statement = connection
            .prepare("SELECT id, integration_id, waiting_events, waiting_bytes FROM lane")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let integration_id: String = row.get(1)?;
            // Only valid ids are ever stored.
            let Some(integration_id) = IntegrationId::new(&integration_id) else {
                continue;
            };
            let waiting = Waiting {
                events: row.get(2)?,
                bytes: row.get(3)?,
            };
            counters.total.add(waiting.events, waiting.bytes);
            let sum = counters
                .by_integration
                .entry(integration_id.clone())
                .or_default();
            sum.add(waiting.events, waiting.bytes);
            counters.lanes.insert(
                row.get(0)?,
                Lane {
                    integration_id,
                    waiting,
                },
            );
        }
        Ok(counters)
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    /// The bound that leaves no room for two events of so many bytes.
    pub(super) fn full(&self, id: &IntegrationId, bytes: u64) -> Option<Quota> {
        let own = self.by_integration.get(id).copied().unwrap_or_default();
        let limits = &self.limits;
        let beyond = |waiting: u64, more: u64, max: u64| waiting.saturating_add(more) > max;
        if beyond(own.events, 2, limits.max_integration_events) {
            Some(Quota::IntegrationEvents)
        } else if beyond(own.bytes, bytes, limits.max_integration_bytes) {
            Some(Quota::IntegrationBytes)
        } else if beyond(self.total.events, 2, limits.max_events) {
            Some(Quota::Events)
        } else if beyond(self.total.bytes, bytes, limits.max_bytes) {
            Some(Quota::Bytes)
        } else {
            None
        }
    }

    /// The lane's number in the database; made where it is new.
    pub(super) fn lane_id(
        &mut self,
        transaction: &Transaction<'_>,
        key: &LaneKey,
    ) -> rusqlite::Result<i64> {
        if let Some(id) = self.lane_ids.get(key) {
            return Ok(*id);
        }
        const SQL: &str = "
            INSERT INTO lane (integration_id, region, shard) VALUES (?1, ?2, ?3)
            ON CONFLICT DO UPDATE SET shard = excluded.shard RETURNING id";
        let values = params![
            key.integration_id.as_str(),
            region_number(key.region),
            key.shard
        ];
        let id = transaction
            .prepare_cached(SQL)?
            .query_row(values, |row| row.get(0))?;
        self.lane_ids.insert(key.clone(), id);
        self.lanes.entry(id).or_insert_with(|| Lane {
            integration_id: key.integration_id.clone(),
            waiting: Waiting::default(),
        });
        Ok(id)
    }

    pub(super) fn add(&mut self, lane: i64, events: u64, bytes: u64) {
        self.change(lane, |waiting| waiting.add(events, bytes));
    }

    pub(super) fn remove(&mut self, lane: i64, events: u64, bytes: u64) {
        self.change(lane, |waiting| waiting.remove(events, bytes));
    }

    fn change(&mut self, id: i64, change: impl Fn(&mut Waiting)) {
        let Some(lane) = self.lanes.get_mut(&id) else {
            return;
        };
        change(&mut lane.waiting);
        change(
            self.by_integration
                .entry(lane.integration_id.clone())
                .or_default(),
        );
        change(&mut self.total);
        self.touched.insert(id);
    }

    /// Writes the counts of the lanes that this transaction touched.
    pub(super) fn store(&mut self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        const SQL: &str = "UPDATE lane SET waiting_events = ?2, waiting_bytes = ?3 WHERE id = ?1";
        let mut statement = transaction.prepare_cached(SQL)?;
        while let Some(id) = self.touched.pop_first() {
            if let Some(lane) = self.lanes.get(&id) {
                statement.execute(params![id, lane.waiting.events, lane.waiting.bytes])?;
            }
        }
        Ok(())
    }
}
