//! The captures of one batch, and how they are stored: in as many tries as it takes to know what became of each.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::super::{
    Shared,
    chunk::{Packer, ToPack},
    message::{Payload, StoredRecord, Waiting, decode},
    outcomes::Version,
    wire::{StoreError, ToStore},
};
use crate::{
    integration::IntegrationId,
    outbox::{Content, LaneKey, OutboxError, Submitted, record, sealing::SealedCapture},
    status::{CaptureRecord, EventStatus, State},
    time::UnixMillis,
};

/// How long a batch without a clear answer is tried again.
const TRY_FOR: Duration = Duration::from_secs(8);
/// Wait before that.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// A capture of the batch in the making.
pub(super) struct Item {
    key: (IntegrationId, String),
    digest: [u8; 16],
    record: CaptureRecord,
    stored: StoredRecord,
    pub(super) waiting: Option<(LaneKey, Waiting)>,
    /// Of its events.
    pub(super) bytes: usize,
}

/// What became of an item, what is stored, and the digest of that.
pub(super) struct Answered {
    pub(super) submitted: Submitted,
    pub(super) record: CaptureRecord,
    pub(super) digest: [u8; 16],
}

impl Item {
    pub(super) fn new(sealed: SealedCapture, remember: Duration) -> Self {
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
        let mut stored = StoredRecord {
            capture_id: capture.capture_id.clone(),
            digest: capture.digest.to_vec(),
            status: record::encode(&record),
            subject: subject.unwrap_or(0),
            mark: fastrand::u64(1..),
            kept_until: UnixMillis::now().plus(remember).0,
            ..StoredRecord::default()
        };
        let (mut bytes, mut waiting) = (0, None);
        match capture.content {
            Content::Skip { .. } => stored.own = true,
            Content::Send { shard, events } => {
                stored.shard = Some(u32::from(shard));
                bytes = events.identify.len() + events.track.len();
                let lane = LaneKey {
                    integration_id: capture.integration_id.clone(),
                    region: capture.region,
                    shard,
                };
                let payloads = Waiting {
                    record: None,
                    identify: Some(Payload::new(events.identify)),
                    track: Some(Payload::new(events.track)),
                };
                waiting = Some((lane, payloads));
            }
        }
        Self {
            key: (capture.integration_id, capture.capture_id),
            digest: capture.digest,
            record,
            stored,
            waiting,
            bytes,
        }
    }

    fn subject(&self, shared: &Shared) -> String {
        shared.layout.record(&self.key.0, &self.key.1)
    }
}

/// The messages of all items together.
fn messages(shared: &Shared, items: &[(usize, Item)]) -> Vec<ToStore> {
    let mut packer = Packer::new(&shared.layout);
    for (_, item) in items {
        let waiting = item.waiting.clone();
        packer.add(ToPack {
            id: item.key.0.clone(),
            stored: item.stored.clone(),
            expected: 0,
            keep: Some(shared.options.remember),
            waiting: waiting.map(|(lane, waiting)| (lane, 0, waiting)),
        });
    }
    packer.finish()
}

/// Stores the items.
pub(super) async fn store(
    shared: &Shared,
    stream: &str,
    items: Vec<Item>,
) -> Result<Vec<Answered>, OutboxError> {
    let deadline = Instant::now() + TRY_FOR;
    let mut answers: Vec<Option<Answered>> = items.iter().map(|_| None).collect();
    let mut left: Vec<(usize, Item)> = items.into_iter().enumerate().collect();
    while !left.is_empty() {
        match shared.wire.store(messages(shared, &left)).await {
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
        if let Some((lane, _)) = item.waiting {
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
    let subjects: Vec<String> = left.iter().map(|(_, item)| item.subject(shared)).collect();
    let mut known = HashMap::new();
    for some in subjects.chunks(super::READ) {
        for found in shared.wire.last_of_each(stream, some).await? {
            let record: StoredRecord = decode("record", found.payload)?;
            known.insert(found.subject, (found.sequence, record));
        }
    }
    let any = !known.is_empty();
    let (mut own, mut still) = (Vec::new(), Vec::new());
    let (mut others, mut versions) = (Vec::new(), Vec::<Version>::new());
    for ((place, item), subject) in left.drain(..).zip(subjects) {
        let Some((revision, stored)) = known.remove(&subject) else {
            still.push((place, item));
            continue;
        };
        if stored.mark == item.stored.mark {
            // An earlier try whose answer was lost.
            own.push((place, item));
            continue;
        }
        versions.push((item.key.0.clone(), revision, stored));
        others.push((place, item));
    }
    *left = still;
    let statuses = shared.statuses(&versions).await?;
    for (((place, item), (_, _, stored)), record) in others.into_iter().zip(versions).zip(statuses)
    {
        let mut digest = [0; 16];
        digest.copy_from_slice(stored.digest.get(..16).unwrap_or(&[0; 16]));
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
    accepted(shared, &mut own, answers).await;
    Ok(any)
}
