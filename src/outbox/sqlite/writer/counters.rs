//! What waits, counted by lane: in memory for quick decisions, in the `lane`
//! table so that it is known at once after a start.

use std::collections::{BTreeSet, HashMap};

use rusqlite::{Connection, Transaction, params};

use crate::{
    integration::IntegrationId,
    outbox::{
        LaneKey, Limits, Quota,
        sqlite::{
            row::{region_number, region_of},
            tally::Tally,
        },
    },
};

#[derive(Debug)]
pub(super) struct Counters {
    limits: Limits,
    tally: Tally,
    lanes: HashMap<i64, LaneKey>,
    lane_ids: HashMap<LaneKey, i64>,
    touched: BTreeSet<i64>,
}

impl Counters {
    pub(super) fn load(connection: &Connection, limits: Limits) -> rusqlite::Result<Self> {
        const SQL: &str = "
            SELECT id, integration_id, region, shard, waiting_events, waiting_bytes FROM lane";
        let mut counters = Self {
            limits,
            tally: Tally::default(),
            lanes: HashMap::new(),
            lane_ids: HashMap::new(),
            touched: BTreeSet::new(),
        };
        let mut statement = connection.prepare(SQL)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let integration_id: String = row.get(1)?;
            // Only valid ids are ever stored.
            let Some(integration_id) = IntegrationId::stored(&integration_id) else {
                continue;
            };
            let key = LaneKey {
                integration_id,
                region: region_of(row.get(2)?),
                shard: row.get(3)?,
            };
            counters.tally.add(&key, row.get(4)?, row.get(5)?);
            let id = row.get(0)?;
            counters.lane_ids.insert(key.clone(), id);
            counters.lanes.insert(id, key);
        }
        Ok(counters)
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    /// What waits in the database.
    pub(super) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// The bound that leaves no room for two more events of `bytes`, if there is one.
    pub(super) fn full(&self, id: &IntegrationId, bytes: u64) -> Option<Quota> {
        self.tally.full(&self.limits, id, bytes)
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
        self.lanes.insert(id, key.clone());
        Ok(id)
    }

    pub(super) fn add(&mut self, lane: i64, events: u64, bytes: u64) {
        if let Some(key) = self.lanes.get(&lane) {
            self.tally.add(key, events, bytes);
            self.touched.insert(lane);
        }
    }

    pub(super) fn remove(&mut self, lane: i64, events: u64, bytes: u64) {
        if let Some(key) = self.lanes.get(&lane) {
            self.tally.remove(key, events, bytes);
            self.touched.insert(lane);
        }
    }

    /// Writes the counts of the lanes that this transaction touched.
    pub(super) fn store(&mut self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        const SQL: &str = "UPDATE lane SET waiting_events = ?2, waiting_bytes = ?3 WHERE id = ?1";
        let mut statement = transaction.prepare_cached(SQL)?;
        while let Some(id) = self.touched.pop_first() {
            if let Some(key) = self.lanes.get(&id) {
                let waiting = self.tally.lane(key);
                statement.execute(params![id, waiting.events, waiting.bytes])?;
            }
        }
        Ok(())
    }
}
