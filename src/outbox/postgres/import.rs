//! Takes what an embedded outbox held, in pieces of one transaction each. A piece that was
//! stored before is known by its ids.

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::{
    PostgresConnection, PostgresOptions, PostgresOutbox, READ,
    accept::{COUNT, OTHER_SLOT, columns, id_of},
    counts::Load,
    database::{Database, Session, lane_number},
    error::{Effect, damaged},
    row::event_number,
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    metrics::Metrics,
    outbox::{
        Limits, MoveError, Moved, Outbox, OutboxError, record,
        sqlite::export::{Export, Exported, StoredPayload},
    },
    status::State,
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
    let there = outbox.integrations().await?;
    for spec in export.integrations()? {
        let same = |one: &crate::proto::Integration| one.integration_id == spec.integration_id;
        if !there.iter().any(same) {
            outbox.put_integration(spec, None).await?;
            moved.integrations += 1;
        }
    }
    for receipt in export.receipts()? {
        moved.receipts += u64::from(outbox.take_receipt(&receipt).await?);
    }
    for notice in export.notices()? {
        outbox.put_notice(notice).await?;
        moved.notices += 1;
    }
    let (total, _) = export.counts()?;
    let mut after = 0;
    loop {
        let piece = export.captures(after, PIECE)?;
        let Some(last) = piece.last() else { break };
        after = last.sequence;
        let mut gone = Vec::with_capacity(piece.len());
        for (place, own) in outbox.by_home(piece)? {
            let taken = outbox.databases[place].take(&own).await?;
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
#[derive(Clone, Copy)]
enum Taken {
    New,
    /// The database has it with the same content.
    Known,
    /// The database has its id with other content.
    Conflict,
}

impl PostgresOutbox {
    fn by_home(&self, piece: Vec<Exported>) -> Result<HashMap<usize, Vec<Exported>>, OutboxError> {
        let mut homes: HashMap<usize, Vec<Exported>> = HashMap::new();
        for capture in piece {
            let home = self.home(&capture.integration_id)?;
            homes.entry(home.place).or_default().push(capture);
        }
        Ok(homes)
    }

    /// Stores a receipt; returns whether it is new.
    async fn take_receipt(
        &self,
        receipt: &crate::proto::ErasureReceipt,
    ) -> Result<bool, OutboxError> {
        let plain = |receipt: &crate::proto::ErasureReceipt| {
            let mut plain = receipt.clone();
            plain.receipt_id.clear();
            plain
        };
        let stored = self.receipts(None, usize::MAX).await?;
        if stored.iter().any(|one| plain(one) == plain(receipt)) {
            return Ok(false);
        }
        let database = self.databases.first().ok_or(OutboxError::Closed)?;
        database.add_receipt(&plain(receipt)).await?;
        Ok(true)
    }
}

/// Dead letters: integration, sequence, event, reason, time, time of acceptance.
type DeadColumns = (Vec<i64>, Vec<i64>, Vec<i16>, Vec<i32>, Vec<i64>, Vec<i64>);

/// The rows of a piece, as arrays.
#[derive(Default)]
struct Rows {
    seqs: HashMap<(i64, Uuid), i64>,
    queue: (Vec<i64>, Vec<bool>, Vec<i64>),
    sizes: [Vec<i32>; 2],
    payloads: [Vec<Option<Vec<u8>>>; 2],
    dead: DeadColumns,
    dead_payloads: Vec<Vec<u8>>,
    loads: HashMap<i64, Load>,
}

impl Rows {
    fn add(
        &mut self,
        seq: i64,
        key: i64,
        lane: i64,
        capture: &Exported,
    ) -> Result<(), OutboxError> {
        if let Some((payloads, replayed)) = &capture.waiting {
            self.queue.0.push(lane);
            self.queue.1.push(*replayed);
            self.queue.2.push(seq);
            for (place, payload) in payloads.iter().enumerate() {
                let bytes = payload.as_ref().map(sound);
                let size = bytes.as_ref().map_or(0, |it| unsealed_len(it));
                let load = Load {
                    events: i64::from(bytes.is_some()),
                    bytes: i64::try_from(size).unwrap_or(0),
                };
                self.loads.entry(key).or_default().add(load);
                self.sizes[place].push(i32::try_from(size).unwrap_or(i32::MAX));
                self.payloads[place].push(bytes);
            }
        }
        for (event, time, payload) in &capture.dead {
            let state = decoded(capture)?.event(*event).state;
            let bytes = sound(payload);
            self.dead.0.push(key);
            self.dead.1.push(seq);
            self.dead.2.push(event_number(*event));
            self.dead.3.push(match state {
                State::DeadLettered { reason, .. } => reason.into(),
                _ => 0,
            });
            self.dead.4.push(time.0);
            self.dead.5.push(capture.accept_time.0);
            self.dead_payloads.push(bytes);
        }
        Ok(())
    }
}

/// A payload as it goes on: an empty one says that it was damaged, and is never sent.
fn sound(payload: &StoredPayload) -> Vec<u8> {
    match crc32fast::hash(&payload.bytes) == payload.crc {
        true => payload.bytes.clone(),
        false => Vec::new(),
    }
}

fn decoded(capture: &Exported) -> Result<crate::status::CaptureRecord, OutboxError> {
    let (id, name) = (capture.integration_id.clone(), capture.capture_id.clone());
    record::decode(id, name, &capture.status).map_err(|_| damaged("record"))
}

impl Database {
    /// Stores a piece in one transaction.
    async fn take(&self, piece: &[Exported]) -> Result<Vec<Taken>, OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        let ids: Vec<&IntegrationId> = piece.iter().map(|one| &one.integration_id).collect();
        self.keys(&session, &connection, &ids).await?;
        connection.begin().await?;
        let mut rows = Rows::default();
        let (statement, parameters) = captures(&session, piece)?;
        let parameters: Vec<_> = parameters.iter().map(|one| &**one as _).collect();
        for row in connection.rows(READ, statement, &parameters).await? {
            rows.seqs.insert((row.get(1), row.get(2)), row.get(0));
        }
        let mut known = Vec::new();
        let mut taken = Vec::with_capacity(piece.len());
        for (place, capture) in piece.iter().enumerate() {
            let (key, id, lane) = place_of(&session, capture)?;
            match rows.seqs.get(&(key, id)).copied() {
                Some(seq) => {
                    rows.add(seq, key, lane, capture)?;
                    taken.push(Taken::New);
                }
                None => {
                    known.push((place, key, id));
                    taken.push(Taken::Conflict);
                }
            }
        }
        for (place, key, id) in known {
            const SQL: &str = "SELECT digest FROM captures WHERE integration = $1 AND id = $2";
            let row = connection.optional(READ, SQL, &[&key, &id]).await?;
            let same = row.is_some_and(|row| {
                row.get::<_, Uuid>(0).as_bytes().as_slice() == piece[place].digest
            });
            if same {
                taken[place] = Taken::Known;
            }
        }
        let (keys, events, bytes) = columns(&rows.loads);
        let work = async {
            let (lanes, replayed, seqs) = &rows.queue;
            let [identify_sizes, track_sizes] = &rows.sizes;
            let [identify, track] = &rows.payloads;
            let queue: [&(dyn ToSql + Sync); 7] = [
                lanes,
                replayed,
                seqs,
                identify_sizes,
                track_sizes,
                identify,
                track,
            ];
            connection.execute(QUEUE, &queue).await?;
            let (keys_of_dead, seqs, events_of_dead, reasons, times, accepted) = &rows.dead;
            let sizes: Vec<i32> = rows
                .dead_payloads
                .iter()
                .map(|one| i32::try_from(unsealed_len(one)).unwrap_or(i32::MAX))
                .collect();
            let dead: [&(dyn ToSql + Sync); 8] = [
                keys_of_dead,
                seqs,
                events_of_dead,
                reasons,
                times,
                accepted,
                &sizes,
                &rows.dead_payloads,
            ];
            connection.execute(DEAD, &dead).await?;
            let counted: [&(dyn ToSql + Sync); 5] =
                [&session.relay, &keys, &events, &bytes, &OTHER_SLOT];
            connection.execute(COUNT, &counted).await?;
            connection.batch_execute("COMMIT").await
        };
        connection.commit(Effect::Commit, work).await?;
        Ok(taken)
    }
}

fn place_of(session: &Session, capture: &Exported) -> Result<(i64, Uuid, i64), OutboxError> {
    let key = session.key(&capture.integration_id);
    let key = key.ok_or_else(|| damaged("integration"))?;
    let (region, shard) = match &capture.lane {
        Some(lane) => (lane.region, lane.shard),
        None => (decoded(capture)?.region, 0),
    };
    Ok((
        key,
        id_of(&capture.capture_id),
        lane_number(key, region, shard),
    ))
}

type Parameter = Box<dyn ToSql + Sync + Send>;

/// The statement that stores a piece's captures, and its parameters.
fn captures(
    session: &Session,
    piece: &[Exported],
) -> Result<(&'static str, Vec<Parameter>), OutboxError> {
    let (mut keys, mut ids, mut lanes) = (Vec::new(), Vec::new(), Vec::new());
    let (mut versions, mut accepted, mut queued) = (Vec::new(), Vec::new(), Vec::new());
    let (mut identify, mut track, mut attempts) = (Vec::new(), Vec::new(), Vec::new());
    let (mut digests, mut subjects) = (Vec::new(), Vec::new());
    let (mut names, mut traces) = (Vec::new(), Vec::new());
    for capture in piece {
        let (key, id, lane) = place_of(session, capture)?;
        let decoded = decoded(capture)?;
        let digest: [u8; 16] = capture.digest.as_slice().try_into().unwrap_or_default();
        keys.push(key);
        ids.push(id);
        lanes.push(lane);
        digests.push(Uuid::from_bytes(digest));
        subjects.push((capture.subject != 0).then_some(capture.subject));
        versions.push(decoded.mapping_version.cast_signed());
        accepted.push(decoded.accept_time.0);
        queued.push(decoded.queue_time.0);
        names.push(capture.capture_id.clone());
        identify.push(record::encode_status(decoded.event(EventType::Identify)));
        track.push(record::encode_status(decoded.event(EventType::Track)));
        attempts.push(record::encode_attempts(&decoded.attempts));
        traces.push(decoded.trace.map(|trace| trace.to_bytes().to_vec()));
    }
    let parameters: Vec<Parameter> = vec![
        Box::new(keys),
        Box::new(lanes),
        Box::new(ids),
        Box::new(digests),
        Box::new(subjects),
        Box::new(versions),
        Box::new(accepted),
        Box::new(queued),
        Box::new(names),
        Box::new(identify),
        Box::new(track),
        Box::new(attempts),
        Box::new(traces),
    ];
    Ok((CAPTURES, parameters))
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
    RETURNING seq, integration, id";

const QUEUE: &str = "
    INSERT INTO queue (lane, replayed, seq, identify_bytes, track_bytes, identify, track)
    SELECT * FROM unnest($1::int8[], $2::bool[], $3::int8[], $4::int4[], $5::int4[],
        $6::bytea[], $7::bytea[])";

const DEAD: &str = "
    INSERT INTO dead_letters (integration, seq, event, reason, dead_millis, accept_millis, bytes,
        payload)
    SELECT * FROM unnest($1::int8[], $2::int8[], $3::int2[], $4::int4[], $5::int8[], $6::int8[],
        $7::int4[], $8::bytea[])";
