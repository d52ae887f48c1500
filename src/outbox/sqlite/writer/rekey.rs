//! Seals payloads anew after the key was changed, or encryption was turned on: piece
//! by piece, beside the traffic.

use rusqlite::{params, types::ValueRef};

use super::Work;
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{
        OutboxError,
        sealing::payload_place,
        sqlite::{
            keys,
            row::{crc32, unavailable},
        },
    },
    vault::sealed_under,
};

/// Rows that one call looks at.
const ROWS: i64 = 1_000;

/// How far it has come: in the queue, then among the dead letters.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rekey {
    Queue { after: i64 },
    DeadLetters { after: i64 },
    Done,
}

/// A payload to seal anew.
struct Row {
    id: i64,
    lane: i64,
    integration: String,
    capture_id: String,
    event: EventType,
    payload: Vec<u8>,
}

impl Work<'_> {
    /// Does the next piece; returns whether there is more to do.
    pub(super) fn rekey(&mut self) -> Result<bool, OutboxError> {
        const QUEUE: &str = "
            SELECT q.sequence, q.lane, c.integration_id, c.capture_id, q.identify, q.track
            FROM queue q CROSS JOIN capture c
            WHERE q.sequence > ?1 AND c.sequence = q.sequence ORDER BY q.sequence LIMIT ?2";
        const DEAD: &str = "
            SELECT d.id, d.lane, c.integration_id, c.capture_id,
                   iif(d.event = 1, d.payload, NULL), iif(d.event = 2, d.payload, NULL)
            FROM dead_letter d CROSS JOIN capture c
            WHERE d.id > ?1 AND c.sequence = d.sequence ORDER BY d.id LIMIT ?2";
        let (sql, after) = match *self.rekey {
            Rekey::Queue { after } => (QUEUE, after),
            Rekey::DeadLetters { after } => (DEAD, after),
            Rekey::Done => return Ok(false),
        };
        let (last, rows) = self.stale(sql, after).map_err(unavailable)?;
        let in_queue = matches!(*self.rekey, Rekey::Queue { .. });
        for row in rows {
            self.reseal(in_queue, &row)?;
        }
        *self.rekey = match (last, in_queue) {
            (Some(after), true) => Rekey::Queue { after },
            (Some(after), false) => Rekey::DeadLetters { after },
            (None, true) => Rekey::DeadLetters { after: 0 },
            (None, false) => {
                keys::finish(self.transaction, self.sealing).map_err(unavailable)?;
                Rekey::Done
            }
        };
        Ok(!matches!(*self.rekey, Rekey::Done))
    }

    /// The last row of the piece, and the payloads in it that are not as they should
    /// be.
    fn stale(&self, sql: &str, after: i64) -> rusqlite::Result<(Option<i64>, Vec<Row>)> {
        let current = self.sealing.vault.current();
        let mut statement = self.transaction.prepare_cached(sql)?;
        let mut rows = statement.query(params![after, ROWS])?;
        let (mut last, mut stale) = (None, Vec::new());
        while let Some(row) = rows.next()? {
            last = Some(row.get(0)?);
            for (column, event) in [(4, EventType::Identify), (5, EventType::Track)] {
                let ValueRef::Blob(payload) = row.get_ref(column)? else {
                    continue;
                };
                let fits = match sealed_under(payload) {
                    Some(key) => key == current,
                    None => !self.sealing.payloads,
                };
                if !fits {
                    stale.push(Row {
                        id: row.get(0)?,
                        lane: row.get(1)?,
                        integration: row.get(2)?,
                        capture_id: row.get(3)?,
                        event,
                        payload: payload.to_vec(),
                    });
                }
            }
        }
        Ok((last, stale))
    }

    fn reseal(&mut self, in_queue: bool, row: &Row) -> Result<(), OutboxError> {
        let failed = |error: String| OutboxError::Unavailable(error);
        // Only valid ids are ever stored.
        let Some(id) = IntegrationId::stored(&row.integration) else {
            return Ok(());
        };
        let place = payload_place(&id, &row.capture_id, row.event);
        let vault = &self.sealing.vault;
        let plain = match sealed_under(&row.payload) {
            None => row.payload.clone(),
            Some(_) => match vault.unseal(&place, &row.payload) {
                Ok(plain) => plain,
                // Its lane will find it damaged and set it aside.
                Err(_) => return Ok(()),
            },
        };
        let sealed = vault
            .seal(&place, &plain)
            .map_err(|error| failed(error.to_string()))?;
        let sql = match (in_queue, row.event) {
            (true, EventType::Identify) => {
                "UPDATE queue SET identify = ?2, identify_crc = ?3 WHERE sequence = ?1"
            }
            (true, EventType::Track) => {
                "UPDATE queue SET track = ?2, track_crc = ?3 WHERE sequence = ?1"
            }
            (false, _) => "UPDATE dead_letter SET payload = ?2, payload_crc = ?3 WHERE id = ?1",
        };
        self.transaction
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(params![row.id, sealed, crc32(&sealed)]))
            .map_err(unavailable)?;
        if in_queue {
            self.counters.remove(row.lane, 0, row.payload.len() as u64);
            self.counters.add(row.lane, 0, sealed.len() as u64);
        }
        Ok(())
    }
}
