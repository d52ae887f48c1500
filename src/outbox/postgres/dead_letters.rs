//! Dead letters: listed and counted by the indexes of their integrations; replayed and
//! discarded in transactions that count what they did.

use std::{collections::HashMap, sync::Arc};

use tokio_postgres::{Row, types::ToSql};

use super::{
    READ,
    accept::{COUNT, OTHER_SLOT, columns},
    connect::Connection,
    counts::Load,
    database::{Database, Session},
    error::Effect,
    row::{RECORD_COLUMNS, event_number, event_of, record_of},
    settle::{Changed, statuses},
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{
        DeadLetter, DeadLetterCount, DeadLetterFilter, EventSet, OutboxError, Quota, Selection,
    },
    time::UnixMillis,
};

/// Dead letters that one transaction takes at the most.
const PIECE: i64 = 500;

type Parameters = Vec<Box<dyn ToSql + Sync + Send>>;

/// A subquery `d` of the first selected dead letters, in the order of their ids.
struct Picked {
    sql: String,
    parameters: Parameters,
}

impl Picked {
    fn parameters(&self) -> Vec<&(dyn ToSql + Sync)> {
        let each = self.parameters.iter();
        each.map(|one| &**one as &(dyn ToSql + Sync)).collect()
    }
}

impl Database {
    pub(super) async fn dead_letters(
        &self,
        filter: &DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        let selection = Selection::Filter(filter.clone());
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let picked = self.pick(&session, &connection, &selection, after, limit);
        let Some(picked) = picked.await? else {
            return Ok(Vec::new());
        };
        let sql = format!(
            "SELECT d.id, d.event, d.dead_millis, d.bytes, d.integration, {RECORD_COLUMNS}
             FROM {} JOIN captures c ON c.seq = d.seq ORDER BY d.id",
            picked.sql
        );
        let parameters = picked.parameters();
        let rows = connection.rows(READ, &sql, &parameters).await?;
        let keys = rows.iter().map(|row| row.get(4));
        self.learn_ids(&session, &connection, keys).await?;
        let letters = rows.iter().filter_map(|row| {
            let id = session.id(row.get(4))?;
            Some(record_of(id, row, 5).map(|record| DeadLetter {
                id: row.get(0),
                record,
                event: event_of(row.get(1)),
                time: UnixMillis(row.get(2)),
                payload_bytes: u64::try_from(row.get::<_, i32>(3)).unwrap_or(0),
            }))
        });
        letters.collect()
    }

    pub(super) async fn count_dead_letters(
        &self,
        selection: &Selection,
        older_than: UnixMillis,
    ) -> Result<DeadLetterCount, OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        let picked = self.pick(&session, &connection, selection, 0, i64::MAX);
        let Some(picked) = picked.await? else {
            return Ok(DeadLetterCount::default());
        };
        let sql = format!(
            "SELECT count(*), coalesce(sum(d.bytes), 0)::int8,
                count(*) FILTER (WHERE d.accept_millis < {})
             FROM {}",
            older_than.0, picked.sql
        );
        let parameters = picked.parameters();
        let row = connection.row(READ, &sql, &parameters).await?;
        let number = |place: usize| u64::try_from(row.get::<_, i64>(place)).unwrap_or(0);
        Ok(DeadLetterCount {
            events: number(0),
            bytes: number(1),
            older: number(2),
        })
    }

    /// Removes the first of the selected dead letters; returns how many.
    pub(super) async fn discard(&self, selection: &Selection) -> Result<u64, OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        let picked = self.pick(&session, &connection, selection, 0, PIECE);
        let Some(picked) = picked.await? else {
            return Ok(0);
        };
        let sql = format!(
            "DELETE FROM dead_letters WHERE id IN (SELECT d.id FROM {})",
            picked.sql
        );
        let parameters = picked.parameters();
        connection.count(Effect::Commit, &sql, &parameters).await
    }

    /// Queues the first of the selected dead letters again, as far as there is room.
    pub(super) async fn replay(
        &self,
        selection: &Selection,
        now: UnixMillis,
    ) -> Result<Result<u64, Quota>, OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        let picked = self.pick(&session, &connection, selection, 0, PIECE);
        let Some(picked) = picked.await? else {
            return Ok(Ok(0));
        };
        let sql = format!(
            "SELECT d.id, d.integration, d.bytes, c.lane
             FROM {} JOIN captures c ON c.seq = d.seq ORDER BY d.id",
            picked.sql
        );
        let parameters = picked.parameters();
        let rows = connection.rows(READ, &sql, &parameters).await?;
        let (ids, mut lanes) = match self.with_room(&rows) {
            Ok(chosen) => chosen,
            Err(quota) => return Ok(Err(quota)),
        };
        if ids.is_empty() {
            return Ok(Ok(0));
        }
        lanes.sort_unstable();
        lanes.dedup();
        let replayed = self
            .requeue(&session, &connection, &ids, &lanes, now)
            .await?;
        Ok(Ok(replayed))
    }

    /// The ids and lanes of those for which there is room; the bound, if that is none.
    fn with_room(&self, rows: &[Row]) -> Result<(Vec<i64>, Vec<i64>), Quota> {
        let counts = self.counts();
        let (mut own, mut all) = (HashMap::<i64, Load>::new(), Load::default());
        let (mut ids, mut lanes) = (Vec::new(), Vec::new());
        for row in rows {
            let load = Load {
                events: 1,
                bytes: row.get::<_, i32>(2).into(),
            };
            let integration = row.get(1);
            let own = own.entry(integration).or_default();
            own.add(load);
            all.add(load);
            if let Some(quota) = counts.full(integration, *own, all) {
                return if ids.is_empty() {
                    Err(quota)
                } else {
                    Ok((ids, lanes))
                };
            }
            ids.push(row.get(0));
            lanes.push(row.get(3));
        }
        Ok((ids, lanes))
    }

    async fn requeue(
        &self,
        session: &Session,
        connection: &Connection,
        ids: &[i64],
        lanes: &[i64],
        now: UnixMillis,
    ) -> Result<u64, OutboxError> {
        connection.begin().await?;
        // The lanes first, as settlements and erasures do.
        connection.count(READ, LOCK_LANES, &[&lanes]).await?;
        let sql = format!("{REQUEUE} {RECORD_COLUMNS} {REQUEUE_FROM}");
        let rows = connection.rows(READ, &sql, &[&ids]).await?;
        let keys = rows.iter().map(|row| row.get(0));
        self.learn_ids(session, connection, keys).await?;
        let mut loads = HashMap::<i64, Load>::new();
        let mut replayed = 0;
        for row in &rows {
            let load = Load {
                events: row.get(3),
                bytes: row.get(4),
            };
            replayed += load.events;
            loads.entry(row.get(0)).or_default().add(load);
        }
        let changes = replayed_records(session, &rows, now)?;
        let seqs: Vec<i64> = changes.iter().map(|(seq, ..)| *seq).collect();
        let identify = statuses(&changes, EventType::Identify);
        let track = statuses(&changes, EventType::Track);
        let (keys, events, bytes) = columns(&loads);
        let work = async {
            connection
                .execute(REPLAYED, &[&seqs, &identify, &track, &now.0])
                .await?;
            connection
                .execute(
                    COUNT,
                    &[&session.relay, &keys, &events, &bytes, &OTHER_SLOT],
                )
                .await?;
            connection.batch_execute("COMMIT").await
        };
        connection.commit(Effect::Commit, work).await?;
        let lanes = lanes.iter().filter_map(|lane| session.lane_key(*lane));
        self.tell_lanes(session, lanes);
        self.tell_changes(session, changes, now);
        Ok(u64::try_from(replayed).unwrap_or(0))
    }

    /// The selection as SQL; `None` where it names integrations that are not here.
    async fn pick(
        &self,
        session: &Session,
        connection: &Connection,
        selection: &Selection,
        after: i64,
        limit: i64,
    ) -> Result<Option<Picked>, OutboxError> {
        let integrations = match selection {
            Selection::Filter(filter) => &filter.integrations,
            Selection::Ids { integrations, .. } => integrations,
        };
        let keys = match integrations {
            None => None,
            Some(ids) => Some(self.keys_of(session, connection, ids).await?),
        };
        if keys.as_ref().is_some_and(Vec::is_empty) {
            return Ok(None);
        }
        let mut parameters: Parameters = vec![Box::new(after), Box::new(limit)];
        // What moves to another database is left alone.
        let mut conditions = String::from(
            "d.id > $1 AND EXISTS (SELECT 1 FROM integrations i
                WHERE i.key = d.integration AND i.state = 'active')",
        );
        match selection {
            Selection::Ids { ids, .. } => {
                parameters.push(Box::new(ids.clone()));
                conditions.push_str(" AND d.id = ANY ($3)");
            }
            Selection::Filter(filter) => {
                parameters.push(Box::new(filter.reason.map(i32::from)));
                parameters.push(Box::new(filter.start.map(|time| time.0)));
                parameters.push(Box::new(filter.end.map(|time| time.0)));
                conditions.push_str(
                    " AND ($3::int4 IS NULL OR d.reason = $3)
                      AND ($4::int8 IS NULL OR d.dead_millis >= $4)
                      AND ($5::int8 IS NULL OR d.dead_millis < $5)",
                );
            }
        }
        let sql = match keys {
            None => format!(
                "(SELECT * FROM dead_letters d WHERE {conditions} ORDER BY d.id LIMIT $2) AS d"
            ),
            Some(keys) => {
                parameters.push(Box::new(keys));
                let place = parameters.len();
                // Each integration's own rows, by its index.
                format!(
                    "(SELECT own.* FROM unnest(${place}::int8[]) AS k (key), LATERAL (
                        SELECT * FROM dead_letters d WHERE d.integration = k.key AND {conditions}
                        ORDER BY d.integration, d.id LIMIT $2) AS own
                        ORDER BY own.id LIMIT $2) AS d"
                )
            }
        };
        Ok(Some(Picked { sql, parameters }))
    }

    async fn keys_of(
        &self,
        session: &Session,
        connection: &Connection,
        ids: &[IntegrationId],
    ) -> Result<Vec<i64>, OutboxError> {
        let ids: Vec<&IntegrationId> = ids.iter().collect();
        self.find_keys(session, connection, &ids).await?;
        Ok(ids.into_iter().filter_map(|id| session.key(id)).collect())
    }
}

/// The records of replayed captures from now on, with the events that have changed.
fn replayed_records(
    session: &Session,
    rows: &[Row],
    now: UnixMillis,
) -> Result<Vec<Changed>, OutboxError> {
    let mut changes = Vec::with_capacity(rows.len());
    for row in rows {
        let Some(id) = session.id(row.get(0)) else {
            continue;
        };
        let events: i16 = row.get(2);
        let mut record = record_of(id, row, 5)?;
        record.queue_time = now;
        let of = |event: &EventType| events & event_number(*event) != 0;
        let changed: EventSet = EventType::ALL.into_iter().filter(of).collect();
        for event in changed.iter() {
            record.event_mut(event).replay();
        }
        changes.push((row.get(1), Arc::new(record), changed));
    }
    Ok(changes)
}

/// Locks lanes in their order.
pub(super) const LOCK_LANES: &str =
    "SELECT 1 FROM lanes WHERE lane = ANY ($1) ORDER BY lane FOR UPDATE";

const REQUEUE: &str = "
    WITH gone AS (
        DELETE FROM dead_letters WHERE id = ANY ($1) RETURNING seq, event, bytes, payload
    ), letters AS MATERIALIZED (
        SELECT g.seq, c.lane, sum(g.event)::int2 AS events, count(*) AS count,
            sum(g.bytes)::int8 AS bytes,
            coalesce(max(g.bytes) FILTER (WHERE g.event = 1), 0) AS identify_bytes,
            coalesce(max(g.bytes) FILTER (WHERE g.event = 2), 0) AS track_bytes,
            (array_agg(g.payload) FILTER (WHERE g.event = 1))[1] AS identify,
            (array_agg(g.payload) FILTER (WHERE g.event = 2))[1] AS track
        FROM gone g JOIN captures c ON c.seq = g.seq GROUP BY g.seq, c.lane
    ), merged AS (
        UPDATE queue q SET identify = coalesce(l.identify, q.identify),
            track = coalesce(l.track, q.track),
            identify_bytes = CASE WHEN l.events & 1 = 0 THEN q.identify_bytes
                ELSE l.identify_bytes END,
            track_bytes = CASE WHEN l.events & 2 = 0 THEN q.track_bytes ELSE l.track_bytes END
        FROM letters l
        WHERE q.lane = l.lane AND q.replayed IN (false, true) AND q.seq = l.seq
        RETURNING q.seq
    ), added AS (
        INSERT INTO queue (lane, replayed, seq, identify_bytes, track_bytes, identify, track)
        SELECT lane, true, seq, identify_bytes, track_bytes, identify, track FROM letters
        WHERE seq NOT IN (SELECT seq FROM merged)
    )
    SELECT c.integration, c.seq, l.events, l.count, l.bytes,";
const REQUEUE_FROM: &str = "FROM letters l JOIN captures c ON c.seq = l.seq ORDER BY c.seq";

const REPLAYED: &str = "
    UPDATE captures c SET identify = i.identify, track = i.track, queue_millis = $4
    FROM unnest($1::int8[], $2::bytea[], $3::bytea[]) AS i (seq, identify, track)
    WHERE c.seq = i.seq";
