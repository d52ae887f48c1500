//! Moves an integration to another database: all rows with their numbers, in one transaction
//! on each side. The target commits first, so that nothing is lost in between; a repetition
//! finishes what was interrupted.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{SinkExt, StreamExt};
use tokio_postgres::{Row, types::ToSql};

use super::{
    PostgresConnection, PostgresError,
    connect::Connector,
    error::{Effect, damaged, in_database},
    row::{NAME, id_of},
    schema::check,
    sql::{Arguments, Connection, Part},
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
    // None where there is but an empty row of its name.
    const STATE: &str = "
        SELECT state FROM integrations i WHERE integration_id = $1
            AND (state = 'arriving' OR spec IS NOT NULL
                OR EXISTS (SELECT 1 FROM captures c WHERE c.integration = i.key))";
    let refused = |text: String| Err(PostgresError::Move(text));
    let count = connection.urls.len();
    if to >= count {
        return refused(format!(
            "there is no database {to}: [postgres] urls names {count}"
        ));
    }
    let (mut databases, mut states) = (Vec::new(), Vec::new());
    let id = &current(connection, id).await?;
    for place in 0..count {
        let connector = Connector::new(connection, place)?;
        let found = in_database(place, connector.get().await)?;
        check(&found, place, connection).await?;
        let state = found.optional(STATE, &[&id.as_str()]).await;
        let state: Option<String> = in_database(place, state)?.map(|row| row.get(0));
        states.push(state.unwrap_or_default());
        databases.push(found);
    }
    let mut others = (0..count).filter(|place| *place != to);
    if let Some(other) = others.clone().find(|place| states[*place] == "arriving") {
        return refused(format!(
            "a move of {id} to database {other} was interrupted; repeat it with --to {other} first"
        ));
    }
    let from = others.find(|place| matches!(states[*place].as_str(), "active" | "leaving"));
    let target = &databases[to];
    let mut captures = 0;
    if let Some(from) = from {
        let source = &databases[from];
        let key = in_database(from, close(source, id).await)?;
        let moving = Move {
            key,
            source,
            target,
        };
        in_database(to, moving.make_room(id).await)?;
        captures = in_database(to, moving.copy(&mut progress).await)?;
    } else if states[to].is_empty() {
        return refused(format!("there is no integration {id}"));
    }
    // Without a source it is here already, or all but open: an earlier run was interrupted.
    in_database(to, open(target, id).await)?;
    Ok(captures)
}

/// The integration of a name, of all its incarnations.
async fn current(
    connection: &PostgresConnection,
    name: &IntegrationId,
) -> Result<IntegrationId, PostgresError> {
    let sql =
        format!("SELECT integration_id FROM integrations WHERE {NAME} = $1 AND spec IS NOT NULL");
    for place in 0..connection.urls.len() {
        let connector = Connector::new(connection, place)?;
        let found = in_database(place, connector.get().await)?;
        check(&found, place, connection).await?;
        let row = found.optional(&sql, &[&name.name()]).await;
        if let Some(row) = in_database(place, row)? {
            return in_database(place, id_of(&row, 0));
        }
    }
    Ok(name.clone())
}

/// Lets the integration take captures and leases there.
async fn open(target: &Connection, id: &IntegrationId) -> Result<(), OutboxError> {
    const SQL: &str = "
        WITH counted AS (UPDATE integration_changes SET count = count + 1)
        UPDATE integrations SET state = 'active'
        WHERE integration_id = $1 AND state IN ('arriving', 'leaving')";
    target.apply(SQL, &[&id.as_str()]).await.map(drop)
}

/// Lets the source take no more captures and begin no more leases, and waits for what is
/// under way; returns the integration's key.
async fn close(source: &Connection, id: &IntegrationId) -> Result<i64, OutboxError> {
    const CLOSE: &str = "
        WITH counted AS (UPDATE integration_changes SET count = count + 1)
        UPDATE integrations SET state = 'leaving'
        WHERE integration_id = $1 AND state IN ('active', 'leaving')";
    // All that write now have begun before this; later ones see the new state.
    const NOW: &str = "
        SELECT key, pg_snapshot_xmax(pg_current_snapshot())::text FROM integrations
        WHERE integration_id = $1";
    const DONE: &str = "
        SELECT pg_snapshot_xmin(pg_current_snapshot()) >= $1::text::xid8 AND NOT EXISTS (
            SELECT 1 FROM lanes WHERE lane >= $2::int8 * 8 AND lane < ($2::int8 + 1) * 8
                AND busy AND expires > clock_timestamp())";
    let name = id.as_str();
    source.apply(CLOSE, &[&name]).await?;
    let now = source.row(NOW, &[&name]).await?;
    let (key, transaction): (i64, String) = (now.get(0), now.get(1));
    let begun = Instant::now();
    while !source
        .row(DONE, &[&transaction, &key])
        .await?
        .get::<_, bool>(0)
    {
        if begun.elapsed() > MAX_WAIT {
            let text = "transactions or requests of the integration do not end".to_owned();
            return Err(OutboxError::Unavailable(text));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(key)
}

struct Move<'a> {
    key: i64,
    source: &'a Connection,
    target: &'a Connection,
}

impl Move<'_> {
    /// The integration's row and its lanes in the target. An empty row of its name goes.
    async fn make_room(&self, id: &IntegrationId) -> Result<(), OutboxError> {
        const TAKEN: &str = "
            SELECT 1 FROM integrations i WHERE i.integration_id = $1 AND i.key <> $2
                AND (i.spec IS NOT NULL
                    OR EXISTS (SELECT 1 FROM captures c WHERE c.integration = i.key))";
        const SPEC: &str = "
            SELECT revision, etag, spec, deleted FROM integrations WHERE key = $1";
        // A separate statement, before the row that takes its name.
        const EMPTY: &str = "DELETE FROM integrations WHERE integration_id = $1 AND key <> $2";
        const ROW: &str = "
            WITH lanes AS (
                INSERT INTO lanes (lane) SELECT $2::int8 * 8 + n FROM generate_series(0, 7) AS n
                ON CONFLICT (lane) DO NOTHING
            )
            INSERT INTO integrations (key, integration_id, state, revision, etag, spec, deleted)
            VALUES ($2, $1, 'arriving', $3, $4, $5, $6)
            ON CONFLICT (key) DO UPDATE SET state = 'arriving', revision = excluded.revision,
                etag = excluded.etag, spec = excluded.spec, deleted = excluded.deleted";
        let (name, key) = (id.as_str(), self.key);
        if self.target.optional(TAKEN, &[&name, &key]).await?.is_some() {
            let text = "the target has another integration of this name, with captures";
            return Err(OutboxError::Unavailable(text.to_owned()));
        }
        let row = self.source.row(SPEC, &[&key]).await?;
        let (revision, etag): (i64, Option<&str>) = (row.get(0), row.get(1));
        let (spec, deleted): (Option<&[u8]>, bool) = (row.get(2), row.get(3));
        self.target.apply(EMPTY, &[&name, &key]).await?;
        let values: [&(dyn ToSql + Sync); 6] = [&name, &key, &revision, &etag, &spec, &deleted];
        self.target.apply(ROW, &values).await.map(drop)
    }

    /// Copies all rows into the target and removes them from the source; returns how many
    /// captures that were. The source's transaction fails where a row has changed meanwhile.
    async fn copy(&self, progress: &mut impl FnMut(u64, u64)) -> Result<u64, OutboxError> {
        const LOCK: &str = "SELECT state FROM integrations WHERE key = $1 FOR UPDATE";
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
        let (source, target) = (self.source, self.target);
        let isolation = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ";
        source.transact(Part::First, &[(isolation, &[])]).await?;
        target.begin().await?;
        for connection in [source, target] {
            for setting in ["statement_timeout", "idle_in_transaction_session_timeout"] {
                connection
                    .rows(&format!("SET LOCAL {setting} = 0"), &[])
                    .await?;
            }
        }
        let total = self.long(source, COUNT).await?;
        let total = total.first().map_or(0, |row| row.get::<_, i64>(0));
        // One run at a time, and only between the states that it has found.
        for (connection, state) in [(source, "leaving"), (target, "arriving")] {
            if connection.row(LOCK, &[&self.key]).await?.get::<_, &str>(0) != state {
                let text = "another run moves the integration".to_owned();
                return Err(OutboxError::Unavailable(text));
            }
        }
        let mut copied = 0;
        for (table, columns, condition) in TABLES {
            // What an interrupted run has left.
            let left = format!("DELETE FROM {table} WHERE {condition}");
            self.long(target, &left).await?;
            copied += self.copy_table(table, columns, condition).await?;
            progress(copied, u64::try_from(total).unwrap_or(0));
        }
        self.long(target, ARRIVE).await?;
        target.row(LEAP, &[]).await?;
        target.commit().await?;
        self.clear_source().await
    }

    /// Removes what the target has now, in the transaction that has read it.
    async fn clear_source(&self) -> Result<u64, OutboxError> {
        const LEAVE: &str = "
            WITH loads AS (DELETE FROM backlog WHERE integration = $1)
            UPDATE integrations SET state = 'moved', spec = NULL, etag = NULL, revision = 0
            WHERE key = $1";
        let mut gone = Vec::new();
        for (table, _, condition) in TABLES {
            let sql = format!(
                "WITH gone AS (DELETE FROM {table} WHERE {condition} RETURNING 1)
                 SELECT count(*) FROM gone"
            );
            gone.extend(self.long(self.source, &sql).await?);
        }
        let captures = gone.first().ok_or_else(|| damaged("answer"))?;
        let captures: i64 = captures.get(0);
        let leave: [(&str, Arguments<'_>); 1] = [(LEAVE, &[&self.key])];
        self.source.transact(Part::Last, &leave).await?;
        Ok(u64::try_from(captures).unwrap_or(0))
    }

    /// A statement that may take long; `$` in it is the key.
    async fn long(&self, connection: &Connection, sql: &str) -> Result<Vec<Row>, OutboxError> {
        let sql = sql.replace('$', &self.key.to_string());
        let work = connection.query(&sql, &[]);
        connection.run_for(COPY_LIMIT, Effect::None, work).await
    }

    async fn copy_table(
        &self,
        table: &str,
        columns: &str,
        condition: &str,
    ) -> Result<u64, OutboxError> {
        let condition = condition.replace('$', &self.key.to_string());
        let from = format!(
            "COPY (SELECT {columns} FROM {table} WHERE {condition}) TO STDOUT (FORMAT binary)"
        );
        let into = format!("COPY {table} ({columns}) FROM STDIN (FORMAT binary)");
        let work = async {
            let mut rows = pin!(self.source.copy_out(&from).await?);
            let mut sink = pin!(self.target.copy_in::<_, bytes::Bytes>(&into).await?);
            while let Some(piece) = rows.next().await {
                sink.send(piece?).await?;
            }
            sink.finish().await
        };
        self.target.run_for(COPY_LIMIT, Effect::None, work).await
    }
}

const COUNT: &str = "
    SELECT (SELECT count(*) FROM captures WHERE integration = $)
        + (SELECT count(*) FROM queue WHERE lane >= $ * 8 AND lane < ($ + 1) * 8)
        + (SELECT count(*) FROM dead_letters WHERE integration = $)";

const ARRIVE: &str = "
    WITH gone AS (DELETE FROM backlog WHERE integration = $ AND relay <> 0)
    INSERT INTO backlog (integration, relay, slot, events, bytes)
    SELECT $, 0, 0, count(identify) + count(track),
        coalesce(sum(CASE WHEN identify IS NULL THEN 0 ELSE identify_bytes END
            + CASE WHEN track IS NULL THEN 0 ELSE track_bytes END), 0)
    FROM queue WHERE lane >= $ * 8 AND lane < ($ + 1) * 8
    ON CONFLICT (integration, relay, slot) DO UPDATE
    SET events = excluded.events, bytes = excluded.bytes";
