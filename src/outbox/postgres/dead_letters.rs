//! Dead letters: listed and counted by the indexes of their integrations; replayed and
//! discarded in transactions that count what they did.

use std::sync::Arc;

use tokio_postgres::Row;

use super::{
    counts::{COUNT, Load, Loads, OTHER_SLOT},
    database::{Call, Database},
    error::damaged,
    news::Changed,
    row::{NAME, RECORD_COLUMNS, RECORDS, events_of, record_of},
    settle::records,
    sql::{Arguments, Columns, Part, arguments},
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{DeadLetter, DeadLetterCount, DeadLetterFilter, OutboxError, Quota, Selection, Taken},
    time::UnixMillis,
};

/// Dead letters that one transaction takes at the most.
const PIECE: usize = 500;

impl Database {
    pub(super) async fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, OutboxError> {
        let selection = Selection::Filter(filter);
        let (picked, parameters) = pick(&selection, after, limit, "true");
        let sql = format!(
            "SELECT d.id, d.event, d.dead_millis, d.bytes, {RECORD_COLUMNS}
             FROM {picked}, {RECORDS} WHERE c.seq = d.seq ORDER BY d.id"
        );
        let rows = self
            .call()
            .await?
            .rows(&sql, &arguments(&parameters))
            .await?;
        let letters = rows.iter().map(|row| {
            let events = events_of(row.get(1));
            Ok(DeadLetter {
                id: row.get(0),
                record: record_of(row, 4)?,
                event: events.iter().next().unwrap_or(EventType::Track),
                time: UnixMillis(row.get(2)),
                payload_bytes: u64::try_from(row.get::<_, i32>(3)).unwrap_or(0),
            })
        });
        letters.collect()
    }

    pub(super) async fn count_dead_letters(
        &self,
        selection: &Selection,
        older_than: UnixMillis,
    ) -> Result<DeadLetterCount, OutboxError> {
        let (picked, parameters) = pick(selection, 0, usize::MAX, "true");
        let sql = format!(
            "SELECT count(*), coalesce(sum(d.bytes), 0)::int8,
                count(*) FILTER (WHERE d.accept_millis < {} AND NOT d.deleted),
                count(*) FILTER (WHERE d.deleted)
             FROM {picked}",
            older_than.0
        );
        let row = self
            .call()
            .await?
            .row(&sql, &arguments(&parameters))
            .await?;
        let number = |place: usize| u64::try_from(row.get::<_, i64>(place)).unwrap_or(0);
        Ok(DeadLetterCount {
            events: number(0),
            bytes: number(1),
            older: number(2),
            former: number(3),
        })
    }

    /// Removes the first of the selected dead letters; returns how many.
    pub(super) async fn discard(&self, selection: &Selection) -> Result<Taken, OutboxError> {
        // Rows of dead letters are locked in no order: a call that removes some has their lanes.
        const SQL: &str = "
            WITH gone AS (DELETE FROM dead_letters WHERE id = ANY ($1) RETURNING integration)
            SELECT i.integration_id, count(*) FROM gone JOIN integrations i ON i.key = integration
            GROUP BY i.key";
        let call = self.call().await?;
        loop {
            let rows = call.first(selection, "true").await?;
            let ids: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
            let lanes: Vec<i64> = rows.iter().map(|row| row.get(4)).collect();
            if ids.is_empty() {
                return Ok(Taken::default());
            }
            let statements: [(&str, Arguments<'_>); 2] = [(LOCK_LANES, &[&lanes]), (SQL, &[&ids])];
            let answers = call.transact(Part::Whole, &statements).await?;
            let mut taken = Taken::default();
            for row in &answers[1] {
                let id = IntegrationId::stored(row.get(0)).ok_or_else(|| damaged("integration"))?;
                taken.add(&id, row.get::<_, i64>(1).cast_unsigned());
            }
            // At 0 another call was faster with these.
            if taken.events() > 0 {
                return Ok(taken);
            }
        }
    }

    /// Queues the first of the selected dead letters again, as far as there is room.
    pub(super) async fn replay(
        &self,
        selection: &Selection,
        now: UnixMillis,
    ) -> Result<Result<Taken, Quota>, OutboxError> {
        let call = self.call().await?;
        loop {
            let rows = call.first(selection, "NOT k.deleted").await?;
            let (ids, lanes) = match self.with_room(&rows) {
                Ok((ids, _)) if ids.is_empty() => return Ok(Ok(Taken::default())),
                Ok(chosen) => chosen,
                Err(quota) => return Ok(Err(quota)),
            };
            let taken = call.requeue(&ids, &lanes, now).await?;
            // At 0 another call was faster with these.
            if taken.events() > 0 {
                return Ok(Ok(taken));
            }
        }
    }

    /// The ids and lanes of those for which there is room; the bound, if that is none.
    fn with_room(&self, rows: &[Row]) -> Result<(Vec<i64>, Vec<i64>), Quota> {
        let counts = self.counts();
        let mut room = counts.room();
        let (mut ids, mut lanes) = (Vec::new(), Vec::new());
        for row in rows {
            match room.take(row.get(1), Load::of(row, 2)) {
                Err(quota) if ids.is_empty() => return Err(quota),
                Err(_) => break,
                Ok(()) => {}
            }
            ids.push(row.get(0));
            lanes.push(row.get(4));
        }
        Ok((ids, lanes))
    }
}

impl Call<'_> {
    /// Id, integration, events, bytes and lane of the first of the selected dead letters.
    async fn first(&self, selection: &Selection, which: &str) -> Result<Vec<Row>, OutboxError> {
        let (picked, parameters) = pick(selection, 0, PIECE, which);
        let sql = format!(
            "SELECT d.id, d.integration, 1::int8, d.bytes::int8, c.lane
             FROM {picked} JOIN captures c ON c.seq = d.seq ORDER BY d.id"
        );
        self.rows(&sql, &arguments(&parameters)).await
    }

    async fn requeue(
        &self,
        ids: &[i64],
        lanes: &[i64],
        now: UnixMillis,
    ) -> Result<Taken, OutboxError> {
        // The lanes first, as settlements and erasures do.
        let sql = format!("{REQUEUE} {RECORD_COLUMNS} {REQUEUE_FROM}");
        let statements: [(&str, Arguments<'_>); 2] = [(LOCK_LANES, &[&lanes]), (&sql, &[&ids])];
        let rows = self.transact(Part::First, &statements).await?.remove(1);
        let (mut loads, mut taken) = (Loads::default(), Taken::default());
        let mut changes = Vec::with_capacity(rows.len());
        for row in &rows {
            let load = Load::of(row, 3);
            loads.add(row.get(0), load);
            let change = replayed_record(row, now)?;
            taken.add(
                &change.1.integration_id,
                u64::try_from(load.events).unwrap_or(0),
            );
            changes.push(change);
        }
        let columns = records(&changes);
        let mut written = arguments(&columns);
        written.push(&now.0);
        self.finish(&loads, &[(REPLAYED, &written)]).await?;
        self.wake_numbers(lanes).await;
        drop(columns);
        self.tell_changes(changes, now);
        Ok(taken)
    }

    /// The last statements of a transaction that has changed the queue; counts, and commits.
    pub(super) async fn finish(
        &self,
        loads: &Loads,
        statements: &[(&str, Arguments<'_>)],
    ) -> Result<(), OutboxError> {
        let columns = loads.columns();
        let mut counted = arguments(&columns);
        counted.push(&self.session.relay);
        counted.push(&OTHER_SLOT);
        let last: [(&str, Arguments<'_>); 1] = [(COUNT, &counted)];
        self.transact(Part::Last, &[statements, &last].concat())
            .await
            .map(drop)
    }
}

/// A subquery `d` of the first selected dead letters after an id, in the order of their ids,
/// and its parameters. What moves to another database is left alone; `which` is a condition
/// on the integration `k`.
fn pick<'a>(
    selection: &'a Selection,
    after: i64,
    limit: usize,
    which: &str,
) -> (String, Columns<'a>) {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut parameters: Columns<'_> = vec![Box::new(after), Box::new(limit)];
    let (integrations, condition) = match selection {
        Selection::Ids { ids, integrations } => {
            parameters.push(Box::new(ids));
            (integrations, "d.id > $1 AND d.id = ANY ($3)")
        }
        Selection::Filter(filter) => {
            parameters.push(Box::new(filter.reason.map(i32::from)));
            parameters.push(Box::new(filter.start.map(|time| time.0)));
            parameters.push(Box::new(filter.end.map(|time| time.0)));
            let condition = "d.id > $1 AND ($3::int4 IS NULL OR d.reason = $3)
                AND ($4::int8 IS NULL OR d.dead_millis >= $4)
                AND ($5::int8 IS NULL OR d.dead_millis < $5)";
            (&filter.integrations, condition)
        }
    };
    let Some(ids) = integrations else {
        let sql = format!(
            "(SELECT d.*, k.deleted FROM dead_letters d JOIN integrations k ON k.key = d.integration
                WHERE k.state = 'active' AND {which} AND {condition} ORDER BY d.id LIMIT $2) AS d"
        );
        return (sql, parameters);
    };
    let ids: Vec<&str> = ids.iter().map(|id| id.name()).collect();
    parameters.push(Box::new(ids));
    // Each integration's own rows, by its index.
    let sql = format!(
        "(SELECT own.*, k.deleted FROM integrations k, LATERAL (
            SELECT * FROM dead_letters d WHERE d.integration = k.key AND {condition}
            ORDER BY d.integration, d.id LIMIT $2) AS own
            WHERE k.state = 'active' AND {which} AND {NAME} = ANY (${}::text[])
            ORDER BY own.id LIMIT $2) AS d",
        parameters.len()
    );
    (sql, parameters)
}

/// The record of a replayed capture from now on, with the events that have changed.
fn replayed_record(row: &Row, now: UnixMillis) -> Result<Changed, OutboxError> {
    let mut record = record_of(row, 5)?;
    record.queue_time = now;
    let changed = events_of(row.get(2));
    for event in changed.iter() {
        record.event_mut(event).replay();
    }
    Ok((row.get(1), Arc::new(record), changed))
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
const REQUEUE_FROM: &str = "
    FROM letters l JOIN captures c ON c.seq = l.seq
    JOIN integrations i ON i.key = c.integration ORDER BY c.seq";

const REPLAYED: &str = "
    UPDATE captures c SET identify = i.identify, track = i.track, queue_millis = $4
    FROM unnest($1::int8[], $2::bytea[], $3::bytea[]) AS i (seq, identify, track)
    WHERE c.seq = i.seq";
