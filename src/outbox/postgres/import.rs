//! Takes what an embedded outbox held, in pieces of one transaction each. A piece that was
//! stored before is known by its ids.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
    time::Duration,
};

use uuid::Uuid;

use super::{
    PostgresConnection, PostgresOptions, PostgresOutbox,
    accept::key_of_id,
    counts::{Load, Loads},
    database::{Database, lane_number},
    error::damaged,
    row::bit,
    sql::{Arguments, Part, arguments, columns},
};
use crate::{
    event::EventType,
    metrics::Metrics,
    outbox::{
        Limits, MoveError, Moved, Outbox, OutboxError,
        record::{self, encode_attempts, encode_status},
        sqlite::export::{Export, Exported, StoredPayload},
    },
    proto::{ErasureReceipt, Integration},
    status::{CaptureRecord, State},
    trace::TraceLink,
    vault::{Vault, unsealed_len},
};

/// Captures of one piece.
const PIECE: usize = 500;
const UNBOUNDED: Limits = Limits {
    max_events: u64::MAX,
    max_bytes: u64::MAX,
    max_integration_events: u64::MAX,
    max_integration_bytes: u64::MAX,
};

/// Moves all of the embedded outbox in a directory. `progress` hears how many captures are
/// moved, of how many. Relays on the databases may run meanwhile.
///
/// # Errors
/// [`MoveError`]; what was moved stays moved, and the call is repeated.
pub async fn move_to_postgres(
    directory: &Path,
    connection: &PostgresConnection,
    vault: &Arc<Vault>,
    remember: Duration,
    mut progress: impl FnMut(u64, u64),
) -> Result<Moved, MoveError> {
    let mut export = Export::open(directory, vault)?;
    super::schema::adopt_index_key(connection, vault, export.index_key()).await?;
    let options = PostgresOptions {
        limits: UNBOUNDED,
        remember,
        encrypt_payloads: false,
        request_timeout: Duration::from_secs(1),
        group_commit_max: PIECE,
        metrics: Metrics::off(),
    };
    let outbox = PostgresOutbox::open(connection, options, vault).await?;
    let mut moved = Moved::default();
    let done = take_all(&mut export, &outbox, &mut moved, &mut progress).await;
    outbox.close().await;
    done.map(|()| moved)
}

async fn take_all(
    export: &mut Export,
    outbox: &PostgresOutbox,
    moved: &mut Moved,
    progress: &mut impl FnMut(u64, u64),
) -> Result<(), MoveError> {
    let there = Outbox::integrations(outbox).await?;
    for spec in export.integrations()? {
        let same = |one: &Integration| one.integration_id == spec.integration_id;
        if !there.iter().any(same) {
            outbox.put_integration(spec, None).await?;
            moved.integrations += 1;
        }
    }
    for id in export.deleted()? {
        outbox.home(&id)?.note_deleted(&id).await?;
    }
    let plain = |receipt: &ErasureReceipt| ErasureReceipt {
        receipt_id: String::new(),
        ..receipt.clone()
    };
    let stored = outbox.erasure_receipts(None, usize::MAX).await?;
    for receipt in export.receipts()? {
        if !stored.iter().any(|one| plain(one) == plain(&receipt)) {
            outbox.databases[0].add_receipt(&plain(&receipt)).await?;
            moved.receipts += 1;
        }
    }
    for notice in export.notices()? {
        outbox.put_notice(notice).await?;
        moved.notices += 1;
    }
    let total = export.count()?;
    let mut after = 0;
    loop {
        let piece = export.captures(after, PIECE)?;
        let Some(last) = piece.last() else { break };
        after = last.sequence;
        let mut homes: BTreeMap<usize, Vec<Exported>> = BTreeMap::new();
        for capture in piece {
            let home = outbox.home(&capture.integration_id)?.place;
            homes.entry(home).or_default().push(capture);
        }
        let mut gone = Vec::new();
        for (home, own) in homes {
            let taken = outbox.databases[home].take(&own).await?;
            for (capture, taken) in own.iter().zip(taken) {
                match taken {
                    Taken::New => moved.captures += 1,
                    Taken::Known => moved.known += 1,
                    Taken::Conflict => {
                        let name = format!("{}/{}", capture.integration_id, capture.capture_id);
                        moved.conflicts.push(name);
                        continue;
                    }
                }
                gone.push(capture.sequence);
            }
        }
        export.remove(&gone)?;
        progress(moved.captures + moved.known, total);
    }
    Ok(())
}

/// What became of a capture.
enum Taken {
    New,
    /// The database has it with the same content.
    Known,
    /// The database has its id with other content.
    Conflict,
}

/// A capture on its way, decoded.
struct Arriving<'a> {
    capture: &'a Exported,
    record: CaptureRecord,
    key: i64,
    lane: i64,
    id: Uuid,
    digest: Uuid,
}

impl Database {
    /// Stores a piece in one transaction.
    async fn take(&self, piece: &[Exported]) -> Result<Vec<Taken>, OutboxError> {
        const DIGESTS: &str = "
            SELECT c.integration, c.id, c.digest
            FROM unnest($1::int8[], $2::uuid[]) AS i (integration, id)
            JOIN captures c ON c.integration = i.integration AND c.id = i.id";
        let call = self.call().await?;
        let ids: Vec<_> = piece.iter().map(|one| &one.integration_id).collect();
        call.make_keys(&ids).await?;
        let key = |capture: &Exported| call.session.key(&capture.integration_id);
        let arriving = piece.iter().map(|capture| arriving(capture, key(capture)));
        let arriving = arriving.collect::<Result<Vec<Arriving<'_>>, _>>()?;
        let rows = columns!(arriving, one =>
            one.key, one.lane, one.id, one.digest,
            (one.capture.subject != 0).then_some(one.capture.subject),
            one.record.mapping_version.cast_signed(), one.record.accept_time.0,
            one.record.queue_time.0, one.capture.capture_id.as_str(),
            encode_status(&one.record.identify), encode_status(&one.record.track),
            encode_attempts(&one.record.attempts),
            one.record.trace.as_ref().map(TraceLink::to_bytes));
        let ids = columns!(arriving, one => one.key, one.id);
        let statements: [(&str, Arguments<'_>); 2] =
            [(CAPTURES, &arguments(&rows)), (DIGESTS, &arguments(&ids))];
        let answers = call.transact(Part::First, &statements).await?;
        let of = |row: &tokio_postgres::Row| (row.get::<_, i64>(0), row.get::<_, Uuid>(1));
        let new = answers[0].iter().map(|row| (of(row), row.get(2)));
        let new: HashMap<(i64, Uuid), i64> = new.collect();
        let digests = answers[1].iter().map(|row| (of(row), row.get(2)));
        let digests: HashMap<(i64, Uuid), Uuid> = digests.collect();
        let stored = arriving.iter();
        let stored = stored.filter_map(|one| Some((*new.get(&(one.key, one.id))?, one)));
        let stored: Vec<(i64, &Arriving<'_>)> = stored.collect();

        let mut loads = Loads::default();
        let waiting = stored.iter().filter_map(|(seq, one)| {
            let (payloads, replayed) = one.capture.waiting.as_ref()?;
            let payloads = payloads.each_ref().map(|it| it.as_ref().map(sound));
            for payload in payloads.iter().flatten() {
                let (events, bytes) = (1, size(payload).into());
                loads.add(one.key, Load { events, bytes });
            }
            Some((*seq, one.lane, *replayed, payloads))
        });
        let waiting: Vec<_> = waiting.collect();
        let size_of = |payload: &Option<&[u8]>| payload.map_or(0, size);
        let queue = columns!(waiting, one =>
            one.1, one.2, one.0, size_of(&one.3[0]), size_of(&one.3[1]), one.3[0], one.3[1]);
        let dead = stored.iter().flat_map(|(seq, one)| {
            let letters = one.capture.dead.iter();
            letters.map(move |(event, time, payload)| (*seq, *one, *event, *time, sound(payload)))
        });
        let dead: Vec<_> = dead.collect();
        let letters = columns!(dead, one =>
            one.1.key, one.0, bit(one.2), reason(&one.1.record, one.2), one.3.0,
            one.1.capture.accept_time.0, size(one.4), one.4);
        let stores: [(&str, Arguments<'_>); 2] =
            [(QUEUE, &arguments(&queue)), (DEAD, &arguments(&letters))];
        call.finish(&loads, &stores).await?;

        let taken = arriving.iter().map(|one| {
            let at = (one.key, one.id);
            match (new.contains_key(&at), digests.get(&at)) {
                (true, _) => Taken::New,
                (false, Some(digest)) if *digest == one.digest => Taken::Known,
                (false, _) => Taken::Conflict,
            }
        });
        Ok(taken.collect())
    }
}

fn arriving(capture: &Exported, key: Option<i64>) -> Result<Arriving<'_>, OutboxError> {
    let (id, name) = (capture.integration_id.clone(), capture.capture_id.clone());
    let record = record::decode(id, name, &capture.status).map_err(|_| damaged("record"))?;
    let key = key.ok_or_else(|| damaged("integration"))?;
    let lane = capture.lane.as_ref();
    let (region, shard) = lane.map_or((record.region, 0), |lane| (lane.region, lane.shard));
    let digest: [u8; 16] = capture.digest.as_slice().try_into().unwrap_or_default();
    Ok(Arriving {
        capture,
        record,
        key,
        lane: lane_number(key, region, shard),
        id: key_of_id(&capture.capture_id),
        digest: Uuid::from_bytes(digest),
    })
}

/// A payload as it goes on: an empty one says that it was damaged, and is never sent.
fn sound(payload: &StoredPayload) -> &[u8] {
    match crc32fast::hash(&payload.bytes) == payload.crc {
        true => &payload.bytes,
        false => &[],
    }
}

fn size(payload: &[u8]) -> i32 {
    i32::try_from(unsealed_len(payload)).unwrap_or(i32::MAX)
}

fn reason(record: &CaptureRecord, event: EventType) -> i32 {
    match record.event(event).state {
        State::DeadLettered { reason, .. } => reason.into(),
        _ => 0,
    }
}

const CAPTURES: &str = "
    INSERT INTO captures (integration, lane, id, digest, subject, mapping_version,
        accept_millis, queue_millis, stored_at, capture_id, identify, track, attempts, trace)
    SELECT integration, lane, id, digest, subject, mapping_version, accept_millis,
        queue_millis, to_timestamp(accept_millis / 1000.0), capture_id, identify, track,
        attempts, trace
    FROM unnest($1::int8[], $2::int8[], $3::uuid[], $4::uuid[], $5::int8[], $6::int8[],
            $7::int8[], $8::int8[], $9::text[], $10::bytea[], $11::bytea[], $12::bytea[],
            $13::bytea[]) WITH ORDINALITY
        AS i (integration, lane, id, digest, subject, mapping_version, accept_millis,
            queue_millis, capture_id, identify, track, attempts, trace, place)
    ORDER BY place
    ON CONFLICT (integration, id) DO NOTHING
    RETURNING integration, id, seq";

const QUEUE: &str = "
    INSERT INTO queue (lane, replayed, seq, identify_bytes, track_bytes, identify, track)
    SELECT * FROM unnest($1::int8[], $2::bool[], $3::int8[], $4::int4[], $5::int4[],
        $6::bytea[], $7::bytea[])";

const DEAD: &str = "
    INSERT INTO dead_letters (integration, seq, event, reason, dead_millis, accept_millis, bytes,
        payload)
    SELECT * FROM unnest($1::int8[], $2::int8[], $3::int2[], $4::int4[], $5::int8[], $6::int8[],
        $7::int4[], $8::bytea[])";
