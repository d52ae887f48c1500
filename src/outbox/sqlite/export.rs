//! Reads an embedded outbox piece by piece, to move it elsewhere, and removes what was moved.

use std::{fs::File, path::Path, sync::Arc, time::Duration};

use rusqlite::{Connection, params};

use super::{
    OpenError, SqliteOptions,
    entry::{key_of, stored_key},
    journal::OnDamage,
    keys, open,
    row::{crc32, region_of},
    schema,
    writer::Ids,
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    metrics::Metrics,
    notice::Notice,
    outbox::{LaneKey, Limits, StoredIntegration, sealing::Sealing},
    proto::ErasureReceipt,
    time::UnixMillis,
    vault::Vault,
};

/// Nothing is accepted, so nothing is bounded.
const UNBOUNDED: Limits = Limits {
    max_events: u64::MAX,
    max_bytes: u64::MAX,
    max_integration_events: u64::MAX,
    max_integration_bytes: u64::MAX,
};

/// Options of a command that works on a stopped store.
pub(super) fn offline(directory: &Path) -> SqliteOptions {
    SqliteOptions {
        directory: directory.to_owned(),
        limits: UNBOUNDED,
        group_commit_max: 1,
        remember: Duration::MAX,
        encrypt_payloads: false,
        metrics: Metrics::off(),
    }
}

/// An embedded outbox that no relay has open.
pub(in crate::outbox) struct Export {
    connection: Connection,
    ids: Ids,
    sealing: Arc<Sealing>,
    index_key: zeroize::Zeroizing<[u8; 32]>,
    _lock: File,
}

/// Why it can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// There is none.
    #[error("[outbox] path {0}: there is no embedded outbox to move")]
    Missing(std::path::PathBuf),
    /// It can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database failed.
    #[error("the embedded outbox cannot be read: {0}")]
    Database(#[from] rusqlite::Error),
    /// What is stored can't be unsealed.
    #[error(transparent)]
    Outbox(#[from] crate::outbox::OutboxError),
}

/// A capture with all that is stored of it, as it is stored.
pub(in crate::outbox) struct Exported {
    pub(in crate::outbox) sequence: i64,
    pub(in crate::outbox) integration_id: IntegrationId,
    pub(in crate::outbox) capture_id: String,
    pub(in crate::outbox) digest: Vec<u8>,
    pub(in crate::outbox) status: Vec<u8>,
    pub(in crate::outbox) accept_time: UnixMillis,
    pub(in crate::outbox) subject: i64,
    pub(in crate::outbox) lane: Option<LaneKey>,
    /// Waiting payloads, and whether they were replayed.
    pub(in crate::outbox) waiting: Option<([Option<StoredPayload>; 2], bool)>,
    pub(in crate::outbox) dead: Vec<(EventType, UnixMillis, StoredPayload)>,
}

/// A payload with the CRC-32 under which it was stored: where the two differ it is
/// damaged, and has to be known as such where it goes.
pub(in crate::outbox) struct StoredPayload {
    pub(in crate::outbox) bytes: Vec<u8>,
    pub(in crate::outbox) crc: u32,
}

impl StoredPayload {
    /// `None` where there is no payload.
    fn of(bytes: Option<Vec<u8>>, crc: Option<u32>) -> Option<Self> {
        let bytes = bytes?;
        // A missing checksum fits nothing.
        let crc = crc.unwrap_or_else(|| !crc32(&bytes));
        Some(Self { bytes, crc })
    }
}

impl Export {
    /// Opens it for this process alone.
    pub(in crate::outbox) fn open(
        directory: &Path,
        vault: &Arc<Vault>,
    ) -> Result<Self, ExportError> {
        let database = directory.join("relay.db");
        if !database.exists() {
            return Err(ExportError::Missing(directory.to_owned()));
        }
        // What stands in the journal alone is put into the database.
        let recovered = open::recovered(&offline(directory), vault, OnDamage::Refuse)?;
        let (connection, ids) = recovered.writer.into_parts();
        let index_key = keys::index_key(&connection, vault).map_err(|source| OpenError::Keys {
            path: directory.to_owned(),
            source,
        })?;
        let mut export = Self {
            connection,
            ids,
            sealing: recovered.sealing,
            index_key,
            _lock: recovered.lock,
        };
        let replaced = export.replaced()?;
        export.remove(&replaced)?;
        Ok(export)
    }

    /// Skipped captures in whose place a newer one with their id was stored.
    fn replaced(&self) -> Result<Vec<i64>, ExportError> {
        const SQL: &str = "
            SELECT sequence FROM (
                SELECT sequence, lead(sequence) OVER (
                    PARTITION BY integration_id, capture_id ORDER BY sequence) AS newer
                FROM capture)
            WHERE newer IS NOT NULL";
        let mut rows = self.connection.prepare(SQL)?;
        let replaced = rows.query_map([], |row| row.get(0))?;
        Ok(replaced.collect::<Result<_, _>>()?)
    }

    /// The key of what is blinded.
    pub(in crate::outbox) fn index_key(&self) -> &[u8; 32] {
        &self.index_key
    }

    /// The integrations that were deleted.
    pub(in crate::outbox) fn deleted(&self) -> Result<Vec<IntegrationId>, ExportError> {
        let mut statement = self
            .connection
            .prepare("SELECT id FROM integration WHERE spec = x''")?;
        let ids = statement.query_map([], |row| row.get::<_, String>(0))?;
        let ids = ids.collect::<rusqlite::Result<Vec<_>>>()?;
        Ok(ids
            .iter()
            .filter_map(|id| IntegrationId::stored(id))
            .collect())
    }

    pub(in crate::outbox) fn integrations(&self) -> Result<Vec<StoredIntegration>, ExportError> {
        let mut rows = self
            .connection
            .prepare("SELECT id, spec FROM integration WHERE spec <> x'' ORDER BY id")?;
        let rows: Vec<(String, Vec<u8>)> = rows
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?;
        let open = |(id, sealed): &(String, Vec<u8>)| self.sealing.open_integration(id, sealed);
        Ok(rows.iter().map(open).collect::<Result<_, _>>()?)
    }

    pub(in crate::outbox) fn receipts(&self) -> Result<Vec<ErasureReceipt>, ExportError> {
        let mut rows = self
            .connection
            .prepare("SELECT CAST(id AS TEXT), receipt FROM erasure ORDER BY id")?;
        let rows: Vec<(String, Vec<u8>)> = rows
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?;
        let open = |(id, sealed): &(String, Vec<u8>)| self.sealing.open_receipt(id, sealed);
        Ok(rows.iter().map(open).collect::<Result<_, _>>()?)
    }

    pub(in crate::outbox) fn notices(&self) -> Result<Vec<Notice>, ExportError> {
        let mut rows = self
            .connection
            .prepare("SELECT name, millis, body FROM notice ORDER BY id")?;
        let notices = rows.query_map([], |row| {
            Ok(Notice {
                id: row.get(0)?,
                time: UnixMillis(row.get(1)?),
                body: row.get(2)?,
            })
        })?;
        Ok(notices.collect::<Result<_, _>>()?)
    }

    /// How many captures there are.
    pub(in crate::outbox) fn count(&self) -> Result<u64, ExportError> {
        const SQL: &str = "SELECT count(*) FROM capture";
        Ok(self.connection.query_row(SQL, [], |row| row.get(0))?)
    }

    /// The first captures after a sequence, in the order of acceptance.
    pub(in crate::outbox) fn captures(
        &self,
        after: i64,
        limit: usize,
    ) -> Result<Vec<Exported>, ExportError> {
        const SQL: &str = "
            SELECT c.sequence, c.integration_id, c.capture_id, c.digest, c.status, c.accept_millis,
                   coalesce(s.subject, 0), q.identify, q.track, q.replay,
                   coalesce(q.lane, (SELECT min(d.lane) FROM dead_letter d WHERE d.sequence = c.sequence)),
                   q.identify_crc, q.track_crc
            FROM capture c LEFT JOIN subject s ON s.sequence = c.sequence
            LEFT JOIN queue q ON q.sequence = c.sequence
            WHERE c.sequence > ?1 ORDER BY c.sequence LIMIT ?2";
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut statement = self.connection.prepare_cached(SQL)?;
        let mut rows = statement.query(params![after, limit])?;
        let mut captures = Vec::new();
        while let Some(row) = rows.next()? {
            let name: String = row.get(1)?;
            let Some(integration_id) = IntegrationId::stored(&name) else {
                continue;
            };
            let sequence = row.get(0)?;
            let lane: Option<i64> = row.get(10)?;
            let replay: Option<i64> = row.get(9)?;
            captures.push(Exported {
                sequence,
                integration_id,
                capture_id: row.get(2)?,
                digest: row.get(3)?,
                status: row.get(4)?,
                accept_time: UnixMillis(row.get(5)?),
                subject: row.get(6)?,
                lane: lane.map(|lane| self.lane(lane)).transpose()?.flatten(),
                waiting: match replay {
                    Some(replay) => {
                        let identify = StoredPayload::of(row.get(7)?, row.get(11)?);
                        let track = StoredPayload::of(row.get(8)?, row.get(12)?);
                        Some(([identify, track], replay == 1))
                    }
                    None => None,
                },
                dead: self.dead(sequence)?,
            });
        }
        Ok(captures)
    }

    fn lane(&self, id: i64) -> rusqlite::Result<Option<LaneKey>> {
        const SQL: &str = "SELECT integration_id, region, shard FROM lane WHERE id = ?1";
        let mut statement = self.connection.prepare_cached(SQL)?;
        statement.query_row(params![id], |row| {
            let name: String = row.get(0)?;
            let (region, shard) = (region_of(row.get(1)?), row.get(2)?);
            Ok(IntegrationId::stored(&name).map(|integration_id| LaneKey {
                integration_id,
                region,
                shard,
            }))
        })
    }

    fn dead(&self, sequence: i64) -> rusqlite::Result<Vec<(EventType, UnixMillis, StoredPayload)>> {
        const SQL: &str = "SELECT event, millis, payload, payload_crc FROM dead_letter WHERE sequence = ?1 ORDER BY id";
        let mut statement = self.connection.prepare_cached(SQL)?;
        let rows = statement.query_map(params![sequence], |row| {
            let event = super::selection::event_of(row.get(0)?);
            let (bytes, crc) = (row.get(2)?, row.get(3)?);
            Ok((event, UnixMillis(row.get(1)?), StoredPayload { bytes, crc }))
        })?;
        rows.collect()
    }

    /// Removes captures that were moved, in one transaction.
    pub(in crate::outbox) fn remove(&mut self, sequences: &[i64]) -> Result<(), ExportError> {
        let transaction = self.connection.transaction()?;
        {
            let mut named = transaction.prepare_cached(
                "SELECT integration_id, capture_id FROM capture WHERE sequence = ?1",
            )?;
            for sequence in sequences {
                let (integration, capture): (String, String) =
                    named.query_row(params![sequence], |row| Ok((row.get(0)?, row.get(1)?)))?;
                if let Some(integration) = IntegrationId::stored(&integration) {
                    let key = stored_key(key_of(&integration, &capture));
                    self.ids.remove(&transaction, (key, *sequence))?;
                }
            }
        }
        for table in ["queue", "dead_letter", "subject", "capture"] {
            let mut gone =
                transaction.prepare_cached(&format!("DELETE FROM {table} WHERE sequence = ?1"))?;
            for sequence in sequences {
                gone.execute(params![sequence])?;
            }
        }
        // Its counts are those of what is left.
        transaction.execute_batch(schema::RECOUNT)?;
        self.ids.store(&transaction)?;
        transaction.commit()?;
        self.ids.committed();
        Ok(())
    }
}
