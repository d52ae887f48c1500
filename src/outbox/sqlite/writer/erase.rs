//! Removes a person's data: what waits, dead letters, history. The capture's id stays,
//! so that a repetition by its caller does not bring the data back.

use rusqlite::{OptionalExtension, params};

use super::Work;
use crate::{
    integration::IntegrationId,
    outbox::{
        Erasure, OutboxError, record,
        sqlite::row::{record_of, unavailable},
    },
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
};

impl Work<'_> {
    /// Erases a piece, and stores the receipt with what it counted.
    pub(super) fn erase(&mut self, erasure: &Erasure) -> Result<ErasureReceipt, OutboxError> {
        let subjects: Vec<i64> = erasure
            .subject
            .user_ids
            .iter()
            .map(|id| self.sealing.subject(id))
            .collect();
        let mut receipt = erasure.receipt.clone();
        for sequence in &erasure.captures {
            self.erase_capture(*sequence, &subjects, erasure, &mut receipt)?;
        }
        self.store_receipt(&mut receipt)?;
        Ok(receipt)
    }

    fn erase_capture(
        &mut self,
        sequence: i64,
        subjects: &[i64],
        erasure: &Erasure,
        receipt: &mut ErasureReceipt,
    ) -> Result<(), OutboxError> {
        const CAPTURE: &str = "
            SELECT s.subject, c.integration_id, c.capture_id, c.status
            FROM subject s JOIN capture c ON c.sequence = s.sequence WHERE s.sequence = ?1";
        let found = self
            .transaction
            .prepare_cached(CAPTURE)
            .and_then(|mut statement| {
                let row = statement.query_row(params![sequence], |row| {
                    Ok((
                        row.get::<_, i64>(0)?,
                        row.get::<_, String>(1)?,
                        row.get::<_, String>(2)?,
                        row.get::<_, Vec<u8>>(3)?,
                    ))
                });
                row.optional()
            })
            .map_err(unavailable)?;
        let Some((subject, integration, capture_id, status)) = found else {
            return Ok(());
        };
        let Some(id) = IntegrationId::stored(&integration).filter(|id| {
            let only = erasure.subject.integration_id.as_ref();
            subjects.contains(&subject) && only.is_none_or(|only| only.name() == id.name())
        }) else {
            return Ok(());
        };
        let mut record = record_of(id, capture_id, &status)?;
        receipt.attempt_count += record.attempts.len() as u64;
        let waited = self.remove_waiting(sequence).map_err(unavailable)?;
        receipt.waiting_event_count += waited;
        const DEAD: &str = "DELETE FROM dead_letter WHERE sequence = ?1";
        let dead = self.execute(DEAD, sequence).map_err(unavailable)?;
        receipt.dead_letter_count += dead;
        receipt.payload_count += waited + dead;
        let changed = record.forget_history();
        self.store_erased(sequence, &record).map_err(unavailable)?;
        self.announce(&record, &changed, UnixMillis::now());
        self.news
            .settled
            .push((record.integration_id, record.capture_id));
        Ok(())
    }

    /// Takes a capture out of the queue; returns how many of its events waited.
    fn remove_waiting(&mut self, sequence: i64) -> rusqlite::Result<u64> {
        const GONE: &str = "
            DELETE FROM queue WHERE sequence = ?1
            RETURNING lane, length(identify), length(track)";
        let gone = self
            .transaction
            .prepare_cached(GONE)?
            .query_row(params![sequence], |row| {
                let sizes: [Option<u64>; 2] = [row.get(1)?, row.get(2)?];
                Ok((row.get(0)?, sizes))
            })
            .optional()?;
        let Some((lane, sizes)) = gone else {
            return Ok(0);
        };
        for bytes in sizes.into_iter().flatten() {
            self.counters.remove(lane, 1, bytes);
        }
        Ok(sizes.into_iter().flatten().count() as u64)
    }

    fn store_erased(&self, sequence: i64, record: &CaptureRecord) -> rusqlite::Result<()> {
        const STATUS: &str = "UPDATE capture SET status = ?2, open = 0 WHERE sequence = ?1";
        let status = params![sequence, record::encode(record)];
        self.transaction.prepare_cached(STATUS)?.execute(status)?;
        self.execute("DELETE FROM subject WHERE sequence = ?1", sequence)?;
        Ok(())
    }

    fn execute(&self, sql: &str, sequence: i64) -> rusqlite::Result<u64> {
        let rows = self
            .transaction
            .prepare_cached(sql)?
            .execute(params![sequence])?;
        Ok(rows as u64)
    }

    fn store_receipt(&self, receipt: &mut ErasureReceipt) -> Result<(), OutboxError> {
        if receipt.receipt_id.is_empty() {
            // An empty one first: its number is part of what is sealed.
            self.transaction
                .execute("INSERT INTO erasure (receipt) VALUES (x'')", [])
                .map_err(unavailable)?;
            receipt.receipt_id = self.transaction.last_insert_rowid().to_string();
        }
        let sealed = self.sealing.receipt(receipt)?;
        self.transaction
            .prepare_cached("UPDATE erasure SET receipt = ?2 WHERE id = CAST(?1 AS INTEGER)")
            .and_then(|mut statement| statement.execute(params![receipt.receipt_id, sealed]))
            .map_err(unavailable)?;
        Ok(())
    }
}
