//! A person's data: found by the index of subjects, erased in transactions that count it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio_postgres::types::ToSql;

use super::{
    counts::{Load, Loads},
    database::{Call, Database},
    dead_letters::LOCK_LANES,
    row::{RECORD_COLUMNS, record_of},
    settle::records,
    sql::{Arguments, Part, arguments},
};
use crate::{
    outbox::{Erasure, FoundSubject, OutboxError, SubjectQuery},
    proto::ErasureReceipt,
    time::UnixMillis,
};

/// Captures of one search at the most.
const MAX_FOUND: i64 = 100_000;
/// How often it is looked whether requests of a lane have ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Longest wait for them; leases are shorter.
const MAX_WAIT: Duration = Duration::from_secs(120);

impl Database {
    pub(super) async fn find_subject(
        &self,
        query: &SubjectQuery,
    ) -> Result<FoundSubject, OutboxError> {
        let sql = format!(
            "SELECT seq, lane FROM captures
             WHERE subject = ANY ($1) AND {IS_OF} ORDER BY seq LIMIT $3"
        );
        let call = self.call().await?;
        let (subjects, name) = (call.subjects(query), name_of(query));
        let rows = call.rows(&sql, &[&subjects, &name, &MAX_FOUND]).await?;
        // All lanes: a dead letter may be replayed into its lane at any time.
        let mut lanes: Vec<i64> = rows.iter().map(|row| row.get(1)).collect();
        lanes.sort_unstable();
        lanes.dedup();
        let lanes = call.lanes(&lanes).await?.into_iter();
        Ok(FoundSubject {
            captures: rows.iter().map(|row| row.get(0)).collect(),
            lanes: lanes.map(|(_, lane)| lane).collect(),
        })
    }

    /// Erases those of the captures that are here; adds to the receipt what it erased.
    /// `is_last`: the receipt is stored here also where nothing is erased.
    pub(super) async fn erase(
        &self,
        erasure: &Erasure,
        receipt: &mut ErasureReceipt,
        is_last: bool,
    ) -> Result<(), OutboxError> {
        const GO_ON: &str = "UPDATE lanes SET blocked_until = NULL WHERE lane = ANY ($1)";
        let call = self.call().await?;
        let (subjects, name) = (call.subjects(&erasure.subject), name_of(&erasure.subject));
        let chosen: [&(dyn ToSql + Sync); 3] = [&subjects, &name, &erasure.captures];
        let chosen_rows = format!("seq = ANY ($3) AND subject = ANY ($1) AND {IS_OF}");
        let sql = format!("SELECT DISTINCT lane FROM captures WHERE {chosen_rows}");
        let lanes = call.rows(&sql, &chosen).await?;
        let lanes: Vec<i64> = lanes.iter().map(|row| row.get(0)).collect();
        if lanes.is_empty() && !is_last {
            return Ok(());
        }
        call.lock_idle(&lanes).await?;
        let remove = REMOVE.replace("{chosen}", &chosen_rows);
        let sql = format!("{remove} {RECORD_COLUMNS} {REMOVE_FROM}");
        let (mut loads, mut counts) = (Loads::default(), ErasureReceipt::default());
        let mut changes = Vec::new();
        for row in call.rows(&sql, &chosen).await? {
            let (waited, dead) = (Load::of(&row, 2), row.get::<_, i64>(4));
            let mut record = record_of(&row, 5)?;
            let number = |count: i64| u64::try_from(count).unwrap_or(0);
            counts.attempt_count += record.attempts.len() as u64;
            counts.waiting_event_count += number(waited.events);
            counts.dead_letter_count += number(dead);
            counts.payload_count += number(waited.events + dead);
            loads.add(row.get(0), waited.negated());
            let changed = record.forget_history().into_iter().collect();
            changes.push((row.get(1), Arc::new(record), changed));
        }
        call.store_receipt(&counts, receipt).await?;
        let columns = records(&changes);
        let erased: [(&str, Arguments<'_>); 2] =
            [(ERASED, &arguments(&columns)), (GO_ON, &[&lanes])];
        call.finish(&loads, &erased).await?;
        drop(columns);
        self.vacuum.store(true, Ordering::Release);
        call.wake_numbers(&lanes).await;
        call.tell_changes(changes, UnixMillis::now());
        Ok(())
    }

    /// Stores a receipt under a new id.
    pub(super) async fn add_receipt(&self, receipt: &ErasureReceipt) -> Result<(), OutboxError> {
        let (counts, mut receipt) = (ErasureReceipt::default(), receipt.clone());
        let call = self.call().await?;
        call.begin().await?;
        call.store_receipt(&counts, &mut receipt).await?;
        call.commit().await
    }

    /// This database's parts of receipts before an id, newest first.
    pub(super) async fn receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<(i64, ErasureReceipt)>, OutboxError> {
        const SQL: &str = "
            SELECT id, receipt FROM receipts WHERE id < $1 ORDER BY id DESC LIMIT $2";
        let call = self.call().await?;
        let before = before.unwrap_or(i64::MAX);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = call.rows(SQL, &[&before, &limit]).await?;
        let receipts = rows.iter().map(|row| {
            let id: i64 = row.get(0);
            let sealing = &call.session.sealing;
            Ok((id, sealing.open_receipt(&id.to_string(), row.get(1))?))
        });
        receipts.collect()
    }
}

impl Call<'_> {
    /// The blinded subjects.
    fn subjects(&self, query: &SubjectQuery) -> Vec<i64> {
        let sealing = &self.session.sealing;
        query
            .user_ids
            .iter()
            .map(|id| sealing.subject(id))
            .collect()
    }

    /// Begins a transaction that holds the lanes while no request of another relay carries
    /// their events. This relay's own requests have ended: its caller holds the lanes.
    async fn lock_idle(&self, lanes: &[i64]) -> Result<(), OutboxError> {
        // Lets no new lease begin, also while nothing holds the rows.
        const BLOCK: &str = "
            UPDATE lanes SET blocked_until = clock_timestamp() + interval '30 seconds'
            WHERE lane IN (SELECT lane FROM lanes WHERE lane = ANY ($1) ORDER BY lane FOR UPDATE)";
        const BUSY: &str = "
            SELECT EXISTS (SELECT 1 FROM lanes WHERE lane = ANY ($1)
                AND busy AND holder <> $2 AND expires > clock_timestamp())";
        let begun = Instant::now();
        loop {
            self.apply(BLOCK, &[&lanes]).await?;
            let statements: [(&str, Arguments<'_>); 2] = [
                (LOCK_LANES, &[&lanes]),
                (BUSY, &[&lanes, &self.session.relay]),
            ];
            let answers = self.transact(Part::First, &statements).await?;
            if answers[1].first().is_some_and(|row| !row.get::<_, bool>(0)) {
                return Ok(());
            }
            self.rollback().await?;
            if begun.elapsed() > MAX_WAIT {
                let text = "requests that carry the person's events do not end".to_owned();
                return Err(OutboxError::Unavailable(text));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Stores the part of the receipt that this database has.
    async fn store_receipt(
        &self,
        counts: &ErasureReceipt,
        receipt: &mut ErasureReceipt,
    ) -> Result<(), OutboxError> {
        const FIND: &str = "SELECT receipt FROM receipts WHERE id = $1";
        const SQL: &str = "
            INSERT INTO receipts (id, receipt) VALUES ($1, $2)
            ON CONFLICT (id) DO UPDATE SET receipt = excluded.receipt";
        let sealing = &self.session.sealing;
        if receipt.receipt_id.is_empty() {
            let row = self.row(NEXT_RECEIPT, &[]).await?;
            receipt.receipt_id = row.get::<_, i64>(0).to_string();
        }
        let id: i64 = receipt.receipt_id.parse().unwrap_or(0);
        let found = self.optional(FIND, &[&id]).await?;
        let found = found.map(|row| sealing.open_receipt(&receipt.receipt_id, row.get(0)));
        let before = found.transpose()?.unwrap_or_default();
        add_counts(receipt, counts);
        let mut part = ErasureReceipt {
            waiting_event_count: 0,
            dead_letter_count: 0,
            payload_count: 0,
            attempt_count: 0,
            ..receipt.clone()
        };
        add_counts(&mut part, &before);
        add_counts(&mut part, counts);
        let sealed = sealing.receipt(&part)?;
        self.rows(SQL, &[&id, &sealed]).await.map(drop)
    }
}

/// Whether a capture belongs to the integrations of a name, $2, or all are meant.
const IS_OF: &str = "($2::text IS NULL OR integration IN (
    SELECT key FROM integrations WHERE split_part(integration_id, '@', 1) = $2))";

fn name_of(query: &SubjectQuery) -> Option<&str> {
    query.integration_id.as_ref().map(|id| id.name())
}

/// Adds the counts of one receipt to those of another.
pub(super) fn add_counts(sum: &mut ErasureReceipt, more: &ErasureReceipt) {
    sum.waiting_event_count += more.waiting_event_count;
    sum.dead_letter_count += more.dead_letter_count;
    sum.payload_count += more.payload_count;
    sum.attempt_count += more.attempt_count;
}

const ERASED: &str = "
    UPDATE captures c SET subject = NULL, attempts = NULL, identify = i.identify, track = i.track
    FROM unnest($1::int8[], $2::bytea[], $3::bytea[]) AS i (seq, identify, track)
    WHERE c.seq = i.seq";

/// Ids in the order of time, also among databases: milliseconds, then a sequence.
const NEXT_RECEIPT: &str = "
    SELECT ((extract(epoch FROM clock_timestamp()) * 1000)::int8 << 21)
        | (nextval('receipt_seq') & 2097151)";

const REMOVE: &str = "
    WITH c AS MATERIALIZED (
        SELECT * FROM captures WHERE {chosen} ORDER BY seq FOR UPDATE
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
const REMOVE_FROM: &str = "
    FROM c JOIN integrations i ON i.key = c.integration
    LEFT JOIN waited w ON w.seq = c.seq ORDER BY c.seq";
