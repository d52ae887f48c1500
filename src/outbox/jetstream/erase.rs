//! Erases a person's captures. Whatever fails on the way, the same call finds what is left and goes on:
//! records say whose they are until all else is gone.

mod found;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use prost::Message;

use self::found::Erased;
use super::{
    Shared,
    chunk::pack,
    dead_letters::place,
    deleter::for_each,
    lanes::Hold,
    message::{LaneRecord, Waiting},
    position::{position, split},
    queue::ReadChunk,
    wire::{StoreError, ToStore, unavailable},
};
use crate::{
    event::EventType,
    outbox::{Erasure, LaneKey, OutboxError, SubjectQuery},
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
};

/// Captures of one batch: each may change another message of a queue.
const CHUNK: usize = 50;
/// Tries after others have changed records.
const TRIES: u32 = 10;

/// What a batch changes of a lane.
struct Change {
    record: LaneRecord,
    /// The messages as they are from now on, and their queues.
    chunks: Vec<(usize, ReadChunk)>,
}

/// What is to be told of captures whose history was forgotten.
struct Forgotten {
    announced: Vec<(CaptureRecord, Vec<EventType>)>,
    /// Where events waited.
    waited: Vec<u64>,
    /// Attempts, waiting events, dead letters.
    sums: [u64; 3],
}

/// Forgets histories in the records, which are not stored yet.
fn forget(captures: &mut [Erased]) -> Forgotten {
    let mut forgotten = Forgotten {
        announced: Vec::new(),
        waited: Vec::new(),
        sums: [0; 3],
    };
    for one in captures {
        let counts = [one.record.attempts.len() as u64, one.waits, one.dead];
        for (sum, count) in forgotten.sums.iter_mut().zip(counts) {
            *sum += count;
        }
        let was_final = one.record.is_final();
        let first = one.places.first().filter(|(_, has)| *has && !was_final);
        forgotten
            .waited
            .extend(first.map(|(position, _)| *position));
        let changed = one.record.forget_history();
        // The place stays known, until nothing is there any more.
        let place = one.stored.position(one.revision);
        one.stored.set(&one.record);
        one.stored.queue_at(place.unwrap_or(0));
        forgotten.announced.push((one.record.clone(), changed));
    }
    forgotten
}

/// Notes the revisions of erased records, from the first on, also in what was leased: a request
/// that took too long may still be settled.
fn note_erased(mut hold: Option<&mut Hold>, captures: &mut [Erased], first: u64) {
    for (one, revision) in captures.iter_mut().zip(first..) {
        one.revision = revision;
        let leased = hold.iter_mut().flat_map(|hold| &mut hold.leased);
        for leased in leased.filter(|it| it.stored.capture_id == one.stored.capture_id) {
            leased.revision = revision;
            leased.stored = one.stored.clone();
            leased.record = one.record.clone();
            leased.done = true;
        }
    }
}

impl Shared {
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
            let mut tries = 0;
            while !self
                .erase_some(some, &wanted, &erasure.subject, &mut receipt)
                .await?
            {
                tries += 1;
                if tries == TRIES {
                    return Err(unavailable("records change all the time"));
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
        // In an order that is the same for all, since others may take some too.
        let lanes: BTreeSet<LaneKey> = found.iter().filter_map(Erased::lane).collect();
        let mut pins = Vec::new();
        for lane in &lanes {
            pins.push(self.take_lane(lane).await?);
        }
        let found = self.to_erase(subjects, wanted, query).await?;
        let mut groups: HashMap<(usize, Option<LaneKey>), Vec<Erased>> = HashMap::new();
        for one in found {
            let key = (self.layout.partition(&one.id), one.lane());
            groups.entry(key).or_default().push(one);
        }
        for ((partition, lane), captures) in groups {
            if lane.as_ref().is_some_and(|lane| !lanes.contains(lane)) {
                return Ok(false);
            }
            let own = (partition, lane.as_ref());
            if !self.erase_batch(own, captures, receipt).await? {
                return Ok(false);
            }
        }
        drop(pins);
        Ok(true)
    }

    /// Erases captures of one partition that are in messages of one lane or of none.
    async fn erase_batch(
        &self,
        (partition, lane): (usize, Option<&LaneKey>),
        mut captures: Vec<Erased>,
        receipt: &mut ErasureReceipt,
    ) -> Result<bool, OutboxError> {
        let stream = self.layout.stream(partition);
        let slot = lane.map(|lane| self.lanes.slot(lane));
        let mut guard = match &slot {
            Some(slot) => Some(slot.hold.lock().await),
            None => None,
        };
        let Forgotten {
            announced,
            waited,
            sums,
        } = forget(&mut captures);
        let (mut batch, mut change) = (Vec::new(), None);
        if let (Some(lane), Some(guard)) = (lane, &guard) {
            // Leased again meanwhile: what is erased now may be on its way.
            let is_idle = |hold: &&Hold| !hold.is_in_flight(self.guard());
            let Some(hold) = guard.as_ref().filter(is_idle) else {
                return Ok(false);
            };
            let Some(next) = self.change(lane, hold, &captures, &waited).await? else {
                return Ok(false);
            };
            batch = self.changed(lane, hold.revision, &next);
            change = Some(next);
        }
        let before = batch.len() as u64;
        batch.extend(captures.iter().map(|one| self.erased_record(one)));
        // Until all is known to be done, whoever goes on reads again what the lane has.
        let mut hold = guard.as_mut().and_then(|guard| guard.take());
        let Some(first) = self.store_or_conflict(batch).await? else {
            return Ok(false);
        };
        let [attempts, waiting, dead] = sums;
        receipt.attempt_count += attempts;
        receipt.waiting_event_count += waiting;
        receipt.dead_letter_count += dead;
        receipt.payload_count += waiting + dead;
        if let (Some(hold), Some(change)) = (&mut hold, change) {
            (hold.revision, hold.record) = (first, change.record);
            for (queue, chunk) in &change.chunks {
                hold.replaced[*queue].insert(chunk.sequence);
                self.wire.delete(&stream, chunk.stored_at, true).await?;
            }
        }
        if let Some(lane) = lane {
            self.counts.remove(lane, waited.len() as u64);
        }
        note_erased(hold.as_mut(), &mut captures, first + before);
        let done = self.forget_owner(&stream, captures).await?;
        if let Some(guard) = &mut guard {
            **guard = hold;
        }
        drop(guard);
        self.announce(announced, UnixMillis::now()).await;
        // Whoever holds the lane goes on behind what was erased.
        if let Some(lane) = lane {
            self.tell_lanes(std::slice::from_ref(lane)).await;
        }
        Ok(done)
    }

    /// The lane's record and messages.
    fn changed(&self, lane: &LaneKey, revision: u64, next: &Change) -> Vec<ToStore> {
        let chunks = next.chunks.iter().map(|(queue, chunk)| {
            let count = chunk.captures.len();
            ToStore {
                subject: self.layout.replaced(lane, *queue, chunk.sequence, count),
                payload: pack(chunk.captures.clone()),
                expected: None,
                keep: None,
            }
        });
        let mut messages = vec![ToStore {
            subject: self.layout.lane(lane),
            payload: next.record.encode_to_vec().into(),
            expected: Some(revision),
            keep: None,
        }];
        messages.extend(chunks);
        messages
    }

    fn erased_record(&self, one: &Erased) -> ToStore {
        ToStore {
            subject: one.subject.clone(),
            payload: one.stored.encode_to_vec().into(),
            expected: Some(one.revision),
            keep: Some(self.options.remember),
        }
    }

    async fn store_or_conflict(&self, batch: Vec<ToStore>) -> Result<Option<u64>, OutboxError> {
        match self.wire.store(batch).await {
            Ok(first) => Ok(Some(first)),
            Err(StoreError::Conflict) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The lane's messages without what is erased, and its record; `None` where one of them was
    /// settled meanwhile.
    async fn change(
        &self,
        lane: &LaneKey,
        hold: &Hold,
        captures: &[Erased],
        waited: &[u64],
    ) -> Result<Option<Change>, OutboxError> {
        let mut places: BTreeMap<u64, Vec<(usize, &Erased)>> = BTreeMap::new();
        for one in captures {
            for (position, _) in one.places.iter().filter(|(_, has_payloads)| *has_payloads) {
                let (sequence, index) = split(*position);
                places.entry(sequence).or_default().push((index, one));
            }
        }
        let mut record = hold.record.clone();
        let mut chunks = Vec::new();
        for (sequence, erased) in places {
            let Some((queue, mut chunk)) = self.chunk_at(lane, sequence).await? else {
                continue;
            };
            for (index, one) in erased {
                let position = position(sequence, index);
                // Whoever reads this message has to read their records first.
                record.touched[queue] = record.touched[queue].max(position);
                if waited.contains(&position) {
                    if position < record.cursor(queue) {
                        return Ok(None);
                    }
                    record.beyond[queue] += 1;
                }
                if let Some(waiting) = chunk.captures.get_mut(index) {
                    let mut stored = one.stored.clone();
                    stored.forget_owner();
                    *waiting = Waiting {
                        record: Some(stored),
                        ..Waiting::default()
                    };
                }
            }
            chunks.push((queue, chunk));
        }
        Ok(Some(Change { record, chunks }))
    }

    /// Removes dead letters and older versions of records; at last, nobody finds them as this person's
    /// any more. Returns whether that was done, or others were faster.
    async fn forget_owner(
        &self,
        stream: &str,
        mut captures: Vec<Erased>,
    ) -> Result<bool, OutboxError> {
        let mut removals = Vec::new();
        for one in &captures {
            removals.push(self.remove_letters(stream, one));
        }
        for_each(removals).await?;
        let mut batch = Vec::with_capacity(captures.len());
        for one in &mut captures {
            one.stored.forget_owner();
            batch.push(self.erased_record(one));
        }
        let Some(first) = self.store_or_conflict(batch).await? else {
            return Ok(false);
        };
        let mut removals = Vec::new();
        for (one, revision) in captures.iter().zip(first..) {
            removals.push(self.wire.purge_before(stream, &one.subject, revision));
        }
        for_each(removals).await?;
        Ok(true)
    }

    async fn remove_letters(&self, stream: &str, one: &Erased) -> Result<(), OutboxError> {
        for event in EventType::ALL {
            let subject = self.layout.dead(&one.id, &one.stored.capture_id, event);
            while let Some((letter, _)) = self.wire.last(stream, &subject).await? {
                self.wire.delete(stream, letter.sequence, true).await?;
            }
        }
        Ok(())
    }
}
