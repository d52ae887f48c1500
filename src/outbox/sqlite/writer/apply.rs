//! What each command does within a transaction.

use std::sync::Arc;

use rusqlite::params;

use super::Work;
use crate::{
    event::EventType,
    integration::IntegrationId,
    notice::Notice,
    outbox::{
        Change,
        sqlite::entry::{key_of, stored_key},
    },
    status::CaptureRecord,
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
        // The row stays: what is kept under the id belongs to no later one of its name.
        let mut statement = self
            .transaction
            .prepare_cached("UPDATE integration SET spec = x'' WHERE id = ?1")?;
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
            SELECT sequence, open, accept_millis, integration_id, capture_id FROM capture
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
                let id: String = row.get(3)?;
                if let Some(id) = IntegrationId::stored(&id) {
                    let key = key_of(&id, &row.get::<_, String>(4)?);
                    self.ids
                        .remove(self.transaction, (stored_key(key), reached))?;
                }
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
