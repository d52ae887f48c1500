//! Stores captures: those that arrive while a batch is under way share the next one.

mod items;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use tokio::sync::{mpsc, oneshot};

use self::items::{Answered, Item, store};
use super::{
    Shared,
    message::{StoredRecord, decode},
    outcomes::Version,
};
use crate::{
    integration::IntegrationId,
    outbox::{Content, LaneKey, OutboxError, Quota, Submitted, sealing::SealedCapture},
};

/// Captures and lanes of one batch: the servers take 1,000 messages, of which each capture
/// is one, and each lane one for each 64 KiB at the most.
pub(super) const BATCH_CAPTURES: usize = 900;
/// Bytes of events of one batch, about.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Subjects that are asked for at once.
const READ: usize = 500;
/// Batches of a relay that are under way at once at a stream. Each integration has its place
/// in one of them, so that its captures keep their order.
const AT_ONCE: usize = 4;
/// Submissions that wait; a full queue makes callers wait.
const QUEUE: usize = 4_096;

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
    let mut lanes: HashSet<LaneKey> = HashSet::new();
    let (mut all, mut bytes) = (0, 0);
    for (place, one) in open.iter_mut().enumerate() {
        while items.len() + lanes.len() < BATCH_CAPTURES && bytes < BATCH_BYTES {
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
            let item = Item::new(sealed, shared.options.remember);
            bytes += item.bytes;
            if let Some((lane, _)) = item.waiting.as_ref().filter(|one| !lanes.contains(&one.0)) {
                lanes.insert(lane.clone());
            }
            places.insert(key, items.len());
            fates.push((place, Fate::Item(items.len())));
            items.push(item);
        }
    }
    (items, fates)
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
    for some in subjects.chunks(READ) {
        for stored in shared.wire.last_of_each(stream, some).await? {
            let record: StoredRecord = decode("record", stored.payload)?;
            known.insert(stored.subject, (stored.sequence, record));
        }
    }
    let (mut places, mut repeated) = (Vec::new(), Vec::<Version>::new());
    for (place, (_, fate)) in fates.iter_mut().enumerate() {
        let Fate::Full(quota, key, digest) = fate else {
            continue;
        };
        let submitted = match known.get(&subject(key)) {
            None => Submitted::Full(*quota),
            Some((revision, stored)) if stored.digest == digest.as_slice() => {
                places.push(place);
                repeated.push((key.0.clone(), *revision, stored.clone()));
                continue;
            }
            Some(_) => Submitted::Conflict,
        };
        *fate = Fate::Known(submitted);
    }
    let statuses = shared.statuses(&repeated).await?;
    for (place, record) in places.into_iter().zip(statuses) {
        fates[place].1 = Fate::Known(Submitted::Duplicate(Arc::new(record)));
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
