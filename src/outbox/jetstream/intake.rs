//! Stores captures: those that arrive while a batch is under way share the next one.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;
use tokio::sync::{mpsc, oneshot};

use super::{
    Shared,
    message::{Payload, StoredRecord, Waiting, decode},
    wire::{StoreError, ToStore},
};
use crate::{
    integration::IntegrationId,
    outbox::{Content, LaneKey, OutboxError, Quota, Submitted, record, sealing::SealedCapture},
    status::{CaptureRecord, EventStatus, State},
};

/// Captures of one batch: the servers take 1,000 messages, and each capture is two.
pub(super) const BATCH_CAPTURES: usize = 450;
/// Bytes of one batch, about.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Batches of a relay that are under way at once at a stream. Each integration has its place
/// in one of them, so that its captures keep their order.
const AT_ONCE: usize = 4;
/// Submissions that wait; a full queue makes callers wait.
const QUEUE: usize = 4_096;
/// How long a batch without a clear answer is tried again.
const TRY_FOR: Duration = Duration::from_secs(8);
/// Wait before that.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// Captures to store, and who waits for the answer.
pub(super) struct Submission {
    pub(super) captures: Vec<SealedCapture>,
    pub(super) reply: oneshot::Sender<Result<Vec<Submitted>, OutboxError>>,
}

pub(super) type IntakeSender = mpsc::Sender<Submission>;

pub(super) fn channel() -> (IntakeSender, mpsc::Receiver<Submission>) {
    mpsc::channel(QUEUE)
}

/// How many intakes the partitions have together.
pub(super) fn count(partitions: usize) -> usize {
    partitions * AT_ONCE
}

/// The intake of an integration.
pub(super) fn place(shared: &Shared, id: &IntegrationId) -> usize {
    let hash = crc32fast::hash(id.as_str().as_bytes());
    shared.layout.partition(id) * AT_ONCE + hash as usize % AT_ONCE
}

/// The partition of an intake.
pub(super) fn partition(place: usize) -> usize {
    place / AT_ONCE
}

/// A submission of which some captures are still to be stored.
struct Open {
    left: std::vec::IntoIter<SealedCapture>,
    done: Vec<Submitted>,
    reply: oneshot::Sender<Result<Vec<Submitted>, OutboxError>>,
}

/// A capture of the batch in the making.
struct Item {
    key: (IntegrationId, String),
    digest: [u8; 16],
    mark: u64,
    record: CaptureRecord,
    lane: Option<LaneKey>,
    bytes: usize,
    messages: Vec<ToStore>,
}

/// What becomes of a capture that was taken out of its submission.
enum Fate {
    Known(Submitted),
    /// There is no room, unless it is stored already.
    Full(Quota, (IntegrationId, String), [u8; 16]),
    /// As the item of this place.
    Item(usize),
    /// A repetition of the item of this place, with this digest.
    Repeats(usize, [u8; 16]),
}

/// Stores what arrives, one batch after the other, until the outbox closes.
pub(super) async fn run(
    shared: Arc<Shared>,
    partition: usize,
    mut arriving: mpsc::Receiver<Submission>,
) {
    let stream = shared.layout.stream(partition);
    let mut open: Vec<Open> = Vec::new();
    loop {
        if open.is_empty() {
            let next = tokio::select! {
                () = shared.closing.cancelled() => return,
                next = arriving.recv() => next,
            };
            let Some(next) = next else { return };
            open.push(Open::new(next));
        }
        let mut waiting: usize = open.iter().map(|one| one.left.len()).sum();
        while waiting < BATCH_CAPTURES {
            let Ok(next) = arriving.try_recv() else { break };
            waiting += next.captures.len();
            open.push(Open::new(next));
        }
        let begun = Instant::now();
        let (items, mut fates) = collect(&shared, &mut open);
        let count = items.len() as u64;
        let stored = async {
            let answers = store(&shared, &stream, items).await?;
            find_among_refused(&shared, &stream, &mut fates).await?;
            Ok::<_, OutboxError>(answers)
        };
        let stored = stored.await;
        shared
            .options
            .metrics
            .commit(count, begun.elapsed(), stored.is_ok());
        match stored {
            Ok(answers) => answer(&mut open, fates, &answers),
            Err(error) => {
                for one in open.drain(..) {
                    let _ = one.reply.send(Err(error.clone()));
                }
            }
        }
    }
}

impl Open {
    fn new(submission: Submission) -> Self {
        Self {
            done: Vec::with_capacity(submission.captures.len()),
            left: submission.captures.into_iter(),
            reply: submission.reply,
        }
    }
}

/// Takes captures for one batch, and for each the place of its submission.
fn collect(shared: &Shared, open: &mut [Open]) -> (Vec<Item>, Vec<(usize, Fate)>) {
    let (mut items, mut fates) = (Vec::<Item>::new(), Vec::new());
    let mut places: HashMap<(IntegrationId, String), usize> = HashMap::new();
    let mut own: HashMap<IntegrationId, u64> = HashMap::new();
    let (mut all, mut bytes) = (0, 0);
    for (place, one) in open.iter_mut().enumerate() {
        while items.len() < BATCH_CAPTURES && bytes < BATCH_BYTES {
            let Some(sealed) = one.left.next() else { break };
            let capture = &sealed.capture;
            let key = (capture.integration_id.clone(), capture.capture_id.clone());
            if let Some(first) = places.get(&key) {
                fates.push((place, Fate::Repeats(*first, capture.digest)));
                continue;
            }
            if let Content::Send { events, .. } = &capture.content {
                let size = events.identify.len() + events.track.len();
                let more = own.entry(key.0.clone()).or_default();
                if let Some(quota) = shared.counts.full(&key.0, size, (*more, all)) {
                    fates.push((place, Fate::Full(quota, key, capture.digest)));
                    continue;
                }
                (*more, all) = (*more + 1, all + 1);
            }
            let item = prepare(shared, sealed);
            bytes += item.bytes;
            places.insert(key, items.len());
            fates.push((place, Fate::Item(items.len())));
            items.push(item);
        }
    }
    (items, fates)
}

fn prepare(shared: &Shared, sealed: SealedCapture) -> Item {
    let SealedCapture { capture, subject } = sealed;
    let state = match &capture.content {
        Content::Send { .. } => State::Queued,
        Content::Skip { reason } => State::Skipped { reason: *reason },
    };
    let record = CaptureRecord {
        integration_id: capture.integration_id.clone(),
        capture_id: capture.capture_id.clone(),
        region: capture.region,
        mapping_version: capture.mapping_version,
        accept_time: capture.accept_time,
        trace: capture.trace,
        queue_time: capture.accept_time,
        identify: EventStatus::new(state),
        track: EventStatus::new(state),
        attempts: Vec::new(),
    };
    let lane = match &capture.content {
        Content::Skip { .. } => None,
        Content::Send { shard, .. } => Some(LaneKey {
            integration_id: capture.integration_id.clone(),
            region: capture.region,
            shard: *shard,
        }),
    };
    let stored = StoredRecord {
        capture_id: capture.capture_id.clone(),
        digest: capture.digest.to_vec(),
        status: record::encode(&record),
        subject: subject.unwrap_or(0),
        mark: fastrand::u64(1..),
        shard: lane.as_ref().map(|lane| u32::from(lane.shard)),
        queued_at: 0,
    };
    let mut messages = vec![ToStore {
        subject: shared
            .layout
            .record(&record.integration_id, &record.capture_id),
        payload: stored.encode_to_vec().into(),
        expected: Some(0),
        keep: Some(shared.options.remember),
    }];
    let mut bytes = 0;
    let mark = stored.mark;
    if let (Content::Send { events, .. }, Some(lane)) = (capture.content, &lane) {
        bytes = events.identify.len() + events.track.len();
        let waiting = Waiting {
            record: Some(stored),
            identify: Some(Payload::new(events.identify)),
            track: Some(Payload::new(events.track)),
        };
        messages.push(ToStore {
            subject: shared.layout.queue(lane, 0),
            payload: waiting.encode_to_vec().into(),
            expected: None,
            keep: None,
        });
    }
    Item {
        key: (capture.integration_id, capture.capture_id),
        digest: capture.digest,
        mark,
        record,
        lane,
        bytes,
        messages,
    }
}

/// What became of an item, what is stored, and the digest of that.
struct Answered {
    submitted: Submitted,
    record: CaptureRecord,
    digest: [u8; 16],
}

/// Stores the items, in as many tries as it takes to know what became of each.
async fn store(
    shared: &Shared,
    stream: &str,
    items: Vec<Item>,
) -> Result<Vec<Answered>, OutboxError> {
    let deadline = Instant::now() + TRY_FOR;
    let mut answers: Vec<Option<Answered>> = items.iter().map(|_| None).collect();
    let mut left: Vec<(usize, Item)> = items.into_iter().enumerate().collect();
    while !left.is_empty() {
        let batch = left
            .iter()
            .flat_map(|(_, item)| item.messages.iter().cloned())
            .collect();
        match shared.wire.store(batch).await {
            Ok(_) => {
                shared.signals.set_writable(true);
                accepted(shared, &mut left, &mut answers).await;
            }
            Err(StoreError::Conflict) => {
                if !find_known(shared, stream, &mut left, &mut answers).await? {
                    if Instant::now() > deadline {
                        return Err(StoreError::Conflict.into());
                    }
                    // Another relay stores one of them at this moment.
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(2..20))).await;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "captures cannot be stored; trying again");
                let unclear = matches!(error, StoreError::Unknown(_));
                if Instant::now() > deadline || (!unclear && shared.closing.is_cancelled()) {
                    shared.signals.set_writable(false);
                    return Err(error.into());
                }
                tokio::time::sleep(TRY_AGAIN).await;
            }
        }
    }
    Ok(answers.into_iter().flatten().collect())
}

async fn accepted(
    shared: &Shared,
    left: &mut Vec<(usize, Item)>,
    answers: &mut [Option<Answered>],
) {
    let mut lanes: HashMap<LaneKey, (u64, usize)> = HashMap::new();
    let mut changes = Vec::new();
    let watched = shared.signals.is_watched() || shared.sessions.others_watch();
    for (place, item) in left.drain(..) {
        if watched {
            changes.push(item.record.clone());
        }
        if let Some(lane) = item.lane {
            let sum = lanes.entry(lane).or_default();
            *sum = (sum.0 + 1, sum.1 + item.bytes);
        }
        answers[place] = Some(Answered {
            submitted: Submitted::Accepted(Arc::new(item.record.clone())),
            record: item.record,
            digest: item.digest,
        });
    }
    for (lane, (captures, bytes)) in &lanes {
        shared.counts.add(lane, *captures, *bytes);
    }
    let lanes: Vec<LaneKey> = lanes.into_keys().collect();
    shared.announce_accepted(changes).await;
    if !lanes.is_empty() {
        shared.tell_lanes(&lanes).await;
    }
}

/// Finds the items that are stored already. Returns whether there were any.
async fn find_known(
    shared: &Shared,
    stream: &str,
    left: &mut Vec<(usize, Item)>,
    answers: &mut [Option<Answered>],
) -> Result<bool, OutboxError> {
    let subjects: Vec<String> = left
        .iter()
        .filter_map(|(_, item)| item.messages.first())
        .map(|message| message.subject.clone())
        .collect();
    let mut known = HashMap::new();
    for stored in shared.wire.last_of_each(stream, &subjects).await? {
        known.insert(
            stored.subject,
            decode::<StoredRecord>("record", &stored.payload)?,
        );
    }
    let mut own = Vec::new();
    let mut still = Vec::new();
    for (place, item) in left.drain(..) {
        let subject = item.messages.first().map(|message| &message.subject);
        let Some(stored) = subject.and_then(|subject| known.get(subject)) else {
            still.push((place, item));
            continue;
        };
        if stored.mark == item.mark {
            // An earlier try whose answer was lost.
            own.push((place, item));
            continue;
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(stored.digest.get(..16).unwrap_or(&[0; 16]));
        let record = stored.open(&item.key.0)?;
        let submitted = if digest == item.digest && stored.capture_id == item.key.1 {
            Submitted::Duplicate(Arc::new(record.clone()))
        } else {
            Submitted::Conflict
        };
        answers[place] = Some(Answered {
            submitted,
            record,
            digest,
        });
    }
    *left = still;
    let any = !known.is_empty();
    accepted(shared, &mut own, answers).await;
    Ok(any)
}

/// Repetitions need no room: looks for them among those that found none.
async fn find_among_refused(
    shared: &Shared,
    stream: &str,
    fates: &mut [(usize, Fate)],
) -> Result<(), OutboxError> {
    let subject = |(id, capture_id): &(IntegrationId, String)| shared.layout.record(id, capture_id);
    let mut subjects: Vec<String> = Vec::new();
    for (_, fate) in fates.iter() {
        if let Fate::Full(_, key, _) = fate {
            subjects.push(subject(key));
        }
    }
    let mut known = HashMap::new();
    for some in subjects.chunks(BATCH_CAPTURES) {
        for stored in shared.wire.last_of_each(stream, some).await? {
            known.insert(
                stored.subject,
                decode::<StoredRecord>("record", &stored.payload)?,
            );
        }
    }
    for (_, fate) in fates.iter_mut() {
        let Fate::Full(quota, key, digest) = fate else {
            continue;
        };
        *fate = Fate::Known(match known.get(&subject(key)) {
            None => Submitted::Full(*quota),
            Some(stored) if stored.digest == digest.as_slice() => {
                Submitted::Duplicate(Arc::new(stored.open(&key.0)?))
            }
            Some(_) => Submitted::Conflict,
        });
    }
    Ok(())
}

/// Answers the submissions of which nothing is left.
fn answer(open: &mut Vec<Open>, fates: Vec<(usize, Fate)>, answers: &[Answered]) {
    for (place, fate) in fates {
        let submitted = match fate {
            Fate::Known(submitted) => submitted,
            Fate::Full(quota, ..) => Submitted::Full(quota),
            Fate::Item(item) => match answers.get(item) {
                Some(answered) => answered.submitted.clone(),
                None => continue,
            },
            Fate::Repeats(item, digest) => match answers.get(item) {
                Some(stored) if stored.digest == digest => {
                    Submitted::Duplicate(Arc::new(stored.record.clone()))
                }
                _ => Submitted::Conflict,
            },
        };
        open[place].done.push(submitted);
    }
    let mut left = Vec::new();
    for mut one in open.drain(..) {
        if one.left.len() == 0 {
            let _ = one.reply.send(Ok(std::mem::take(&mut one.done)));
        } else {
            left.push(one);
        }
    }
    *open = left;
}
