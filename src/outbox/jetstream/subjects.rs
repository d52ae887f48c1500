//! A person's data: found by reading all records, and erased.

use std::collections::{BTreeMap, HashMap, HashSet};

use prost::Message;

use super::{
    Shared,
    dead_letters::{number, place},
    deleter::for_each,
    lanes::Hold,
    message::{StoredRecord, Waiting, decode},
    names::integration_of,
    wire::{StoreError, Stored, ToStore, unavailable},
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{Erasure, FoundSubject, LaneKey, OutboxError, SubjectQuery},
    proto::{DeliveryReason, ErasureReceipt},
    status::{CaptureRecord, EventStatus, State},
    time::UnixMillis,
};

/// Records of one read.
const PAGE: (usize, usize) = (5_000, 8 * 1024 * 1024);
/// Captures of one person that a search finds at the most.
const MAX_FOUND: usize = 100_000;
/// Captures of one batch.
const CHUNK: usize = 400;
/// Tries after others have changed records.
const TRIES: u32 = 10;

/// A capture that is to be erased.
struct Erased {
    id: IntegrationId,
    subject: String,
    revision: u64,
    stored: StoredRecord,
    record: CaptureRecord,
    queued: Option<(u64, Waiting)>,
    dead: usize,
}

impl Shared {
    pub(super) async fn search(&self, query: &SubjectQuery) -> Result<FoundSubject, OutboxError> {
        let wanted: HashSet<i64> = query
            .user_ids
            .iter()
            .map(|id| self.sealing.subject(id))
            .collect();
        let mut found = FoundSubject::default();
        for partition in 0..self.layout.partitions {
            let only = query.integration_id.as_ref();
            if only.is_some_and(|id| self.layout.partition(id) != partition) {
                continue;
            }
            let filter = self.layout.all(partition, 'c', only);
            let stream = self.layout.stream(partition);
            let (mut from, mut known) = (0, HashSet::new());
            loop {
                let page = self.wire.read(&stream, &filter, from, PAGE).await?;
                let Some(last) = page.last() else { break };
                from = last.sequence + 1;
                for one in page {
                    let record: StoredRecord = decode("record", &one.payload)?;
                    if !wanted.contains(&record.subject) || record.subject == 0 {
                        continue;
                    }
                    let Some(id) = integration_of(&one.subject, 1) else {
                        continue;
                    };
                    // The first version is there for longest; the last one says where it waits.
                    let opened = record.open(&id)?;
                    if !opened.is_final() {
                        found.lanes.extend(record.lane(&opened));
                    }
                    if known.insert(one.subject) && found.captures.len() < MAX_FOUND {
                        found.captures.push(number(partition, one.sequence));
                    }
                }
            }
        }
        found.lanes.sort_unstable();
        found.lanes.dedup();
        let waiting = self.waiting(query.integration_id.as_ref()).await?;
        found.lanes.retain(|lane| waiting.contains_key(lane));
        Ok(found)
    }

    /// The message in which a capture waits.
    pub(super) async fn queued(
        &self,
        partition: usize,
        revision: u64,
        stored: &StoredRecord,
    ) -> Result<Option<(u64, Waiting)>, OutboxError> {
        let sequence = match stored.queued_at {
            0 => revision + 1,
            sequence => sequence,
        };
        let found = self
            .wire
            .at(&self.layout.stream(partition), sequence)
            .await?;
        let queues = self.layout.all(partition, 'q', None);
        let below = queues.trim_end_matches('>');
        let Some(found) = found.filter(|one| one.subject.starts_with(below)) else {
            return Ok(None);
        };
        let waiting: Waiting = decode("capture", &found.payload)?;
        let is_it = waiting
            .record
            .as_ref()
            .is_some_and(|one| one.capture_id == stored.capture_id);
        Ok(is_it.then_some((sequence, waiting)))
    }

    pub(super) async fn erase_captures(
        &self,
        erasure: &Erasure,
    ) -> Result<ErasureReceipt, OutboxError> {
        let mut receipt = erasure.receipt.clone();
        let wanted: HashSet<i64> = erasure
            .subject
            .user_ids
            .iter()
            .map(|id| self.sealing.subject(id))
            .collect();
        let mut reads = Vec::new();
        for capture in &erasure.captures {
            reads.push(self.subject_at(*capture));
        }
        let subjects: HashSet<(usize, String)> =
            for_each(reads).await?.into_iter().flatten().collect();
        let subjects: Vec<_> = subjects.into_iter().collect();
        for some in subjects.chunks(CHUNK) {
            for _ in 0..TRIES {
                if self
                    .erase_some(some, &wanted, &erasure.subject, &mut receipt)
                    .await?
                {
                    break;
                }
            }
        }
        self.state.put_receipt(&self.sealing, &mut receipt).await?;
        Ok(receipt)
    }

    async fn subject_at(&self, capture: i64) -> Result<Option<(usize, String)>, OutboxError> {
        let (partition, sequence) = place(capture);
        if partition >= self.layout.partitions {
            return Ok(None);
        }
        let found = self
            .wire
            .at(&self.layout.stream(partition), sequence)
            .await?;
        Ok(found.map(|one| (partition, one.subject)))
    }

    /// Erases some captures; returns whether that was done, or others were faster.
    async fn erase_some(
        &self,
        subjects: &[(usize, String)],
        wanted: &HashSet<i64>,
        query: &SubjectQuery,
        receipt: &mut ErasureReceipt,
    ) -> Result<bool, OutboxError> {
        // First the lanes: while they are held here, nothing of them is sent elsewhere.
        let found = self.to_erase(subjects, wanted, query).await?;
        let lanes: BTreeMap<LaneKey, ()> = found
            .iter()
            .filter(|one| one.queued.is_some())
            .filter_map(|one| one.stored.lane(&one.record))
            .map(|lane| (lane, ()))
            .collect();
        let mut pins = Vec::new();
        for lane in lanes.keys() {
            pins.push(self.take_lane(lane).await?);
        }
        let found = self.to_erase(subjects, wanted, query).await?;
        let mut by_lane: HashMap<Option<LaneKey>, Vec<Erased>> = HashMap::new();
        for one in found {
            let lane = one
                .queued
                .is_some()
                .then(|| one.stored.lane(&one.record))
                .flatten();
            by_lane.entry(lane).or_default().push(one);
        }
        for (lane, captures) in by_lane {
            let mut partitions: BTreeMap<usize, Vec<Erased>> = BTreeMap::new();
            for one in captures {
                partitions
                    .entry(self.layout.partition(&one.id))
                    .or_default()
                    .push(one);
            }
            for (partition, own) in partitions {
                if !self
                    .erase_batch(partition, lane.as_ref(), own, receipt)
                    .await?
                {
                    return Ok(false);
                }
            }
        }
        drop(pins);
        Ok(true)
    }

    async fn to_erase(
        &self,
        subjects: &[(usize, String)],
        wanted: &HashSet<i64>,
        query: &SubjectQuery,
    ) -> Result<Vec<Erased>, OutboxError> {
        let mut reads = Vec::new();
        for (partition, subject) in subjects {
            reads.push(self.read_to_erase(*partition, subject));
        }
        let found = for_each(reads).await?;
        let mine = |one: &Erased| {
            wanted.contains(&one.stored.subject)
                && query
                    .integration_id
                    .as_ref()
                    .is_none_or(|only| *only == one.id)
        };
        Ok(found.into_iter().flatten().filter(mine).collect())
    }

    async fn read_to_erase(
        &self,
        partition: usize,
        subject: &str,
    ) -> Result<Option<Erased>, OutboxError> {
        let stream = self.layout.stream(partition);
        match self.wire.last(&stream, subject).await? {
            Some((found, _)) => self.erased(partition, found).await,
            None => Ok(None),
        }
    }

    async fn erased(&self, partition: usize, found: Stored) -> Result<Option<Erased>, OutboxError> {
        let Some(id) = integration_of(&found.subject, 1) else {
            return Ok(None);
        };
        let stored: StoredRecord = decode("record", &found.payload)?;
        let record = stored.open(&id)?;
        let queued = match record.is_final() {
            true => None,
            false => self.queued(partition, found.sequence, &stored).await?,
        };
        let mut dead = 0;
        for event in EventType::ALL {
            if matches!(record.event(event).state, State::DeadLettered { .. }) {
                let subject = self.layout.dead(&id, &stored.capture_id, event);
                let letter = self
                    .wire
                    .last(&self.layout.stream(partition), &subject)
                    .await?;
                dead += usize::from(letter.is_some());
            }
        }
        Ok(Some(Erased {
            id,
            subject: found.subject,
            revision: found.sequence,
            stored,
            record,
            queued,
            dead,
        }))
    }

    async fn erase_batch(
        &self,
        partition: usize,
        lane: Option<&LaneKey>,
        mut captures: Vec<Erased>,
        receipt: &mut ErasureReceipt,
    ) -> Result<bool, OutboxError> {
        let stream = self.layout.stream(partition);
        let mut batch = Vec::new();
        let slot = lane.map(|lane| self.lanes.slot(lane));
        let mut guard = match &slot {
            Some(slot) => Some(slot.hold.lock().await),
            None => None,
        };
        let mut lane_record = None;
        if let (Some(lane), Some(guard)) = (lane, &guard) {
            // Leased again meanwhile: what is erased now may be on its way.
            let is_idle = |hold: &&Hold| !hold.is_in_flight(self.guard());
            let Some(hold) = guard.as_ref().filter(is_idle) else {
                return Ok(false);
            };
            let mut record = hold.record.clone();
            // Whoever reads these messages has to read their records first.
            let queued = captures.iter().filter_map(|one| one.queued.as_ref());
            let last = queued.map(|(sequence, _)| *sequence).max().unwrap_or(0);
            for touched in &mut record.touched {
                *touched = (*touched).max(last);
            }
            batch.push(ToStore {
                subject: self.layout.lane(lane),
                payload: record.encode_to_vec().into(),
                expected: Some(hold.revision),
                keep: None,
            });
            lane_record = Some(record);
        }
        let mut changes = Vec::new();
        for one in &mut captures {
            let attempts = one.record.attempts.len() as u64;
            let waiting = |event: &EventType| {
                !one.record.event(*event).state.is_final()
                    && one
                        .queued
                        .as_ref()
                        .is_some_and(|(_, queued)| queued.payload(*event).is_some())
            };
            let waited = EventType::ALL.iter().filter(|event| waiting(event)).count() as u64;
            let changed = forget_history(&mut one.record);
            one.stored.set(&one.record);
            one.stored.queued_at = 0;
            // Nobody finds it as this person's any more.
            one.stored.subject = 0;
            batch.push(ToStore {
                subject: one.subject.clone(),
                payload: one.stored.encode_to_vec().into(),
                expected: Some(one.revision),
                keep: Some(self.options.remember),
            });
            changes.push((
                one.record.clone(),
                changed,
                attempts,
                waited,
                one.dead as u64,
            ));
        }
        let first = match self.wire.store(batch).await {
            Ok(first) => first,
            Err(StoreError::Conflict) => {
                // Read again, also who holds the lane.
                if let Some(guard) = &mut guard {
                    **guard = None;
                }
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        if let (Some(Some(hold)), Some(record)) = (guard.as_deref_mut(), lane_record) {
            (hold.revision, hold.record) = (first, record);
        }
        let mut announced = Vec::new();
        for (record, changed, attempts, waited, dead) in changes {
            receipt.attempt_count += attempts;
            receipt.waiting_event_count += waited;
            receipt.dead_letter_count += dead;
            receipt.payload_count += waited + dead;
            announced.push((record, changed));
        }
        self.remove_erased(&stream, lane, &captures).await?;
        drop(guard);
        self.announce(announced, UnixMillis::now()).await;
        Ok(true)
    }

    /// Removes payloads, dead letters and older versions of records.
    async fn remove_erased(
        &self,
        stream: &str,
        lane: Option<&LaneKey>,
        captures: &[Erased],
    ) -> Result<(), OutboxError> {
        let mut removals = Vec::new();
        for one in captures {
            removals.push(self.remove_one(stream, one));
        }
        for_each(removals).await?;
        if let Some(lane) = lane {
            let waited = captures.iter().filter(|one| one.queued.is_some()).count();
            self.counts.remove(lane, waited as u64);
        }
        Ok(())
    }

    async fn remove_one(&self, stream: &str, one: &Erased) -> Result<(), OutboxError> {
        if let Some((sequence, _)) = &one.queued {
            self.wire.delete(stream, *sequence, true).await?;
        }
        if one.dead > 0 {
            for event in EventType::ALL {
                let subject = self.layout.dead(&one.id, &one.stored.capture_id, event);
                while let Some((letter, _)) = self.wire.last(stream, &subject).await? {
                    self.wire.delete(stream, letter.sequence, true).await?;
                }
            }
        }
        let older = one.revision + 1;
        self.wire.purge_before(stream, &one.subject, older).await
    }

    /// The last version of a record, as the leader has it.
    pub(super) async fn find_record(
        &self,
        id: &IntegrationId,
        capture_id: &str,
    ) -> Result<Option<CaptureRecord>, OutboxError> {
        let subject = self.layout.record(id, capture_id);
        let found = self.wire.last(&self.layout.stream_of(id), &subject).await?;
        let Some((stored, _)) = found else {
            return Ok(None);
        };
        let stored: StoredRecord = decode("record", &stored.payload)?;
        if stored.capture_id != capture_id {
            return Err(unavailable("a record of another capture"));
        }
        stored.open(id).map(Some)
    }
}

/// What is left of a capture: that it was there, and which events were delivered.
/// Returns the events whose state has changed.
fn forget_history(record: &mut CaptureRecord) -> Vec<EventType> {
    record.attempts.clear();
    let mut changed = Vec::new();
    for event in EventType::ALL {
        let state = match record.event(event).state {
            state @ (State::Delivered { .. } | State::Skipped { .. }) => state,
            State::Queued | State::Retrying { .. } | State::DeadLettered { .. } => {
                changed.push(event);
                State::Skipped {
                    reason: DeliveryReason::Erased,
                }
            }
        };
        *record.event_mut(event) = EventStatus::new(state);
    }
    changed
}
