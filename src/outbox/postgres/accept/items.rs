//! A group's captures on their way into the tables: what becomes of each, and the statements
//! that store them. Pure.

use std::{collections::HashMap, sync::Arc};

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    outbox::postgres::counts::Load,
    outbox::{Content, NewCapture, Quota, Submitted},
    status::{CaptureRecord, EventStatus, State},
};

/// A capture on its way into the tables.
pub(super) struct Item {
    pub(super) capture: NewCapture,
    pub(super) subject: Option<i64>,
    pub(super) integration: i64,
    pub(super) lane: i64,
    pub(super) id: Uuid,
    pub(super) load: Load,
    pub(super) fate: Fate,
}

pub(super) enum Fate {
    /// To be inserted.
    New,
    /// Inserted as this sequence.
    Stored(i64, Arc<CaptureRecord>),
    /// There is no room, unless it is stored already.
    Full(Quota),
    /// The same id as an earlier item of the group.
    Repeats(usize),
    Known(Submitted),
}

/// Loads as arrays.
pub(in crate::outbox::postgres) fn columns(
    loads: &HashMap<i64, Load>,
) -> (Vec<i64>, Vec<i64>, Vec<i64>) {
    let mut columns = (Vec::new(), Vec::new(), Vec::new());
    // In one order, so that two transactions never wait for each other.
    let mut sorted: Vec<_> = loads.iter().collect();
    sorted.sort_unstable_by_key(|(key, _)| **key);
    for (integration, load) in sorted {
        columns.0.push(*integration);
        columns.1.push(load.events);
        columns.2.push(load.bytes);
    }
    columns
}

/// The key of a capture id.
pub(in crate::outbox::postgres) fn id_of(capture_id: &str) -> Uuid {
    let mut half = [0; 16];
    half.copy_from_slice(&Sha256::digest(capture_id)[..16]);
    Uuid::from_bytes(half)
}

pub(super) fn first_state(capture: &NewCapture) -> State {
    match &capture.content {
        Content::Send { .. } => State::Queued,
        Content::Skip { reason } => State::Skipped { reason: *reason },
    }
}

pub(super) fn new_record(capture: &NewCapture) -> CaptureRecord {
    let state = first_state(capture);
    CaptureRecord {
        integration_id: capture.integration_id.clone(),
        capture_id: capture.capture_id.clone(),
        region: capture.region,
        mapping_version: capture.mapping_version,
        accept_time: capture.accept_time,
        queue_time: capture.accept_time,
        identify: EventStatus::new(state),
        track: EventStatus::new(state),
        attempts: Vec::new(),
        trace: capture.trace,
    }
}

pub(super) fn answers(items: Vec<Item>) -> Vec<Submitted> {
    let mut answers: Vec<Submitted> = Vec::with_capacity(items.len());
    for item in &items {
        let answer = match &item.fate {
            Fate::Stored(_, record) => Submitted::Accepted(Arc::clone(record)),
            Fate::Known(known) => known.clone(),
            Fate::Full(quota) => Submitted::Full(*quota),
            Fate::New => Submitted::Stale,
            Fate::Repeats(first) => {
                let same = items[*first].capture.digest == item.capture.digest;
                match &answers[*first] {
                    Submitted::Accepted(record) | Submitted::Duplicate(record) if same => {
                        Submitted::Duplicate(Arc::clone(record))
                    }
                    Submitted::Accepted(_) | Submitted::Duplicate(_) => Submitted::Conflict,
                    other => other.clone(),
                }
            }
        };
        answers.push(answer);
    }
    answers
}

/// Sequences follow the order of arrival. Rows are inserted in the order of their ids, so that
/// two relays that store the same captures do not wait for each other.
pub(super) const INSERT: &str = "
    INSERT INTO captures (seq, integration, lane, id, digest, subject, mapping_version,
        accept_millis, queue_millis, capture_id, identify, track, trace)
    SELECT i.seq, i.integration, i.lane, i.id, i.digest, i.subject, i.mapping_version,
        i.accept_millis, i.accept_millis, i.capture_id, i.status, i.status, i.trace
    FROM (SELECT nextval('capture_seq') AS seq, ordered.*
        FROM (SELECT * FROM unnest($1::int8[], $2::int8[], $3::uuid[], $4::uuid[], $5::int8[],
                $6::int8[], $7::int8[], $8::int8[], $9::text[], $10::bytea[], $11::bytea[])
            WITH ORDINALITY AS t (integration, lane, id, digest, subject, mapping_version,
                accept_millis, revision, capture_id, status, trace, place)
            ORDER BY place) AS ordered) AS i
    WHERE EXISTS (SELECT 1 FROM integrations own WHERE own.key = i.integration
        AND own.state = 'active' AND i.revision IN (0, own.revision))
    ORDER BY i.integration, i.id
    ON CONFLICT (integration, id) DO NOTHING
    RETURNING seq, integration, id";

/// Fails, by a division by zero, where an integration began to move to another database since
/// the captures were inserted: the move waits for the transactions that it has found.
pub(super) const GUARD: &str = "
    SELECT 1 / (NOT EXISTS (SELECT 1 FROM integrations
        WHERE key = ANY ($1::int8[]) AND state <> 'active'))::int4";

pub(super) const SUMS: &str = "
    SELECT k.key, coalesce(sum(b.events), 0)::int8, coalesce(sum(b.bytes), 0)::int8,
        current_setting('synchronous_standby_names')
    FROM unnest($1::int8[]) AS k (key) LEFT JOIN backlog b ON b.integration = k.key
    GROUP BY k.key";

pub(super) const ENQUEUE: &str = "
    INSERT INTO queue (lane, replayed, seq, identify_bytes, track_bytes, identify, track)
    SELECT i.lane, false, i.seq, i.identify_bytes, i.track_bytes, i.identify, i.track
    FROM unnest($1::int8[], $2::int8[], $3::int4[], $4::int4[], $5::bytea[], $6::bytea[])
        AS i (lane, seq, identify_bytes, track_bytes, identify, track)";

/// The slots of `backlog` for new captures, and for replays and erasures.
pub(super) const SLOT: i16 = 0;
pub(in crate::outbox::postgres) const OTHER_SLOT: i16 = 9;

/// Adds to what waits, in this relay's rows.
pub(in crate::outbox::postgres) const COUNT: &str = "
    INSERT INTO backlog (integration, relay, slot, events, bytes)
    SELECT i.integration, $1, $5, i.events, i.bytes
    FROM unnest($2::int8[], $3::int8[], $4::int8[]) AS i (integration, events, bytes)
    ON CONFLICT (integration, relay, slot) DO UPDATE
    SET events = backlog.events + excluded.events, bytes = backlog.bytes + excluded.bytes";
