//! Integrations, receipts of erasures, notices.

use futures_util::future::join3;
use tokio_postgres::types::ToSql;

use super::{
    READ,
    accept::id_of,
    database::Database,
    error::Effect,
    row::{RECORD_COLUMNS, record_of},
};
use crate::{
    integration::{IntegrationId, revision_number},
    notice::Notice,
    outbox::{Backlog, Claim, OutboxError, StoredIntegration},
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
};

/// Notices that are kept; of more the oldest go.
const MAX_NOTICES: i64 = 1_000;

impl Database {
    /// The integrations that are stored here; not those that arrive from another database.
    pub(super) async fn integrations(&self) -> Result<Vec<StoredIntegration>, OutboxError> {
        const SQL: &str = "
            SELECT key, integration_id, spec, revision FROM integrations
            WHERE spec IS NOT NULL AND state = 'active' ORDER BY integration_id";
        let session = self.session()?;
        let connection = self.connection().await?;
        let rows = connection.rows(READ, SQL, &[]).await?;
        let specs = rows.iter().map(|row| {
            session.learn(row.get(0), row.get(1))?;
            session.sealing.open_integration(row.get(1), row.get(2))
        });
        let specs = specs.collect::<Result<Vec<_>, _>>()?;
        // Only what the registry can take: others keep their lanes from sending.
        session.note_revisions(rows.iter().map(|row| (row.get(0), row.get(3))));
        Ok(specs)
    }

    /// Whether an integration has a row here, and its specification.
    pub(super) async fn integration(
        &self,
        id: &IntegrationId,
    ) -> Result<Option<Option<StoredIntegration>>, OutboxError> {
        const SQL: &str = "
            SELECT key, spec, revision FROM integrations WHERE integration_id = $1 AND state <> 'moved'";
        let session = self.session()?;
        let connection = self.connection().await?;
        let Some(row) = connection.optional(READ, SQL, &[&id.as_str()]).await? else {
            return Ok(None);
        };
        session.learn(row.get(0), id.as_str())?;
        session.note_revision(row.get(0), row.get(2));
        let spec: Option<&[u8]> = row.get(1);
        let open = |sealed| session.sealing.open_integration(id.as_str(), sealed);
        Ok(Some(spec.map(open).transpose()?))
    }

    /// Stores an integration, or removes it, in the place of the one with this etag.
    pub(super) async fn replace_integration(
        &self,
        id: &IntegrationId,
        new: Option<&StoredIntegration>,
        replaces: Option<&str>,
        claimed: Option<i64>,
    ) -> Result<(), OutboxError> {
        // An integration of the file only for the relays that have the newest file.
        const SQL: &str = "
            WITH counted AS (UPDATE integration_changes SET count = count + 1)
            UPDATE integrations SET spec = $2, etag = $3, revision = $4
            WHERE integration_id = $1 AND state = 'active' AND etag IS NOT DISTINCT FROM $5
                AND ($6::int8 IS NULL OR (SELECT version FROM configuration) <= $6)";
        let session = self.session()?;
        let connection = self.connection().await?;
        self.keys(&session, &connection, &[id]).await?;
        let sealed = new.map(|spec| session.sealing.integration(spec));
        let sealed = sealed.transpose()?;
        let etag = new.map(|spec| spec.etag.as_str());
        let revision = etag.map_or(0, revision_number).cast_signed();
        match connection
            .count(
                Effect::Commit,
                SQL,
                &[&id.as_str(), &sealed, &etag, &revision, &replaces, &claimed],
            )
            .await?
        {
            0 => Err(OutboxError::Changed(id.clone())),
            _ => {
                if let Some(key) = session.key(id) {
                    session.note_revision(key, revision);
                }
                Ok(())
            }
        }
    }

    /// The record of a capture.
    pub(super) async fn find(
        &self,
        id: &IntegrationId,
        capture_id: &str,
    ) -> Result<Option<CaptureRecord>, OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        self.find_keys(&session, &connection, &[id]).await?;
        let Some(key) = session.key(id) else {
            return Ok(None);
        };
        let sql = format!(
            "SELECT {RECORD_COLUMNS} FROM captures c WHERE c.integration = $1 AND c.id = $2"
        );
        let capture_id = id_of(capture_id);
        let row = connection
            .optional(READ, &sql, &[&key, &capture_id])
            .await?;
        row.map(|row| record_of(id.clone(), &row, 0)).transpose()
    }

    /// Compares a relay's configuration file with the newest one; stores one that is not older.
    /// Other integrations under the same version are a conflict only while other relays run.
    pub(super) async fn claim(
        &self,
        version: i64,
        digest: &[u8; 16],
    ) -> Result<Claim, OutboxError> {
        const CLAIM: &str = "
            UPDATE configuration SET version = $1, digest = $2
            WHERE version < $1 OR (version = $1 AND (digest = $2 OR NOT EXISTS (
                SELECT 1 FROM relays WHERE relay <> $3 AND expires > clock_timestamp())))";
        const STORED: &str = "SELECT version FROM configuration";
        let session = self.session()?;
        let connection = self.connection().await?;
        let digest = uuid::Uuid::from_bytes(session.sealing.digest(digest));
        let parameters: [&(dyn ToSql + Sync); 3] = [&version, &digest, &session.relay];
        if connection.count(Effect::Commit, CLAIM, &parameters).await? > 0 {
            return Ok(Claim::Apply);
        }
        let stored: i64 = connection.row(READ, STORED, &[]).await?.get(0);
        if stored > version {
            let stored = stored.cast_unsigned();
            return Ok(Claim::Older { stored });
        }
        Ok(Claim::Conflict)
    }

    /// What waits for an integration.
    pub(super) async fn backlog(&self, id: &IntegrationId) -> Result<Backlog, OutboxError> {
        const SUM: &str = "
            SELECT coalesce(sum(events), 0)::int8, coalesce(sum(bytes), 0)::int8
            FROM backlog WHERE integration = $1";
        const OLDEST: &str = "
            SELECT count(*), min(c.queue_millis)
            FROM lanes l, LATERAL (
                (SELECT seq FROM queue WHERE lane = l.lane AND NOT replayed ORDER BY seq LIMIT 1)
                UNION ALL
                (SELECT seq FROM queue WHERE lane = l.lane AND replayed ORDER BY seq LIMIT 1)
            ) AS q JOIN captures c ON c.seq = q.seq
            WHERE l.lane >= $1::int8 * 8 AND l.lane < ($1::int8 + 1) * 8";
        const LANES: &str = "
            SELECT count(*) FROM lanes l WHERE l.lane >= $1::int8 * 8 AND l.lane < ($1::int8 + 1) * 8
                AND EXISTS (SELECT 1 FROM queue q WHERE q.lane = l.lane)";
        let session = self.session()?;
        let connection = self.connection().await?;
        self.find_keys(&session, &connection, &[id]).await?;
        let Some(key) = session.key(id) else {
            return Ok(Backlog::default());
        };
        let work = async {
            let (sum, oldest, lanes) = join3(
                connection.query_one(SUM, &[&key]),
                connection.query_one(OLDEST, &[&key]),
                connection.query_one(LANES, &[&key]),
            )
            .await;
            Ok((sum?, oldest?, lanes?))
        };
        let (sum, oldest, lanes) = connection.run(READ, work).await?;
        let number = |place: usize| u64::try_from(sum.get::<_, i64>(place)).unwrap_or(0);
        Ok(Backlog {
            lanes: u32::try_from(lanes.get::<_, i64>(0)).unwrap_or(u32::MAX),
            events: number(0),
            bytes: number(1),
            oldest: oldest.get::<_, Option<i64>>(1).map(UnixMillis),
        })
    }

    /// This database's parts of receipts before an id, newest first.
    pub(super) async fn receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<(i64, ErasureReceipt)>, OutboxError> {
        const SQL: &str = "
            SELECT id, receipt FROM receipts WHERE id < $1 ORDER BY id DESC LIMIT $2";
        let session = self.session()?;
        let connection = self.connection().await?;
        let before = before.unwrap_or(i64::MAX);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = connection.rows(READ, SQL, &[&before, &limit]).await?;
        let receipts = rows.iter().map(|row| {
            let id: i64 = row.get(0);
            let receipt = session.sealing.open_receipt(&id.to_string(), row.get(1))?;
            Ok((id, receipt))
        });
        receipts.collect()
    }

    pub(super) async fn put_notice(&self, notice: &Notice) -> Result<(), OutboxError> {
        const SQL: &str = "
            WITH gone AS (
                DELETE FROM notices WHERE position <= (SELECT position FROM notices
                    ORDER BY position DESC OFFSET $4 LIMIT 1)
            ) INSERT INTO notices (id, millis, body) VALUES ($1, $2, $3)
            ON CONFLICT (id) DO NOTHING";
        let connection = self.connection().await?;
        connection
            .count(
                Effect::Commit,
                SQL,
                &[&notice.id, &notice.time.0, &notice.body, &(MAX_NOTICES - 1)],
            )
            .await
            .map(drop)
    }

    /// The oldest notices, at the relay that sends them.
    pub(super) async fn notices(&self, limit: usize) -> Result<Vec<Notice>, OutboxError> {
        const SQL: &str = "SELECT id, millis, body FROM notices ORDER BY position LIMIT $1";
        if !self.session()?.prefers("notices") {
            return Ok(Vec::new());
        }
        let connection = self.connection().await?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = connection.rows(READ, SQL, &[&limit]).await?;
        let notices = rows.iter().map(|row| Notice {
            id: row.get(0),
            time: UnixMillis(row.get(1)),
            body: row.get(2),
        });
        Ok(notices.collect())
    }

    pub(super) async fn delete_notice(&self, id: &str) -> Result<(), OutboxError> {
        let connection = self.connection().await?;
        connection
            .count(Effect::Commit, "DELETE FROM notices WHERE id = $1", &[&id])
            .await
            .map(drop)
    }
}
