//! What each command does within a transaction.

use std::sync::Arc;

use rusqlite::{OptionalExtension, params};

use super::Work;
use crate::{
    event::EventType,
    integration::IntegrationId,
    notice::Notice,
    outbox::{
        Change, Content, LaneKey, NewCapture, OutboxError, SettledCapture, Settlement, Submitted,
        record,
        sealing::SealedCapture,
        sqlite::row::{crc32, record_of, unavailable},
    },
    status::{CaptureRecord, EventStatus, State},
    time::UnixMillis,
};

/// Notices that wait, at the most.
const MAX_NOTICES: i64 = 1_000;
/// Rows that one call of maintenance deletes at the most.
const MAINTAIN_ROWS: i64 = 2_000;
/// Free pages that are kept for what comes next: 32 MiB, or this part of the file.
const KEPT_PAGES: i64 = 4_096;
const KEPT_SHARE: i64 = 4;
/// Pages that one call of maintenance gives back at the most.
const MAINTAIN_PAGES: i64 = 2_000;

impl Work<'_> {
    pub(super) fn submit(&mut self, sealed: SealedCapture) -> Result<Submitted, OutboxError> {
        let SealedCapture { capture, subject } = sealed;
        if let Some((digest, record)) = self.stored(&capture)? {
            let same = digest == capture.digest;
            return Ok(if same {
                Submitted::Duplicate(record)
            } else {
                Submitted::Conflict
            });
        }
        if let Content::Send { events, .. } = &capture.content {
            let bytes = events.identify.len() + events.track.len();
            if let Some(quota) = self.counters.full(&capture.integration_id, bytes as u64) {
                return Ok(Submitted::Full(quota));
            }
        }
        self.insert(capture, subject).map_err(unavailable)
    }

    fn stored(
        &self,
        capture: &NewCapture,
    ) -> Result<Option<([u8; 16], CaptureRecord)>, OutboxError> {
        const SQL: &str = "
            SELECT digest, status FROM capture WHERE integration_id = ?1 AND capture_id = ?2";
        let key = params![capture.integration_id.as_str(), capture.capture_id];
        let found = self
            .transaction
            .prepare_cached(SQL)
            .and_then(|mut statement| {
                statement
                    .query_row(key, |row| {
                        Ok((row.get::<_, [u8; 16]>(0)?, row.get::<_, Vec<u8>>(1)?))
                    })
                    .optional()
            })
            .map_err(unavailable)?;
        found
            .map(|(digest, status)| {
                let (id, capture_id) = (capture.integration_id.clone(), capture.capture_id.clone());
                Ok((digest, record_of(id, capture_id, &status)?))
            })
            .transpose()
    }

    fn insert(&mut self, capture: NewCapture, subject: Option<i64>) -> rusqlite::Result<Submitted> {
        const SUBJECT: &str = "INSERT INTO subject (sequence, subject) VALUES (?1, ?2)";
        const CAPTURE: &str = "
            INSERT INTO capture
              (sequence, integration_id, capture_id, digest, accept_millis, open, status)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
        const QUEUE: &str = "
            INSERT INTO queue (sequence, lane, replay, identify, identify_crc, track, track_crc)
            VALUES (?1, ?2, 0, ?3, ?4, ?5, ?6)";
        let state = match &capture.content {
            Content::Send { .. } => State::Queued,
            Content::Skip { reason } => State::Skipped { reason: *reason },
        };
        let record = CaptureRecord {
            integration_id: capture.integration_id,
            capture_id: capture.capture_id,
            region: capture.region,
            mapping_version: capture.mapping_version,
            accept_time: capture.accept_time,
            queue_time: capture.accept_time,
            identify: EventStatus::new(state),
            track: EventStatus::new(state),
            attempts: Vec::new(),
            trace: capture.trace,
        };
        let sequence = *self.next_sequence;
        *self.next_sequence += 1;
        self.transaction.prepare_cached(CAPTURE)?.execute(params![
            sequence,
            record.integration_id.as_str(),
            record.capture_id,
            capture.digest,
            record.accept_time.0,
            !state.is_final(),
            record::encode(&record),
        ])?;
        if let Some(subject) = subject {
            let row = params![sequence, subject];
            self.transaction.prepare_cached(SUBJECT)?.execute(row)?;
        }
        if let Content::Send { shard, events } = capture.content {
            let key = LaneKey {
                integration_id: record.integration_id.clone(),
                region: record.region,
                shard,
            };
            let lane = self.counters.lane_id(self.transaction, &key)?;
            let crcs = [crc32(&events.identify), crc32(&events.track)];
            let row = params![
                sequence,
                lane,
                events.identify,
                crcs[0],
                events.track,
                crcs[1]
            ];
            self.transaction.prepare_cached(QUEUE)?.execute(row)?;
            let bytes = events.identify.len() + events.track.len();
            self.counters.add(lane, 2, bytes as u64);
            self.news.lanes.push(key);
        }
        self.announce(&record, &EventType::ALL, record.accept_time);
        Ok(Submitted::Accepted(record))
    }

    pub(super) fn settle(&mut self, settlement: &Settlement) -> Result<(), OutboxError> {
        let now = UnixMillis::now();
        for settled in &settlement.captures {
            let Some(record) = self.settle_capture(settled)? else {
                continue;
            };
            self.announce(&record, &settled.changed, now);
            if record.is_final() {
                self.news
                    .settled
                    .push((record.integration_id, record.capture_id));
            }
        }
        Ok(())
    }

    /// The capture's record from now on; `None` where it no longer waits.
    fn settle_capture(
        &mut self,
        settled: &SettledCapture,
    ) -> Result<Option<CaptureRecord>, OutboxError> {
        const WAITING: &str = "
            SELECT q.lane, length(q.identify), length(q.track), c.status
            FROM queue q JOIN capture c ON c.sequence = q.sequence WHERE q.sequence = ?1";
        let found = self
            .transaction
            .prepare_cached(WAITING)
            .and_then(|mut statement| {
                let row = statement.query_row(params![settled.sequence], |row| {
                    Ok((
                        row.get(0)?,
                        [row.get(1)?, row.get(2)?],
                        row.get::<_, Vec<u8>>(3)?,
                    ))
                });
                row.optional()
            })
            .map_err(unavailable)?;
        let Some((lane, sizes, status)) = found else {
            return Ok(None);
        };
        // Merged with what is stored: the capture's other event may have been
        // replayed while this attempt was under way.
        let (id, capture_id) = (&settled.record.integration_id, &settled.record.capture_id);
        // A damaged record is replaced by what the lane made of it.
        let mut record = record_of(id.clone(), capture_id.clone(), &status)
            .unwrap_or_else(|_| settled.record.clone());
        record.attempts.clone_from(&settled.record.attempts);
        for event in &settled.changed {
            *record.event_mut(*event) = settled.record.event(*event).clone();
        }
        self.store_settled(settled, lane, sizes, &record)
            .map_err(unavailable)?;
        Ok(Some(record))
    }

    fn store_settled(
        &mut self,
        settled: &SettledCapture,
        lane: i64,
        sizes: [Option<u64>; 2],
        record: &CaptureRecord,
    ) -> rusqlite::Result<()> {
        const STATUS: &str = "UPDATE capture SET status = ?2, open = ?3 WHERE sequence = ?1";
        const DONE: &str = "DELETE FROM queue WHERE sequence = ?1";
        const PARTLY: &str = "
            UPDATE queue SET
              identify = iif(?2, NULL, identify), identify_crc = iif(?2, NULL, identify_crc),
              track = iif(?3, NULL, track), track_crc = iif(?3, NULL, track_crc)
            WHERE sequence = ?1";
        let sequence = settled.sequence;
        let mut left = false;
        let mut ended = [false; 2];
        for ((event, size), ended) in EventType::ALL.into_iter().zip(sizes).zip(&mut ended) {
            let Some(bytes) = size else { continue };
            let state = record.event(event).state;
            if state.is_final() && settled.changed.contains(&event) {
                self.keep_dead_letter(sequence, lane, event, state)?;
                self.counters.remove(lane, 1, bytes);
                *ended = true;
            } else {
                left = true;
            }
        }
        let dead = |event| matches!(record.event(event).state, State::DeadLettered { .. });
        let open = left || EventType::ALL.into_iter().any(dead);
        let status = params![sequence, record::encode(record), open];
        self.transaction.prepare_cached(STATUS)?.execute(status)?;
        if !left {
            self.transaction
                .prepare_cached(DONE)?
                .execute(params![sequence])?;
        } else if ended.contains(&true) {
            let [identify, track] = ended;
            let row = params![sequence, identify, track];
            self.transaction.prepare_cached(PARTLY)?.execute(row)?;
        }
        Ok(())
    }

    fn keep_dead_letter(
        &self,
        sequence: i64,
        lane: i64,
        event: EventType,
        state: State,
    ) -> rusqlite::Result<()> {
        const SQL: &str = "
            INSERT INTO dead_letter (sequence, lane, event, reason, millis, payload, payload_crc)
            SELECT ?1, ?2, ?3, ?4, ?5, iif(?3 = 1, identify, track),
                   iif(?3 = 1, identify_crc, track_crc)
            FROM queue WHERE sequence = ?1";
        let State::DeadLettered { reason, at } = state else {
            return Ok(());
        };
        let number = event.to_proto() as i64;
        let row = params![sequence, lane, number, reason as i64, at.0];
        self.transaction.prepare_cached(SQL)?.execute(row)?;
        Ok(())
    }

    pub(super) fn announce(
        &mut self,
        record: &CaptureRecord,
        events: &[EventType],
        time: UnixMillis,
    ) {
        if !self.signals.is_watched() {
            return;
        }
        let record = Arc::new(record.clone());
        self.news.changes.extend(events.iter().map(|event| Change {
            record: Arc::clone(&record),
            event: *event,
            time,
        }));
    }

    pub(super) fn put_integration(&self, id: &str, sealed: &[u8]) -> rusqlite::Result<()> {
        const SQL: &str = "
            INSERT INTO integration (id, spec) VALUES (?1, ?2)
            ON CONFLICT (id) DO UPDATE SET spec = excluded.spec";
        self.transaction
            .prepare_cached(SQL)?
            .execute(params![id, sealed])?;
        Ok(())
    }

    pub(super) fn delete_integration(&self, id: &IntegrationId) -> rusqlite::Result<()> {
        let mut statement = self
            .transaction
            .prepare_cached("DELETE FROM integration WHERE id = ?1")?;
        statement.execute(params![id.as_str()])?;
        Ok(())
    }

    pub(super) fn put_notice(&self, notice: &Notice) -> rusqlite::Result<()> {
        const SQL: &str = "INSERT INTO notice (name, millis, body) VALUES (?1, ?2, ?3)";
        const BOUND: &str = "
            DELETE FROM notice WHERE id <= (SELECT max(id) FROM notice) - ?1";
        let row = params![notice.id, notice.time.0, notice.body];
        self.transaction.prepare_cached(SQL)?.execute(row)?;
        let gone = self
            .transaction
            .prepare_cached(BOUND)?
            .execute(params![MAX_NOTICES])?;
        if gone > 0 {
            tracing::error!(gone, "too many notifications wait; the oldest are given up");
        }
        Ok(())
    }

    pub(super) fn delete_notice(&self, id: &str) -> rusqlite::Result<()> {
        self.transaction
            .prepare_cached("DELETE FROM notice WHERE name = ?1")?
            .execute(params![id])?;
        Ok(())
    }

    /// Forgets what is old enough, oldest first, and gives free pages back. Goes
    /// on where the last call ended, so that old captures that are still open
    /// don't stand in the way of those behind them.
    pub(super) fn maintain(&mut self, now: UnixMillis) -> rusqlite::Result<bool> {
        const OLDEST: &str = "
            SELECT sequence, open, accept_millis FROM capture
            WHERE sequence > ?1 ORDER BY sequence LIMIT ?2";
        if !self.signals.is_writable() {
            const PROBE: &str = "
                INSERT INTO probe (id, millis) VALUES (1, ?1)
                ON CONFLICT (id) DO UPDATE SET millis = excluded.millis";
            self.transaction
                .prepare_cached(PROBE)?
                .execute(params![now.0])?;
        }
        let before = now.0.saturating_sub(self.remember_millis);
        let mut forget = self
            .transaction
            .prepare_cached("DELETE FROM capture WHERE sequence = ?1")?;
        let mut forget_subject = self
            .transaction
            .prepare_cached("DELETE FROM subject WHERE sequence = ?1")?;
        let mut oldest = self.transaction.prepare_cached(OLDEST)?;
        let mut rows = oldest.query(params![*self.maintained_to, MAINTAIN_ROWS])?;
        let mut reached = 0;
        while let Some(row) = rows.next()? {
            if row.get::<_, i64>(2)? >= before {
                reached = 0;
                break;
            }
            reached = row.get(0)?;
            if !row.get::<_, bool>(1)? {
                forget.execute(params![reached])?;
                forget_subject.execute(params![reached])?;
            }
        }
        *self.maintained_to = reached;
        let more_to_forget = reached > 0;
        Ok(self.give_pages_back()? || more_to_forget)
    }

    /// Gives free pages back to the disk where they are many: after a backlog. What
    /// comes and goes all the time uses them again, and moving pages costs.
    /// Returns whether there are more.
    fn give_pages_back(&self) -> rusqlite::Result<bool> {
        let number = |pragma: &str| -> rusqlite::Result<i64> {
            self.transaction.query_row(pragma, [], |row| row.get(0))
        };
        let free = number("PRAGMA freelist_count")?;
        let kept = KEPT_PAGES.max(number("PRAGMA page_count")? / KEPT_SHARE);
        let spare = free - kept;
        if spare <= 0 {
            return Ok(false);
        }
        // One step of this pragma frees one page.
        let vacuum = format!("PRAGMA incremental_vacuum({})", spare.min(MAINTAIN_PAGES));
        let mut vacuum = self.transaction.prepare(&vacuum)?;
        let mut steps = vacuum.query([])?;
        while steps.next()?.is_some() {}
        Ok(spare > MAINTAIN_PAGES)
    }
}
