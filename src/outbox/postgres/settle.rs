//! Makes the outcome of an attempt durable, if the lane is still held.

use std::{collections::HashSet, sync::Arc};

use super::{
    counts::Load,
    database::{Database, key_of},
    news::Changed,
    row::{bit, bits},
    sql::{Arguments, Columns, Part, arguments, columns},
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

impl Database {
    pub(super) async fn settle(&self, settlement: &Settlement) -> Result<(), OutboxError> {
        let session = self.session()?;
        let lane = session.lane(&settlement.lane);
        let held = lane.and_then(|lane| Some((lane, session.held().get(&lane)?.fence)));
        // Without a lease the outcome is not ours to note: the next holder sends again.
        let Some((lane, fence)) = held else {
            return Ok(());
        };
        let call = self.call().await?;
        let rows = columns!(settlement.captures, one =>
            one.sequence, status(one, EventType::Identify), status(one, EventType::Track),
            encode_attempts(&one.record.attempts), bits(final_events(one)),
            dead(one).0, dead(one).1);
        let (key, now) = (key_of(lane), UnixMillis::now());
        let mut arguments = arguments(&rows);
        arguments.extend_from_slice(&[&lane, &session.relay, &fence, &key, &now.0]);
        let statements: [(&str, Arguments<'_>); 2] = [
            (FREE, &[&lane, &session.relay, &fence]),
            (SETTLE, &arguments),
        ];
        // A repetition changes nothing more.
        let answers = call.transact(Part::Whole, &statements).await?;
        let mut freed = Load::default();
        for row in &answers[1] {
            freed += Load::of(row, 1);
        }
        self.counts().add(key, freed.negated());
        if answers[1].is_empty() && !settlement.captures.is_empty() {
            tracing::warn!(lane = %settlement.lane, "the lease was lost; nothing was settled");
        }
        let settled: HashSet<i64> = answers[1].iter().map(|row| row.get(0)).collect();
        let captures = settlement.captures.iter();
        let changed = captures.filter(|one| settled.contains(&one.sequence));
        let changed = changed.map(|one| (one.sequence, Arc::clone(&one.record), one.changed));
        call.tell_changes(changed.collect(), now);
        Ok(())
    }
}

fn status(settled: &SettledCapture, event: EventType) -> Option<Vec<u8>> {
    let changed = settled.changed.contains(event);
    changed.then(|| encode_status(settled.record.event(event)))
}

fn final_events(settled: &SettledCapture) -> EventSet {
    let is_final = |event: &EventType| settled.record.event(*event).state.is_final();
    settled.changed.iter().filter(is_final).collect()
}

/// The events that are dead letters now, as bits, and their reason.
fn dead(settled: &SettledCapture) -> (i16, i32) {
    let (mut dead, mut reason) = (0, 0);
    for event in settled.changed.iter() {
        if let State::DeadLettered { reason: why, .. } = settled.record.event(event).state {
            (dead, reason) = (dead | bit(event), why.into());
        }
    }
    (dead, reason)
}

/// Changed records as columns: sequence, status of identify, status of track.
pub(super) fn records(changes: &[Changed]) -> Columns<'_> {
    columns!(changes, one =>
        one.0, encode_status(&one.1.identify), encode_status(&one.1.track))
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
        FROM unnest($1::int8[], $2::bytea[], $3::bytea[], $4::bytea[], $5::int2[], $6::int2[],
                $7::int4[]) AS i (seq, identify, track, attempts, done, dead, reason)
        JOIN queue q ON q.lane = $8 AND q.replayed IN (false, true) AND q.seq = i.seq
        WHERE EXISTS (SELECT 1 FROM lanes WHERE lane = $8 AND holder = $9 AND fence = $10)
    ), gone AS (
        DELETE FROM queue q USING before b
        WHERE q.lane = $8 AND q.replayed = b.replayed AND q.seq = b.seq AND b.is_over
    ), kept AS (
        UPDATE queue q SET
            identify = CASE WHEN b.done & 1 = 0 THEN q.identify END,
            track = CASE WHEN b.done & 2 = 0 THEN q.track END
        FROM before b
        WHERE q.lane = $8 AND q.replayed = b.replayed AND q.seq = b.seq
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
        SELECT $11, $9, 1 + $8 % 8, -sum(identify_over + track_over),
            -sum(identify_over * identify_bytes::int8 + track_over * track_bytes::int8)
        FROM before HAVING sum(identify_over + track_over) > 0
        ON CONFLICT (integration, relay, slot) DO UPDATE
        SET events = backlog.events + excluded.events, bytes = backlog.bytes + excluded.bytes
    )
    SELECT seq, (identify_over + track_over)::int8,
        identify_over * identify_bytes::int8 + track_over * track_bytes::int8
    FROM before";
