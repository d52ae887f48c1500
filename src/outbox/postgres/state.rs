//! Integrations, single captures, the backlog, configuration files, notices.

use super::{
    accept::key_of_id,
    database::{Database, LANES},
    row::{NAME, RECORD_COLUMNS, RECORDS, id_of, record_of},
};
use crate::{
    integration::{IntegrationId, revision_number},
    notice::Notice,
    outbox::{Backlog, Claim, OutboxError, StoredIntegration},
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
        let call = self.call().await?;
        let session = &call.session;
        let rows = call.rows(SQL, &[]).await?;
        let specs = rows.iter().map(|row| {
            session.learn(&id_of(row, 1)?, row.get(0));
            session.sealing.open_integration(row.get(1), row.get(2))
        });
        let specs = specs.collect::<Result<Vec<_>, _>>()?;
        // Only what the registry can take: others keep their lanes from sending.
        session.note_revisions(rows.iter().map(|row| (row.get(0), row.get(3))));
        Ok(specs)
    }

    /// The integration of a name, or the last one that was deleted, without a specification.
    pub(super) async fn integration(
        &self,
        name: &str,
    ) -> Result<Option<(IntegrationId, Option<StoredIntegration>)>, OutboxError> {
        let sql = format!(
            "SELECT integration_id, spec, key, revision FROM integrations
             WHERE {NAME} = $1 AND state <> 'moved' ORDER BY spec IS NULL, key DESC LIMIT 1"
        );
        let call = self.call().await?;
        let session = &call.session;
        let Some(row) = call.optional(&sql, &[&name]).await? else {
            return Ok(None);
        };
        let id = id_of(&row, 0)?;
        session.learn(&id, row.get(2));
        session.note_revision(row.get(2), row.get(3));
        let spec: Option<&[u8]> = row.get(1);
        let spec = spec.map(|sealed| session.sealing.open_integration(id.as_str(), sealed));
        Ok(Some((id, spec.transpose()?)))
    }

    /// The incarnation of the last integration of a name that is or was here; 0 without one.
    pub(super) async fn last_incarnation(&self, name: &str) -> Result<u32, OutboxError> {
        let sql = format!(
            "SELECT integration_id FROM integrations
             WHERE {NAME} = $1 AND (deleted OR spec IS NOT NULL)"
        );
        let rows = self.call().await?.rows(&sql, &[&name]).await?;
        rows.iter()
            .try_fold(0, |last, row| Ok(id_of(row, 0)?.incarnation().max(last)))
    }

    /// Stores an integration, or removes it, in the place of the one with this etag. One of a
    /// configuration file, `claimed` its version, only for the relays that have the newest file.
    pub(super) async fn replace_integration(
        &self,
        id: &IntegrationId,
        new: Option<&StoredIntegration>,
        replaces: Option<&str>,
        claimed: Option<i64>,
    ) -> Result<(), OutboxError> {
        const SQL: &str = "
            WITH counted AS (UPDATE integration_changes SET count = count + 1)
            UPDATE integrations SET spec = $2, etag = $3, revision = $4, deleted = $2::bytea IS NULL
            WHERE integration_id = $1 AND state = 'active' AND NOT deleted
                AND etag IS NOT DISTINCT FROM $5
                AND ($6::int8 IS NULL OR (SELECT version FROM configuration) <= $6)";
        let call = self.call().await?;
        call.make_keys(&[id]).await?;
        let session = &call.session;
        let sealed = new.map(|spec| session.sealing.integration(spec));
        let sealed = sealed.transpose()?;
        let etag = new.map(|spec| spec.etag.as_str());
        let revision = etag.map_or(0, revision_number).cast_signed();
        let name = id.as_str();
        let changed = call
            .apply(
                SQL,
                &[&name, &sealed, &etag, &revision, &replaces, &claimed],
            )
            .await?;
        if changed == 0 {
            return Err(OutboxError::Changed(id.clone()));
        }
        if let Some(key) = session.key(id) {
            session.note_revision(key, revision);
        }
        Ok(())
    }

    /// Notes that an integration was deleted elsewhere.
    pub(super) async fn note_deleted(&self, id: &IntegrationId) -> Result<(), OutboxError> {
        const SQL: &str = "
            UPDATE integrations SET deleted = true WHERE integration_id = $1 AND spec IS NULL";
        let call = self.call().await?;
        call.make_keys(&[id]).await?;
        call.apply(SQL, &[&id.as_str()]).await.map(drop)
    }

    /// The record of a capture.
    pub(super) async fn find(
        &self,
        id: &IntegrationId,
        capture_id: &str,
    ) -> Result<Option<CaptureRecord>, OutboxError> {
        let call = self.call().await?;
        let Some(key) = call.key(id).await? else {
            return Ok(None);
        };
        let sql = format!(
            "SELECT {RECORD_COLUMNS} FROM {RECORDS} WHERE c.integration = $1 AND c.id = $2"
        );
        let row = call.optional(&sql, &[&key, &key_of_id(capture_id)]).await?;
        row.map(|row| record_of(&row, 0)).transpose()
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
        let call = self.call().await?;
        let digest = uuid::Uuid::from_bytes(call.session.sealing.digest(digest));
        if call
            .apply(CLAIM, &[&version, &digest, &call.session.relay])
            .await?
            > 0
        {
            return Ok(Claim::Apply);
        }
        let stored: i64 = call.row(STORED, &[]).await?.get(0);
        Ok(match stored > version {
            true => Claim::Older {
                stored: stored.cast_unsigned(),
            },
            false => Claim::Conflict,
        })
    }

    /// What waits for an integration.
    pub(super) async fn backlog(&self, id: &IntegrationId) -> Result<Backlog, OutboxError> {
        const SUM: &str = "
            SELECT coalesce(sum(events), 0)::int8, coalesce(sum(bytes), 0)::int8
            FROM backlog WHERE integration = $1";
        // The first live and the first replayed capture of each lane.
        const LANES_AND_OLDEST: &str = "
            SELECT count(DISTINCT q.lane), min(c.queue_millis)
            FROM generate_series($1::int8 * $2, $1 * $2 + $2 - 1) AS l (lane),
                (VALUES (false), (true)) AS r (replayed),
                LATERAL (SELECT * FROM queue WHERE lane = l.lane AND replayed = r.replayed
                    ORDER BY seq LIMIT 1) AS q JOIN captures c ON c.seq = q.seq";
        let call = self.call().await?;
        let Some(key) = call.key(id).await? else {
            return Ok(Backlog::default());
        };
        let sum = call.row(SUM, &[&key]).await?;
        let lanes = call.row(LANES_AND_OLDEST, &[&key, &LANES]).await?;
        let number = |place: usize| u64::try_from(sum.get::<_, i64>(place)).unwrap_or(0);
        Ok(Backlog {
            lanes: u32::try_from(lanes.get::<_, i64>(0)).unwrap_or(u32::MAX),
            events: number(0),
            bytes: number(1),
            oldest: lanes.get::<_, Option<i64>>(1).map(UnixMillis),
        })
    }

    pub(super) async fn put_notice(&self, notice: &Notice) -> Result<(), OutboxError> {
        const SQL: &str = "
            WITH gone AS (
                DELETE FROM notices WHERE position <= (SELECT position FROM notices
                    ORDER BY position DESC OFFSET $4 LIMIT 1)
            ) INSERT INTO notices (id, millis, body) VALUES ($1, $2, $3)
            ON CONFLICT (id) DO NOTHING";
        let Notice { id, time, body } = notice;
        let call = self.call().await?;
        call.apply(SQL, &[id, &time.0, body, &(MAX_NOTICES - 1)])
            .await?;
        Ok(())
    }

    /// The oldest notices, at the relay that sends them.
    pub(super) async fn notices(&self, limit: usize) -> Result<Vec<Notice>, OutboxError> {
        const SQL: &str = "SELECT id, millis, body FROM notices ORDER BY position LIMIT $1";
        if !self.session()?.prefers("notices") {
            return Ok(Vec::new());
        }
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = self.call().await?.rows(SQL, &[&limit]).await?;
        let notices = rows.iter().map(|row| Notice {
            id: row.get(0),
            time: UnixMillis(row.get(1)),
            body: row.get(2),
        });
        Ok(notices.collect())
    }

    pub(super) async fn delete_notice(&self, id: &str) -> Result<(), OutboxError> {
        const SQL: &str = "DELETE FROM notices WHERE id = $1";
        self.call().await?.apply(SQL, &[&id]).await.map(drop)
    }
}
