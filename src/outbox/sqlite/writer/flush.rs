//! Puts the newest states of captures into the database.

use std::sync::Arc;

use rusqlite::{CachedStatement, OptionalExtension, Transaction, params};

use super::{Rests, Work};
use crate::{
    event::EventType,
    outbox::{
        OutboxError, record,
        sqlite::{
            entry::{Entry, Origin, Payloads, stored_key},
            row::{crc32, unavailable},
        },
    },
    status::State,
};

/// The rows that each new capture has, which are made once for all of a flush.
struct NewRows<'a> {
    capture: CachedStatement<'a>,
    subject: CachedStatement<'a>,
}

impl<'a> NewRows<'a> {
    fn prepare(transaction: &'a Transaction<'a>) -> rusqlite::Result<Self> {
        const SUBJECT: &str = "INSERT INTO subject (sequence, subject) VALUES (?1, ?2)";
        const CAPTURE: &str = "
            INSERT INTO capture
              (sequence, integration_id, capture_id, digest, accept_millis, open, status)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
        Ok(Self {
            capture: transaction.prepare_cached(CAPTURE)?,
            subject: transaction.prepare_cached(SUBJECT)?,
        })
    }
}

impl Work<'_> {
    /// All of them, and up to which record of the journal that goes.
    pub(super) fn flush(
        &mut self,
        entries: &mut [Arc<Entry>],
        through: u64,
    ) -> Result<(), OutboxError> {
        self.flush_all(entries, through).map_err(unavailable)
    }

    fn flush_all(&mut self, entries: &mut [Arc<Entry>], through: u64) -> rusqlite::Result<()> {
        const APPLIED: &str = "UPDATE journal SET applied = ?1";
        entries.sort_unstable_by_key(|entry| entry.sequence);
        let mut rows = NewRows::prepare(self.transaction)?;
        let mut keys = Vec::with_capacity(entries.len());
        let mut rests = Rests::new(self.shared);
        for entry in entries {
            match entry.origin {
                Origin::New { .. } => {
                    keys.push((stored_key(entry.key), entry.sequence));
                    self.insert(entry, &mut rows)?;
                }
                Origin::Stored => self.update(entry)?,
            }
            rests.row();
        }
        self.ids.add(self.transaction, &keys, &mut rests)?;
        self.transaction
            .prepare_cached(APPLIED)?
            .execute(params![through])?;
        Ok(())
    }

    fn insert(&mut self, entry: &Entry, rows: &mut NewRows<'_>) -> rusqlite::Result<()> {
        let record = &entry.record;
        rows.capture.execute(params![
            entry.sequence,
            record.integration_id.as_str(),
            record.capture_id,
            entry.digest,
            record.accept_time.0,
            is_open(entry),
            record::encode(record),
        ])?;
        let Origin::New { subject, payloads } = &entry.origin else {
            return Ok(());
        };
        if let Some(subject) = subject {
            rows.subject.execute(params![entry.sequence, subject])?;
        }
        let (Some(lane), Some(payloads)) = (&entry.lane, payloads) else {
            return Ok(());
        };
        let lane = self.counters.lane_id(self.transaction, lane)?;
        if entry.waiting != [None, None] {
            self.enqueue(entry, lane, payloads)?;
        }
        for event in EventType::ALL {
            self.insert_dead_letter(entry, lane, event, payloads.get(event))?;
        }
        Ok(())
    }

    fn enqueue(&mut self, entry: &Entry, lane: i64, payloads: &Payloads) -> rusqlite::Result<()> {
        const QUEUE: &str = "
            INSERT INTO queue (sequence, lane, replay, identify, identify_crc, track, track_crc)
            VALUES (?1, ?2, 0, ?3, ?4, ?5, ?6)";
        let [identify, track] = entry.waiting;
        let identify = identify.map(|_| payloads.get(EventType::Identify));
        let track = track.map(|_| payloads.get(EventType::Track));
        self.transaction.prepare_cached(QUEUE)?.execute(params![
            entry.sequence,
            lane,
            identify,
            identify.map(crc32),
            track,
            track.map(crc32)
        ])?;
        for bytes in entry.waiting.into_iter().flatten() {
            self.counters.add(lane, 1, bytes);
        }
        Ok(())
    }

    fn insert_dead_letter(
        &self,
        entry: &Entry,
        lane: i64,
        event: EventType,
        payload: &[u8],
    ) -> rusqlite::Result<()> {
        const SQL: &str = "
            INSERT INTO dead_letter (id, sequence, lane, event, reason, millis, payload, payload_crc)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
        let State::DeadLettered { reason, at } = entry.record.event(event).state else {
            return Ok(());
        };
        self.transaction.prepare_cached(SQL)?.execute(params![
            self.next_dead_letter_id()?,
            entry.sequence,
            lane,
            event.to_proto() as i64,
            reason as i64,
            at.0,
            payload,
            crc32(payload)
        ])?;
        Ok(())
    }

    /// A capture that the database has in an older state.
    fn update(&mut self, entry: &Entry) -> rusqlite::Result<()> {
        const WAITING: &str = "
            SELECT lane, length(identify), length(track) FROM queue WHERE sequence = ?1";
        const STATUS: &str = "UPDATE capture SET status = ?2, open = ?3 WHERE sequence = ?1";
        const DONE: &str = "DELETE FROM queue WHERE sequence = ?1";
        const PARTLY: &str = "
            UPDATE queue SET
              identify = iif(?2, NULL, identify), identify_crc = iif(?2, NULL, identify_crc),
              track = iif(?3, NULL, track), track_crc = iif(?3, NULL, track_crc)
            WHERE sequence = ?1";
        let sequence = entry.sequence;
        let found = self
            .transaction
            .prepare_cached(WAITING)?
            .query_row(params![sequence], |row| {
                Ok((row.get(0)?, [row.get(1)?, row.get::<_, Option<u64>>(2)?]))
            })
            .optional()?;
        let status = params![sequence, record::encode(&entry.record), is_open(entry)];
        self.transaction.prepare_cached(STATUS)?.execute(status)?;
        let Some((lane, stored)) = found else {
            return Ok(());
        };
        let mut ended = [false; 2];
        for (place, event) in EventType::ALL.into_iter().enumerate() {
            if let (Some(bytes), None) = (stored[place], entry.waiting[place]) {
                self.keep_dead_letter(entry, lane, event)?;
                self.counters.remove(lane, 1, bytes);
                ended[place] = true;
            }
        }
        if entry.waiting == [None, None] {
            self.transaction
                .prepare_cached(DONE)?
                .execute(params![sequence])?;
        } else if ended.contains(&true) {
            let row = params![sequence, ended[0], ended[1]];
            self.transaction.prepare_cached(PARTLY)?.execute(row)?;
        }
        Ok(())
    }

    fn keep_dead_letter(&self, entry: &Entry, lane: i64, event: EventType) -> rusqlite::Result<()> {
        const SQL: &str = "
            INSERT INTO dead_letter (id, sequence, lane, event, reason, millis, payload, payload_crc)
            SELECT ?6, ?1, ?2, ?3, ?4, ?5, iif(?3 = 1, identify, track),
                   iif(?3 = 1, identify_crc, track_crc)
            FROM queue WHERE sequence = ?1";
        let State::DeadLettered { reason, at } = entry.record.event(event).state else {
            return Ok(());
        };
        let number = event.to_proto() as i64;
        let id = self.next_dead_letter_id()?;
        let row = params![entry.sequence, lane, number, reason as i64, at.0, id];
        self.transaction.prepare_cached(SQL)?.execute(row)?;
        Ok(())
    }

    /// An id that no dead letter has had: a repeated discard must not find another one.
    fn next_dead_letter_id(&self) -> rusqlite::Result<i64> {
        self.transaction
            .prepare_cached("UPDATE dead_letter_id SET last = last + 1 RETURNING last")?
            .query_row([], |row| row.get(0))
    }
}

/// Whether an event waits, or is kept as a dead letter.
fn is_open(entry: &Entry) -> bool {
    let dead = |event| matches!(entry.record.event(event).state, State::DeadLettered { .. });
    entry.waiting != [None, None] || EventType::ALL.into_iter().any(dead)
}
