//! What the database knows of a capture, for those who accept and settle.

use std::{path::Path, sync::Arc};

use rusqlite::{Connection, OptionalExtension, params};

use super::{
    entry::{Entry, Key, Origin, key_of, stored_key},
    row::{record_of, unavailable},
    schema,
};
use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError, SettledCapture},
    status::CaptureRecord,
};

/// Memory for pages, in KiB: what is looked up lies anywhere.
const CACHE_KIB: i64 = 2 * 1024;

/// Finds captures through a connection of its own. All look-ups between two calls of
/// [`Self::refresh`] share one snapshot, which is cheaper than one for each.
pub(super) struct Lookup {
    connection: Connection,
    in_snapshot: bool,
}

/// A capture by its id: place, digest, status.
pub(super) const FIND_SQL: &str = "
    SELECT c.sequence, c.digest, c.status
    FROM (SELECT sequence FROM capture_key WHERE key = ?1
          UNION ALL SELECT sequence FROM recent_key WHERE key = ?1) k CROSS JOIN capture c
    WHERE c.sequence = k.sequence AND c.integration_id = ?2 AND c.capture_id = ?3";

impl Lookup {
    pub(super) fn open(database: &Path) -> rusqlite::Result<Self> {
        Ok(Self {
            connection: schema::open_for_reading(database, CACHE_KIB)?,
            in_snapshot: false,
        })
    }

    /// From now on sees all commits before this call.
    pub(super) fn refresh(&mut self) {
        if std::mem::take(&mut self.in_snapshot)
            && let Err(error) = self.connection.execute_batch("COMMIT")
        {
            tracing::error!(%error, "the outbox cannot be read");
        }
    }

    fn snapshot(&mut self) -> rusqlite::Result<&Connection> {
        if !self.in_snapshot {
            self.connection
                .prepare_cached("BEGIN")
                .and_then(|mut begin| begin.execute([]))?;
            self.in_snapshot = true;
        }
        Ok(&self.connection)
    }

    /// How many captures the database has at the most.
    pub(super) fn ids(&mut self) -> u64 {
        const SQL: &str = "
            SELECT coalesce((SELECT max(sequence) FROM capture), 0)
                - coalesce((SELECT min(sequence) FROM capture), 1) + 1";
        let read = |connection: &Connection| {
            let mut statement = connection.prepare_cached(SQL)?;
            statement.query_row([], |row| row.get(0))
        };
        self.snapshot().and_then(read).unwrap_or_else(|error| {
            tracing::warn!(%error, "the outbox cannot be read");
            0
        })
    }

    /// Digest and record of a capture by its id.
    pub(super) fn find(
        &mut self,
        key: Key,
        id: &IntegrationId,
        capture_id: &str,
    ) -> Result<Option<([u8; 16], CaptureRecord)>, OutboxError> {
        let connection = self.snapshot().map_err(unavailable)?;
        let found = connection
            .prepare_cached(FIND_SQL)
            .and_then(|mut statement| {
                let row = statement
                    .query_row(params![stored_key(key), id.as_str(), capture_id], |row| {
                        Ok((row.get::<_, [u8; 16]>(1)?, row.get::<_, Vec<u8>>(2)?))
                    });
                row.optional()
            })
            .map_err(unavailable)?;
        found
            .map(|(digest, status)| {
                let record = record_of(id.clone(), capture_id.to_owned(), &status)?;
                Ok((digest, record))
            })
            .transpose()
    }

    /// A capture of a lane that waits in the database. A record that is damaged is
    /// replaced by the one that the lane made of it. `since` is the number of the
    /// record that settles it.
    pub(super) fn waiting(
        &mut self,
        lane: &LaneKey,
        settled: &SettledCapture,
        since: u64,
    ) -> Result<Option<Entry>, OutboxError> {
        const SQL: &str = "
            SELECT length(q.identify), length(q.track), c.capture_id, c.digest, c.status
            FROM queue q CROSS JOIN capture c WHERE q.sequence = ?1 AND c.sequence = q.sequence";
        let connection = self.snapshot().map_err(unavailable)?;
        let found = connection
            .prepare_cached(SQL)
            .and_then(|mut statement| {
                let row = statement.query_row(params![settled.sequence], |row| {
                    Ok((
                        [row.get(0)?, row.get(1)?],
                        row.get::<_, String>(2)?,
                        row.get(3)?,
                        row.get::<_, Vec<u8>>(4)?,
                    ))
                });
                row.optional()
            })
            .map_err(unavailable)?;
        Ok(found.map(|(waiting, capture_id, digest, status)| Entry {
            sequence: settled.sequence,
            key: key_of(&lane.integration_id, &capture_id),
            record: record_of(lane.integration_id.clone(), capture_id, &status)
                .map_or_else(|_| Arc::clone(&settled.record), Arc::new),
            digest,
            lane: Some(lane.clone()),
            waiting,
            origin: Origin::Stored,
            since,
        }))
    }
}
