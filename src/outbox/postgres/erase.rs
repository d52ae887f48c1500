//! A person's data: found by the index of subjects, erased in transactions that count it.

use std::{collections::HashMap, sync::Arc, sync::atomic::Ordering, time::Duration};

use tokio_postgres::Row;

use super::{
    READ,
    accept::{COUNT, OTHER_SLOT, columns},
    connect::Connection,
    counts::Load,
    database::{Database, Session},
    dead_letters::LOCK_LANES,
    error::Effect,
    row::{RECORD_COLUMNS, record_of},
    settle::statuses,
};
use crate::{
    event::EventType,
    outbox::{Erasure, FoundSubject, LaneKey, OutboxError, SubjectQuery},
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
};

/// Captures of one search at the most.
const MAX_FOUND: i64 = 100_000;
/// How often it is looked whether requests of a lane have ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Longest wait for them; leases are shorter.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// What a transaction has erased.
#[derive(Default)]
struct Erased {
    changes: Vec<super::settle::Changed>,
    loads: HashMap<i64, Load>,
    counts: ErasureReceipt,
}

impl Database {
    pub(super) async fn find_subject(
        &self,
        query: &SubjectQuery,
    ) -> Result<FoundSubject, OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        let (subjects, key) = self.subject(&session, &connection, query).await?;
        const SQL: &str = "
            SELECT c.seq, c.lane, c.integration FROM captures c
            WHERE c.subject = ANY ($1) AND ($2::int8 IS NULL OR c.integration = $2)
            ORDER BY c.seq LIMIT $3";
        let rows = connection
            .rows(READ, SQL, &[&subjects, &key, &MAX_FOUND])
            .await?;
        let keys = rows.iter().map(|row| row.get(2));
        self.learn_ids(&session, &connection, keys).await?;
        // All lanes: a dead letter may be replayed into its lane at any time.
        let mut lanes: Vec<LaneKey> = rows
            .iter()
            .filter_map(|row| session.lane_key(row.get(1)))
            .collect();
        lanes.sort_unstable();
        lanes.dedup();
        Ok(FoundSubject {
            captures: rows.iter().map(|row| row.get(0)).collect(),
            lanes,
        })
    }

    /// The blinded subjects and the key of the only integration.
    async fn subject(
        &self,
        session: &Session,
        connection: &Connection,
        query: &SubjectQuery,
    ) -> Result<(Vec<i64>, Option<i64>), OutboxError> {
        let subjects = query.user_ids.iter().map(|id| session.sealing.subject(id));
        let subjects = subjects.collect();
        let Some(id) = &query.integration_id else {
            return Ok((subjects, None));
        };
        self.find_keys(session, connection, &[id]).await?;
        // Nothing has the key of an integration that is not here.
        Ok((subjects, Some(session.key(id).unwrap_or(-1))))
    }

    /// Erases those of the captures that are here; adds to the receipt what it erased.
    /// `is_last`: the receipt is stored here also where nothing is erased.
    pub(super) async fn erase(
        &self,
        erasure: &Erasure,
        receipt: &mut ErasureReceipt,
        is_last: bool,
    ) -> Result<(), OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        let subject = self.subject(&session, &connection, &erasure.subject);
        let (subjects, key) = subject.await?;
        const LANES: &str = "
            SELECT DISTINCT lane FROM captures
            WHERE seq = ANY ($1) AND subject = ANY ($2)
                AND ($3::int8 IS NULL OR integration = $3)";
        let lanes = connection
            .rows(READ, LANES, &[&erasure.captures, &subjects, &key])
            .await?;
        let lanes: Vec<i64> = lanes.iter().map(|row| row.get(0)).collect();
        if lanes.is_empty() && !is_last {
            return Ok(());
        }
        self.lock_idle(&session, &connection, &lanes).await?;
        let sql = format!("{REMOVE} {RECORD_COLUMNS} {REMOVE_FROM}");
        let rows = connection
            .rows(READ, &sql, &[&erasure.captures, &subjects, &key])
            .await?;
        let keys = rows.iter().map(|row| row.get(0));
        self.learn_ids(&session, &connection, keys).await?;
        let erased = erased(&session, &rows)?;
        self.store_receipt(&session, &connection, &erased.counts, receipt)
            .await?;
        self.finish(&session, &connection, &erased, &lanes).await?;
        self.vacuum.store(true, Ordering::Release);
        let lanes = lanes.iter().filter_map(|lane| session.lane_key(*lane));
        self.tell_lanes(&session, lanes);
        self.tell_changes(&session, erased.changes, UnixMillis::now());
        Ok(())
    }

    /// Begins a transaction that holds the lanes while no request of another relay carries
    /// their events. This relay's own requests have ended: its caller holds the lanes.
    async fn lock_idle(
        &self,
        session: &Session,
        connection: &Connection,
        lanes: &[i64],
    ) -> Result<(), OutboxError> {
        // Lets no new lease begin, also while nothing holds the rows.
        const BLOCK: &str = "
            UPDATE lanes SET blocked_until = clock_timestamp() + interval '30 seconds'
            WHERE lane IN (SELECT lane FROM lanes WHERE lane = ANY ($1) ORDER BY lane FOR UPDATE)";
        const BUSY: &str = "
            SELECT EXISTS (SELECT 1 FROM lanes WHERE lane = ANY ($1)
                AND busy AND holder <> $2 AND expires > clock_timestamp())";
        let begun = std::time::Instant::now();
        loop {
            connection.count(READ, BLOCK, &[&lanes]).await?;
            connection.begin().await?;
            connection.count(READ, LOCK_LANES, &[&lanes]).await?;
            let busy = connection
                .row(READ, BUSY, &[&lanes, &session.relay])
                .await?;
            if !busy.get::<_, bool>(0) {
                return Ok(());
            }
            let rolled_back = connection.batch_execute("ROLLBACK");
            connection.commit(READ, rolled_back).await?;
            if begun.elapsed() > MAX_WAIT {
                return Err(OutboxError::Unavailable(
                    "requests that carry the person's events do not end".to_owned(),
                ));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Stores the part of the receipt that this database has.
    async fn store_receipt(
        &self,
        session: &Session,
        connection: &Connection,
        counts: &ErasureReceipt,
        receipt: &mut ErasureReceipt,
    ) -> Result<(), OutboxError> {
        if receipt.receipt_id.is_empty() {
            let row = connection.row(READ, NEXT_RECEIPT, &[]).await?;
            receipt.receipt_id = row.get::<_, i64>(0).to_string();
        }
        let id: i64 = receipt.receipt_id.parse().unwrap_or(0);
        let found = connection
            .optional(READ, "SELECT receipt FROM receipts WHERE id = $1", &[&id])
            .await?;
        let mut part = match found {
            Some(row) => session
                .sealing
                .open_receipt(&receipt.receipt_id, row.get(0))?,
            None => ErasureReceipt::default(),
        };
        add_counts(&mut part, counts);
        add_counts(receipt, counts);
        let part = ErasureReceipt {
            waiting_event_count: part.waiting_event_count,
            dead_letter_count: part.dead_letter_count,
            payload_count: part.payload_count,
            attempt_count: part.attempt_count,
            ..receipt.clone()
        };
        let sealed = session.sealing.receipt(&part)?;
        const SQL: &str = "
            INSERT INTO receipts (id, receipt) VALUES ($1, $2)
            ON CONFLICT (id) DO UPDATE SET receipt = excluded.receipt";
        connection.count(READ, SQL, &[&id, &sealed]).await.map(drop)
    }

    /// Stores a receipt under a new id.
    pub(super) async fn add_receipt(&self, receipt: &ErasureReceipt) -> Result<(), OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        let mut receipt = receipt.clone();
        let counts = ErasureReceipt::default();
        self.store_receipt(&session, &connection, &counts, &mut receipt)
            .await
    }

    /// Writes the records without history, counts, lets the lanes go on, and commits.
    async fn finish(
        &self,
        session: &Session,
        connection: &Connection,
        erased: &Erased,
        lanes: &[i64],
    ) -> Result<(), OutboxError> {
        const GO_ON: &str = "UPDATE lanes SET blocked_until = NULL WHERE lane = ANY ($1)";
        let seqs: Vec<i64> = erased.changes.iter().map(|(seq, ..)| *seq).collect();
        let identify = statuses(&erased.changes, EventType::Identify);
        let track = statuses(&erased.changes, EventType::Track);
        let (keys, events, bytes) = columns(&erased.loads);
        let work = async {
            connection
                .execute(RECORDS, &[&seqs, &identify, &track])
                .await?;
            connection
                .execute(
                    COUNT,
                    &[&session.relay, &keys, &events, &bytes, &OTHER_SLOT],
                )
                .await?;
            connection.execute(GO_ON, &[&lanes]).await?;
            connection.batch_execute("COMMIT").await
        };
        connection.commit(Effect::Commit, work).await
    }
}

/// What the removed rows come to.
fn erased(session: &Session, rows: &[Row]) -> Result<Erased, OutboxError> {
    let mut erased = Erased::default();
    for row in rows {
        let integration: i64 = row.get(0);
        let (waited, bytes, dead): (i64, i64, i64) = (row.get(2), row.get(3), row.get(4));
        let Some(id) = session.id(integration) else {
            continue;
        };
        let mut record: CaptureRecord = record_of(id, row, 5)?;
        let number = |count: i64| u64::try_from(count).unwrap_or(0);
        let counts = &mut erased.counts;
        counts.attempt_count += record.attempts.len() as u64;
        counts.waiting_event_count += number(waited);
        counts.dead_letter_count += number(dead);
        counts.payload_count += number(waited + dead);
        let load = Load {
            events: -waited,
            bytes: -bytes,
        };
        erased.loads.entry(integration).or_default().add(load);
        let changed = record.forget_history().into_iter().collect();
        erased.changes.push((row.get(1), Arc::new(record), changed));
    }
    Ok(erased)
}

/// Adds the counts of one receipt to those of another.
pub(super) fn add_counts(sum: &mut ErasureReceipt, more: &ErasureReceipt) {
    sum.waiting_event_count += more.waiting_event_count;
    sum.dead_letter_count += more.dead_letter_count;
    sum.payload_count += more.payload_count;
    sum.attempt_count += more.attempt_count;
}

const RECORDS: &str = "
    UPDATE captures c SET subject = NULL, attempts = NULL, identify = i.identify, track = i.track
    FROM unnest($1::int8[], $2::bytea[], $3::bytea[]) AS i (seq, identify, track)
    WHERE c.seq = i.seq";

/// Ids in the order of time, also among databases: milliseconds, then a sequence.
const NEXT_RECEIPT: &str = "
    SELECT ((extract(epoch FROM clock_timestamp()) * 1000)::int8 << 21)
        | (nextval('receipt_seq') & 2097151)";

const REMOVE: &str = "
    WITH c AS MATERIALIZED (
        SELECT * FROM captures
        WHERE seq = ANY ($1) AND subject = ANY ($2) AND ($3::int8 IS NULL OR integration = $3)
        ORDER BY seq FOR UPDATE
    ), waited AS (
        DELETE FROM queue q USING c
        WHERE q.lane = c.lane AND q.replayed IN (false, true) AND q.seq = c.seq
        RETURNING q.seq,
            ((q.identify IS NOT NULL)::int4 + (q.track IS NOT NULL)::int4)::int8 AS events,
            CASE WHEN q.identify IS NULL THEN 0 ELSE q.identify_bytes::int8 END
                + CASE WHEN q.track IS NULL THEN 0 ELSE q.track_bytes::int8 END AS bytes
    ), dead AS (
        DELETE FROM dead_letters d USING c WHERE d.seq = c.seq RETURNING d.seq
    )
    SELECT c.integration, c.seq, coalesce(w.events, 0), coalesce(w.bytes, 0),
        (SELECT count(*) FROM dead d WHERE d.seq = c.seq),";
const REMOVE_FROM: &str = "FROM c LEFT JOIN waited w ON w.seq = c.seq ORDER BY c.seq";
