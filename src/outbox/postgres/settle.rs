//! Makes the outcome of an attempt durable, if the lane is still held.

use std::{collections::HashSet, sync::Arc};

use futures_util::future::join4;

use super::{
    connect::Connection,
    counts::Load,
    database::{Database, Session, key_of},
    error::Effect,
    row::event_number,
};
use crate::{
    event::EventType,
    outbox::{
        EventSet, OutboxError, SettledCapture, Settlement,
        record::{encode_attempts, encode_status},
    },
    status::State,
    time::UnixMillis,
};

/// A settlement as arrays, one element per capture.
#[derive(Default)]
struct Columns {
    seqs: Vec<i64>,
    identify: Vec<Option<Vec<u8>>>,
    track: Vec<Option<Vec<u8>>>,
    attempts: Vec<Vec<u8>>,
    /// Events that are final now: bit 0 identify, bit 1 track.
    done: Vec<i16>,
    /// Those of them that are dead letters.
    dead: Vec<i16>,
    reasons: Vec<i32>,
}

impl Columns {
    fn add(&mut self, settled: &SettledCapture) {
        let status = |event: EventType| {
            let changed = settled.changed.contains(event);
            changed.then(|| encode_status(settled.record.event(event)))
        };
        let (mut done, mut dead, mut reason) = (0, 0, 0);
        for event in settled.changed.iter() {
            let state = settled.record.event(event).state;
            if state.is_final() {
                done |= event_number(event);
            }
            if let State::DeadLettered { reason: why, .. } = state {
                (dead, reason) = (dead | event_number(event), i32::from(why));
            }
        }
        self.seqs.push(settled.sequence);
        self.identify.push(status(EventType::Identify));
        self.track.push(status(EventType::Track));
        self.attempts
            .push(encode_attempts(&settled.record.attempts));
        self.done.push(done);
        self.dead.push(dead);
        self.reasons.push(reason);
    }
}

impl Database {
    pub(super) async fn settle(&self, settlement: &Settlement) -> Result<(), OutboxError> {
        let session = self.session()?;
        let lane = session.lane(&settlement.lane);
        let held = lane.and_then(|lane| session.held().get(&lane).copied());
        // Without a lease the outcome is not ours to note: the next holder sends again.
        let (Some(lane), Some(held)) = (lane, held) else {
            return Ok(());
        };
        let mut columns = Columns::default();
        for capture in &settlement.captures {
            columns.add(capture);
        }
        let connection = self.connection().await?;
        let settled = self
            .write(&session, &connection, (lane, held.fence), &columns)
            .await?;
        if settled.is_empty() && !settlement.captures.is_empty() {
            tracing::warn!(lane = %settlement.lane, "the lease was lost; nothing was settled");
        }
        self.announce_settled(&session, settlement, &settled);
        Ok(())
    }

    /// Returns the captures that still waited.
    async fn write(
        &self,
        session: &Session,
        connection: &Connection,
        (lane, fence): (i64, i64),
        columns: &Columns,
    ) -> Result<HashSet<i64>, OutboxError> {
        let free = connection.prepared(FREE).await?;
        let settle = connection.prepared(SETTLE).await?;
        let now = UnixMillis::now().0;
        let key = key_of(lane);
        let work = async {
            let (begun, freed, settled, committed) = join4(
                connection.batch_execute("BEGIN"),
                connection.execute(&free, &[&lane, &session.relay, &fence]),
                connection.query(
                    &settle,
                    &[
                        &lane,
                        &session.relay,
                        &fence,
                        &columns.seqs,
                        &columns.identify,
                        &columns.track,
                        &columns.attempts,
                        &columns.done,
                        &columns.dead,
                        &columns.reasons,
                        &key,
                        &now,
                    ],
                ),
                connection.batch_execute("COMMIT"),
            )
            .await;
            begun?;
            freed?;
            committed?;
            settled
        };
        // A repetition changes nothing more.
        let rows = connection.run(Effect::Commit, work).await?;
        let mut freed = Load::default();
        for row in &rows {
            freed.add(Load {
                events: -row.get::<_, i64>(1),
                bytes: -row.get::<_, i64>(2),
            });
        }
        let mut counts = self.counts();
        let mut sum = counts.of(key);
        sum.add(freed);
        counts.set(key, sum);
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    fn announce_settled(&self, session: &Session, settlement: &Settlement, seqs: &HashSet<i64>) {
        let now = UnixMillis::now();
        let settled = settlement.captures.iter();
        let settled = settled.filter(|capture| seqs.contains(&capture.sequence));
        let changes: Vec<_> = settled
            .map(|one| (one.sequence, Arc::clone(&one.record), one.changed))
            .collect();
        self.tell_changes(session, changes, now);
    }
}

/// One change of a capture: its sequence, its record from now on, the changed events.
pub(super) type Changed = (i64, Arc<crate::status::CaptureRecord>, EventSet);

/// The statuses of one event of changed captures, as they are stored.
pub(super) fn statuses(changes: &[Changed], event: EventType) -> Vec<Vec<u8>> {
    let records = changes.iter().map(|(_, record, _)| record);
    records
        .map(|record| encode_status(record.event(event)))
        .collect()
}

/// Locks the lane: the next statement sees what was settled, erased and replayed before.
const FREE: &str = "
    UPDATE lanes SET busy = false WHERE lane = $1 AND holder = $2 AND fence = $3";

const SETTLE: &str = "
    WITH before AS MATERIALIZED (
        SELECT q.replayed, q.seq, i.identify AS identify_status, i.track AS track_status,
            i.attempts, i.done, i.dead, i.reason,
            (q.identify IS NULL OR i.done & 1 <> 0) AND (q.track IS NULL OR i.done & 2 <> 0)
                AS is_over,
            CASE WHEN i.dead & 1 <> 0 THEN q.identify END AS dead_identify,
            CASE WHEN i.dead & 2 <> 0 THEN q.track END AS dead_track,
            q.identify_bytes, q.track_bytes,
            (q.identify IS NOT NULL AND i.done & 1 <> 0)::int4 AS identify_over,
            (q.track IS NOT NULL AND i.done & 2 <> 0)::int4 AS track_over
        FROM unnest($4::int8[], $5::bytea[], $6::bytea[], $7::bytea[], $8::int2[], $9::int2[],
                $10::int4[]) AS i (seq, identify, track, attempts, done, dead, reason)
        JOIN queue q ON q.lane = $1 AND q.replayed IN (false, true) AND q.seq = i.seq
        WHERE EXISTS (SELECT 1 FROM lanes WHERE lane = $1 AND holder = $2 AND fence = $3)
    ), gone AS (
        DELETE FROM queue q USING before b
        WHERE q.lane = $1 AND q.replayed = b.replayed AND q.seq = b.seq AND b.is_over
    ), kept AS (
        UPDATE queue q SET
            identify = CASE WHEN b.done & 1 = 0 THEN q.identify END,
            track = CASE WHEN b.done & 2 = 0 THEN q.track END
        FROM before b
        WHERE q.lane = $1 AND q.replayed = b.replayed AND q.seq = b.seq
            AND b.done <> 0 AND NOT b.is_over
    ), letters AS (
        INSERT INTO dead_letters (integration, seq, event, reason, dead_millis, accept_millis,
            bytes, payload)
        SELECT $11, b.seq, e.event, b.reason, $12, c.accept_millis, e.bytes, e.payload
        FROM before b JOIN captures c ON c.seq = b.seq, LATERAL (VALUES
            (1::int2, b.dead_identify, b.identify_bytes), (2::int2, b.dead_track, b.track_bytes)
        ) AS e (event, payload, bytes)
        WHERE b.dead <> 0 AND e.payload IS NOT NULL
        ORDER BY b.seq, e.event
    ), recorded AS (
        UPDATE captures c SET identify = coalesce(b.identify_status, c.identify),
            track = coalesce(b.track_status, c.track), attempts = b.attempts
        FROM before b WHERE c.seq = b.seq
    ), counted AS (
        INSERT INTO backlog (integration, relay, slot, events, bytes)
        SELECT $11, $2, 1 + $1 % 8, -sum(identify_over + track_over),
            -sum(identify_over * identify_bytes::int8 + track_over * track_bytes::int8)
        FROM before HAVING sum(identify_over + track_over) > 0
        ON CONFLICT (integration, relay, slot) DO UPDATE
        SET events = backlog.events + excluded.events, bytes = backlog.bytes + excluded.bytes
    )
    SELECT seq, (identify_over + track_over)::int8,
        identify_over * identify_bytes::int8 + track_over * track_bytes::int8
    FROM before";
