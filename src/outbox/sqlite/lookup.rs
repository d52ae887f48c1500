//! What the database knows of a capture, for those who accept and settle.

use std::{path::Path, sync::Arc};

use rusqlite::{Connection, OptionalExtension, params};

use super::{
    entry::{Entry, Key, Origin, key_of, stored_key},
    recent::Recent,
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
    recent: Arc<Recent>,
    in_snapshot: bool,
    /// How often keys had left memory before the snapshot.
    departures: u64,
}

/// Digest and status of a capture by its id. Of several captures the newest counts: those
/// before it were skipped, and it took their place. `recent` are the captures that may be meant
/// according to memory.
pub(super) fn find(
    connection: &Connection,
    recent: &[i64],
    key: Key,
    id: &IntegrationId,
    capture_id: &str,
) -> rusqlite::Result<Option<([u8; 16], Vec<u8>)>> {
    const RECENT: &str = "
        SELECT digest, status FROM capture
        WHERE sequence = ?1 AND integration_id = ?2 AND capture_id = ?3";
    const INDEXED: &str = "
        SELECT c.digest, c.status FROM capture_key k CROSS JOIN capture c
        WHERE k.key = ?1 AND c.sequence = k.sequence
          AND c.integration_id = ?2 AND c.capture_id = ?3
        ORDER BY k.sequence DESC LIMIT 1";
    let recent = recent.iter().rev().map(|sequence| (RECENT, *sequence));
    for (sql, place) in recent.chain([(INDEXED, stored_key(key))]) {
        let mut statement = connection.prepare_cached(sql)?;
        let named = params![place, id.as_str(), capture_id];
        let found = statement.query_row(named, |row| Ok((row.get(0)?, row.get(1)?)));
        if let Some(found) = found.optional()? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

impl Lookup {
    pub(super) fn open(database: &Path, recent: Arc<Recent>) -> rusqlite::Result<Self> {
        Ok(Self {
            connection: schema::open_for_reading(database, CACHE_KIB)?,
            recent,
            in_snapshot: false,
            departures: 0,
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
        let recent = self.recent.find(stored_key(key));
        if recent.departures != self.departures {
            // What has left memory since is not in the snapshot.
            self.refresh();
            self.departures = recent.departures;
        }
        let connection = self.snapshot().map_err(unavailable)?;
        let found = find(connection, &recent.sequences, key, id, capture_id);
        found
            .map_err(unavailable)?
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        outbox::record,
        region::Region,
        status::{EventStatus, State},
        time::UnixMillis,
    };

    fn record(id: &IntegrationId, capture_id: &str) -> CaptureRecord {
        CaptureRecord {
            integration_id: id.clone(),
            capture_id: capture_id.to_owned(),
            region: Region::Eu,
            mapping_version: 1,
            accept_time: UnixMillis(1),
            queue_time: UnixMillis(1),
            identify: EventStatus::new(State::Queued),
            track: EventStatus::new(State::Queued),
            attempts: Vec::new(),
            trace: None,
        }
    }

    #[test]
    fn a_key_that_leaves_memory_is_found_by_a_snapshot_from_before() {
        let directory = tempfile::tempdir().expect("a directory");
        let database = directory.path().join("relay.db");
        let writing = schema::open_for_writing(directory.path(), &database).expect("made");
        let recent = Arc::new(Recent::default());
        let mut lookup = Lookup::open(&database, Arc::clone(&recent)).expect("opened");
        let id = IntegrationId::new("acme").expect("an id");
        let status = record::encode(&record(&id, "one"));
        let row = params![7, id.as_str(), "one", [0_u8; 16], 0, 0, status];
        let insert = "INSERT INTO capture VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
        writing.execute(insert, row).expect("inserted");
        let place = (stored_key(key_of(&id, "one")), 7);
        recent.add(&[place], || {});

        let mut is_known = |capture_id: &str| {
            let key = key_of(&id, capture_id);
            let found = lookup.find(key, &id, capture_id).expect("read");
            found.is_some()
        };
        assert!(is_known("one"));
        assert!(!is_known("other"));
        // The snapshot stays, and the key leaves.
        let insert = "INSERT INTO capture_key VALUES (?1, ?2)";
        writing
            .execute(insert, params![place.0, place.1])
            .expect("inserted");
        recent.depart(&[place]);
        assert!(is_known("one"));
        assert!(!is_known("other"));
    }
}
