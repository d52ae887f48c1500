//! Moves an integration to another database: all rows with their numbers, in one transaction
//! on each side. The target commits first, so that nothing is lost in between; a repetition
//! finishes what was interrupted.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::{SinkExt, StreamExt};
use tokio_postgres::types::ToSql;

use super::{
    PostgresConnection, PostgresError,
    connect::{Connection, Connector},
    error::Effect,
    schema::check,
};
use crate::{integration::IntegrationId, outbox::OutboxError, vault::Vault};

/// Longest copy of one table.
const COPY_LIMIT: Duration = Duration::from_secs(24 * 3_600);
/// How often it is looked whether others are done.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Longest wait for them: leases and statements are shorter.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// The tables that are copied: name, columns, condition on the key `$`.
const TABLES: [(&str, &str, &str); 3] = [
    (
        "captures",
        "seq, integration, lane, id, digest, subject, mapping_version, accept_millis, \
         queue_millis, stored_at, capture_id, identify, track, attempts, trace",
        "integration = $",
    ),
    (
        "queue",
        "lane, replayed, seq, identify_bytes, track_bytes, identify, track",
        "lane >= $ * 8 AND lane < ($ + 1) * 8",
    ),
    (
        "dead_letters",
        "id, integration, seq, event, reason, dead_millis, accept_millis, bytes, payload",
        "integration = $",
    ),
];

/// Moves an integration to the database at place `to`; returns how many captures went.
/// `progress` hears how many rows are copied, of how many.
///
/// # Errors
/// [`PostgresError`]: to be called again; until then the integration is where it was, or at
/// both places and delivered by one of them.
pub async fn move_integration(
    connection: &PostgresConnection,
    _vault: &Arc<Vault>,
    id: &IntegrationId,
    to: usize,
    mut progress: impl FnMut(u64, u64),
) -> Result<u64, PostgresError> {
    if to >= connection.urls.len() {
        return Err(PostgresError::Move(format!(
            "there is no database {to}: [postgres] urls names {}",
            connection.urls.len()
        )));
    }
    let mut connections = Vec::new();
    for place in 0..connection.urls.len() {
        let connector = Connector::new(connection, place)?;
        let found = in_database(place, connector.get().await)?;
        check(&found, place, connection).await?;
        let state = found.optional(Effect::None, STATE, &[&id.as_str()]).await;
        let state: Option<String> = in_database(place, state)?.map(|row| row.get(0));
        connections.push((found, state));
    }
    let state_at = |place: usize| connections[place].1.as_deref();
    let mut places = 0..connections.len();
    if let Some(other) = places.find(|place| *place != to && state_at(*place) == Some("arriving")) {
        return Err(PostgresError::Move(format!(
            "a move of {id} to database {other} was interrupted; repeat it with --to {other} first"
        )));
    }
    let mut places = 0..connections.len();
    let from =
        places.find(|place| *place != to && matches!(state_at(*place), Some("active" | "leaving")));
    let target = &connections[to].0;
    let Some(from) = from else {
        if state_at(to).is_none() {
            return Err(PostgresError::Move(format!("there is no integration {id}")));
        }
        // Here already, or all but open: an earlier run, to here or from here, was interrupted.
        in_database(to, open(target, id).await)?;
        return Ok(0);
    };
    let source = &connections[from].0;
    let moving = Move { id, source, target };
    in_database(from, moving.close_source().await)?;
    let captures = in_database(to, moving.copy(&mut progress).await)?;
    in_database(to, open(target, id).await)?;
    Ok(captures)
}

/// The state of an integration in a database; none where there is but an empty row of its name.
const STATE: &str = "
    SELECT state FROM integrations i WHERE integration_id = $1
        AND (state = 'arriving' OR spec IS NOT NULL
            OR EXISTS (SELECT 1 FROM captures c WHERE c.integration = i.key))";

/// Lets the integration take captures and leases there.
async fn open(target: &Connection, id: &IntegrationId) -> Result<(), OutboxError> {
    const SQL: &str = "
        WITH counted AS (UPDATE integration_changes SET count = count + 1)
        UPDATE integrations SET state = 'active'
        WHERE integration_id = $1 AND state IN ('arriving', 'leaving')";
    target
        .count(Effect::Commit, SQL, &[&id.as_str()])
        .await
        .map(drop)
}

fn in_database<T>(database: usize, done: Result<T, OutboxError>) -> Result<T, PostgresError> {
    done.map_err(|source| PostgresError::Database { database, source })
}

struct Move<'a> {
    id: &'a IntegrationId,
    source: &'a Connection,
    target: &'a Connection,
}

impl Move<'_> {
    async fn key(&self) -> Result<i64, OutboxError> {
        let sql = "SELECT key FROM integrations WHERE integration_id = $1";
        let name = self.id.as_str();
        Ok(self.source.row(Effect::None, sql, &[&name]).await?.get(0))
    }

    /// Lets the source take no more captures and begin no more leases, and waits for what is
    /// under way.
    async fn close_source(&self) -> Result<(), OutboxError> {
        const CLOSE: &str = "
            WITH counted AS (UPDATE integration_changes SET count = count + 1)
            UPDATE integrations SET state = 'leaving'
            WHERE integration_id = $1 AND state IN ('active', 'leaving')";
        const DONE: &str = "
            SELECT pg_snapshot_xmin(pg_current_snapshot()) >= $1::text::xid8 AND NOT EXISTS (
                SELECT 1 FROM lanes WHERE lane >= $2::int8 * 8 AND lane < ($2::int8 + 1) * 8
                    AND busy AND expires > clock_timestamp())";
        let name = self.id.as_str();
        self.source.count(Effect::Commit, CLOSE, &[&name]).await?;
        // All that write now have begun before this; later ones see the new state.
        const NOW: &str = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text";
        let transaction: String = self.source.row(Effect::None, NOW, &[]).await?.get(0);
        let key = self.key().await?;
        let begun = std::time::Instant::now();
        loop {
            let parameters: [&(dyn ToSql + Sync); 2] = [&transaction, &key];
            if self
                .source
                .row(Effect::None, DONE, &parameters)
                .await?
                .get(0)
            {
                return Ok(());
            }
            if begun.elapsed() > MAX_WAIT {
                return Err(OutboxError::Unavailable(
                    "transactions or requests of the integration do not end".to_owned(),
                ));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Copies all rows into the target and removes them from the source; returns how many
    /// captures that were. The source's transaction fails where a row has changed meanwhile.
    async fn copy(&self, progress: &mut impl FnMut(u64, u64)) -> Result<u64, OutboxError> {
        let key = self.key().await?;
        self.make_room(key).await?;
        self.source.begin().await?;
        self.target.begin().await?;
        for (connection, setting) in [
            (
                self.source,
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
            ),
            (self.source, "SET LOCAL statement_timeout = 0"),
            (
                self.source,
                "SET LOCAL idle_in_transaction_session_timeout = 0",
            ),
            (self.target, "SET LOCAL statement_timeout = 0"),
            (
                self.target,
                "SET LOCAL idle_in_transaction_session_timeout = 0",
            ),
        ] {
            let set = connection.batch_execute(setting);
            connection.run(Effect::None, set).await?;
        }
        const COUNT: &str = "
            SELECT (SELECT count(*) FROM captures WHERE integration = $1)
                + (SELECT count(*) FROM queue WHERE lane >= $1 * 8 AND lane < ($1 + 1) * 8)
                + (SELECT count(*) FROM dead_letters WHERE integration = $1)";
        let sql = COUNT.replace("$1", &key.to_string());
        let count = self.source.query_one(&sql, &[]);
        let count = self.source.run_for(COPY_LIMIT, Effect::None, count).await?;
        let total = u64::try_from(count.get::<_, i64>(0)).unwrap_or(0);
        // One run at a time, and only between the states that it has found.
        const LOCK: &str = "SELECT state FROM integrations WHERE key = $1 FOR UPDATE";
        for (connection, state) in [(self.source, "leaving"), (self.target, "arriving")] {
            let row = connection.row(Effect::None, LOCK, &[&key]).await?;
            if row.get::<_, &str>(0) != state {
                return Err(OutboxError::Unavailable(
                    "another run moves the integration".to_owned(),
                ));
            }
        }
        let mut copied = 0;
        for (table, columns, condition) in TABLES {
            let condition = condition.replace('$', &key.to_string());
            let from = format!(
                "COPY (SELECT {columns} FROM {table} WHERE {condition}) TO STDOUT (FORMAT binary)"
            );
            let into = format!("COPY {table} ({columns}) FROM STDIN (FORMAT binary)");
            // What an interrupted run has left.
            let left = format!("DELETE FROM {table} WHERE {condition}");
            let gone = self.target.execute(&left, &[]);
            self.target.run_for(COPY_LIMIT, Effect::None, gone).await?;
            copied += self.copy_table(&from, &into).await?;
            progress(copied, total);
        }
        const ARRIVE: &str = "
            WITH gone AS (DELETE FROM backlog WHERE integration = $1::int8 AND relay <> 0)
            INSERT INTO backlog (integration, relay, slot, events, bytes)
            SELECT $1::int8, 0, 0, count(identify) + count(track),
                coalesce(sum(CASE WHEN identify IS NULL THEN 0 ELSE identify_bytes END
                    + CASE WHEN track IS NULL THEN 0 ELSE track_bytes END), 0)
            FROM queue WHERE lane >= $1::int8 * 8 AND lane < ($1::int8 + 1) * 8
            ON CONFLICT (integration, relay, slot) DO UPDATE
            SET events = excluded.events, bytes = excluded.bytes
            RETURNING 1";
        let parameters: [&(dyn ToSql + Sync); 1] = [&key];
        let arrived = self.target.query_one(ARRIVE, &parameters);
        self.target
            .run_for(COPY_LIMIT, Effect::None, arrived)
            .await?;
        // Beyond all numbers that came along, and far beyond those that other sessions take
        // at this moment.
        const LEAP: &str = "
            SELECT setval('capture_seq', (greatest(s.last_value,
                    (SELECT coalesce(max(seq), 0) FROM captures)) / 64 + 1000000) * 64
                    + s.last_value % 64),
                setval('dead_letter_seq', (greatest(d.last_value,
                    (SELECT coalesce(max(id), 0) FROM dead_letters)) / 64 + 1000000) * 64
                    + d.last_value % 64)
            FROM capture_seq s, dead_letter_seq d";
        self.target.row(Effect::None, LEAP, &[]).await?;
        let committed = self.target.batch_execute("COMMIT");
        self.target.commit(Effect::Commit, committed).await?;
        self.clear_source(key).await
    }

    /// The integration's row and its lanes in the target. An empty row of its name goes.
    async fn make_room(&self, key: i64) -> Result<(), OutboxError> {
        const TAKEN: &str = "
            SELECT 1 FROM integrations i WHERE i.integration_id = $1 AND i.key <> $2
                AND (i.spec IS NOT NULL
                    OR EXISTS (SELECT 1 FROM captures c WHERE c.integration = i.key))";
        let name = self.id.as_str();
        let parameters: [&(dyn ToSql + Sync); 2] = [&name, &key];
        let taken = self.target.optional(Effect::None, TAKEN, &parameters).await;
        if taken?.is_some() {
            return Err(OutboxError::Unavailable(
                "the target has an integration of this name with captures of its own".to_owned(),
            ));
        }
        const SPEC: &str =
            "SELECT revision, etag, spec FROM integrations WHERE integration_id = $1";
        let row = self.source.row(Effect::None, SPEC, &[&name]).await?;
        let (revision, etag, spec): (i64, Option<String>, Option<Vec<u8>>) =
            (row.get(0), row.get(1), row.get(2));
        // Before the row that takes its name: a statement of its own.
        const EMPTY: &str = "DELETE FROM integrations WHERE integration_id = $1 AND key <> $2";
        let parameters: [&(dyn ToSql + Sync); 2] = [&name, &key];
        self.target
            .count(Effect::Commit, EMPTY, &parameters)
            .await?;
        const ROW: &str = "
            WITH lanes AS (
                INSERT INTO lanes (lane) SELECT $2::int8 * 8 + n FROM generate_series(0, 7) AS n
                ON CONFLICT (lane) DO NOTHING
            )
            INSERT INTO integrations (key, integration_id, state, revision, etag, spec)
            VALUES ($2, $1, 'arriving', $3, $4, $5)
            ON CONFLICT (key) DO UPDATE SET state = 'arriving', revision = excluded.revision,
                etag = excluded.etag, spec = excluded.spec";
        let parameters: [&(dyn ToSql + Sync); 5] = [&name, &key, &revision, &etag, &spec];
        let made = self.target.count(Effect::Commit, ROW, &parameters).await;
        made.map(drop)
    }

    async fn copy_table(&self, from: &str, into: &str) -> Result<u64, OutboxError> {
        let work = async {
            let mut rows = pin!(self.source.copy_out(from).await?);
            let mut sink = pin!(self.target.copy_in::<_, bytes::Bytes>(into).await?);
            while let Some(piece) = rows.next().await {
                sink.send(piece?).await?;
            }
            sink.finish().await
        };
        self.target.run_for(COPY_LIMIT, Effect::None, work).await
    }

    /// Removes what the target has now, in the transaction that has read it.
    async fn clear_source(&self, key: i64) -> Result<u64, OutboxError> {
        let mut captures = 0;
        for (table, _, condition) in TABLES {
            let condition = condition.replace('$', &key.to_string());
            let sql = format!("DELETE FROM {table} WHERE {condition}");
            let gone = self.source.execute(&sql, &[]);
            let gone = self.source.run_for(COPY_LIMIT, Effect::None, gone).await?;
            if table == "captures" {
                captures = gone;
            }
        }
        const LEAVE: &str = "
            WITH loads AS (DELETE FROM backlog WHERE integration = $1)
            UPDATE integrations SET state = 'moved', spec = NULL, etag = NULL, revision = 0
            WHERE key = $1";
        self.source.count(Effect::None, LEAVE, &[&key]).await?;
        let committed = self.source.batch_execute("COMMIT");
        self.source.commit(Effect::Commit, committed).await?;
        Ok(captures)
    }
}
