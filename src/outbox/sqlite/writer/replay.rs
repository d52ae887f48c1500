//! Dead letters go back into the queue, or away.

use rusqlite::{OptionalExtension, params};

use super::Work;
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{
        LaneKey, OutboxError, Quota, Selection, Taken, record,
        sqlite::{
            row::{record_of, region_of, unavailable},
            selection::{event_of, is_selected},
        },
    },
    status::CaptureRecord,
    time::UnixMillis,
};

/// Dead letters that one transaction takes at the most.
pub(in crate::outbox::sqlite) const CHUNK: usize = 500;

/// A dead letter's row, with the lane and the capture that it belongs to.
struct Row {
    sequence: i64,
    lane_id: i64,
    lane: LaneKey,
    event: EventType,
    bytes: u64,
    record: CaptureRecord,
}

impl Work<'_> {
    /// Queues those of these dead letters again that are there and selected; returns how many, or
    /// the bound that left no room for the next one.
    pub(super) fn replay(
        &mut self,
        ids: &[i64],
        selection: &Selection,
        now: UnixMillis,
    ) -> Result<Result<Taken, Quota>, OutboxError> {
        let mut taken = Taken::default();
        for id in ids.iter().copied() {
            if !is_selected(self.transaction, selection, id, true)? {
                continue;
            }
            let Some(mut row) = self.dead_letter(id)? else {
                continue;
            };
            let quota = self.counters.full(&row.lane.integration_id, row.bytes);
            if let Some(quota) = quota {
                return Ok(match taken.events() {
                    0 => Err(quota),
                    _ => Ok(taken),
                });
            }
            row.record.event_mut(row.event).replay();
            row.record.queue_time = now;
            self.requeue(id, &row).map_err(unavailable)?;
            self.counters.add(row.lane_id, 1, row.bytes);
            self.announce(&row.record, &[row.event], now);
            taken.add(&row.lane.integration_id, 1);
            self.news.lanes.push(row.lane);
        }
        Ok(Ok(taken))
    }

    fn requeue(&self, id: i64, row: &Row) -> rusqlite::Result<()> {
        // Where the capture's other event waits, both go together again.
        const QUEUE: &str = "
            INSERT INTO queue (sequence, lane, replay, identify, identify_crc, track, track_crc)
            SELECT sequence, lane, 1,
              iif(event = 1, payload, NULL), iif(event = 1, payload_crc, NULL),
              iif(event = 2, payload, NULL), iif(event = 2, payload_crc, NULL)
            FROM dead_letter WHERE id = ?1
            ON CONFLICT (sequence) DO UPDATE SET
              identify = coalesce(excluded.identify, identify),
              identify_crc = coalesce(excluded.identify_crc, identify_crc),
              track = coalesce(excluded.track, track),
              track_crc = coalesce(excluded.track_crc, track_crc)";
        const GONE: &str = "DELETE FROM dead_letter WHERE id = ?1";
        const STATUS: &str = "UPDATE capture SET status = ?2, open = 1 WHERE sequence = ?1";
        self.transaction
            .prepare_cached(QUEUE)?
            .execute(params![id])?;
        self.transaction
            .prepare_cached(GONE)?
            .execute(params![id])?;
        let status = params![row.sequence, record::encode(&row.record)];
        self.transaction.prepare_cached(STATUS)?.execute(status)?;
        Ok(())
    }

    /// Removes those of these dead letters that are there and selected; returns how many of whom.
    pub(super) fn discard(
        &mut self,
        ids: &[i64],
        selection: &Selection,
    ) -> Result<Taken, OutboxError> {
        let mut taken = Taken::default();
        for id in ids.iter().copied() {
            if !is_selected(self.transaction, selection, id, false)? {
                continue;
            }
            let integration = self.remove(id).map_err(unavailable)?;
            let integration = IntegrationId::stored(&integration)
                .ok_or_else(|| OutboxError::Unavailable("a damaged lane".to_owned()))?;
            taken.add(&integration, 1);
        }
        Ok(taken)
    }

    /// Removes a dead letter; returns whose it was.
    fn remove(&self, id: i64) -> rusqlite::Result<String> {
        const GONE: &str = "DELETE FROM dead_letter WHERE id = ?1 RETURNING sequence, lane";
        const LEFT: &str = "
            SELECT EXISTS (SELECT 1 FROM dead_letter WHERE sequence = ?1)
                OR EXISTS (SELECT 1 FROM queue WHERE sequence = ?1)";
        const CLOSE: &str = "UPDATE capture SET open = ?2 WHERE sequence = ?1";
        const LANE: &str = "SELECT integration_id FROM lane WHERE id = ?1";
        let (sequence, lane): (i64, i64) = self
            .transaction
            .prepare_cached(GONE)?
            .query_row(params![id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let mut left = self.transaction.prepare_cached(LEFT)?;
        let open: bool = left.query_row(params![sequence], |row| row.get(0))?;
        self.transaction
            .prepare_cached(CLOSE)?
            .execute(params![sequence, open])?;
        self.transaction
            .prepare_cached(LANE)?
            .query_row(params![lane], |row| row.get(0))
    }

    fn dead_letter(&self, id: i64) -> Result<Option<Row>, OutboxError> {
        const SQL: &str = "
            SELECT d.sequence, d.lane, d.event, length(d.payload),
                   l.integration_id, l.region, l.shard, c.capture_id, c.status
            FROM dead_letter d JOIN lane l ON l.id = d.lane JOIN capture c ON c.sequence = d.sequence
            WHERE d.id = ?1";
        let mut statement = self.transaction.prepare_cached(SQL).map_err(unavailable)?;
        let found = statement
            .query_row(params![id], |row| {
                Ok((
                    (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?),
                    (row.get::<_, String>(4)?, row.get::<_, i64>(5)?, row.get(6)?),
                    (row.get(7)?, row.get::<_, Vec<u8>>(8)?),
                ))
            })
            .optional()
            .map_err(unavailable)?;
        let Some((row, (integration, region, shard), (capture_id, status))) = found else {
            return Ok(None);
        };
        let integration_id = IntegrationId::stored(&integration)
            .ok_or_else(|| OutboxError::Unavailable("a damaged lane".to_owned()))?;
        let region = region_of(region);
        let (sequence, lane_id, event, bytes) = row;
        Ok(Some(Row {
            sequence,
            lane_id,
            event: event_of(event),
            bytes,
            record: record_of(integration_id.clone(), capture_id, &status)?,
            lane: LaneKey {
                integration_id,
                region,
                shard,
            },
        }))
    }
}
