//! Reads the first waiting captures of a lane.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    Shared,
    lanes::{Hold, Leased},
    message::{Payload, StoredRecord, Waiting, decode},
    position::{position, split},
    queue::ReadChunk,
    wire::unavailable,
};
use crate::{
    event::EventType,
    outbox::{LaneKey, LeaseBudget, LeasedCapture, OutboxError},
};

/// Subjects that are asked for at once.
const READ: usize = 500;
/// What is read beyond a request's events: the part of the first message that does not wait any more.
const MARGIN_BYTES: usize = 64 * 1024;
/// Bytes that are read for each capture that is wanted, at the most: two events of the
/// greatest size, and what is added to them.
const CAPTURE_BYTES: usize = 72 * 1024;
/// Tries to read from a replica that is up to date.
const TRIES: u32 = 50;
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// A lease in the making.
struct Draft {
    budget: LeaseBudget,
    events: usize,
    bytes: usize,
    captures: Vec<LeasedCapture>,
    leased: Vec<Leased>,
    ids: HashSet<String>,
    full: bool,
}

impl Shared {
    /// The first waiting events of a lane within a budget, if this relay holds it.
    pub(super) async fn lease_lane(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
    ) -> Result<Vec<LeasedCapture>, OutboxError> {
        let slot = self.lanes.slot(lane);
        let mut guard = slot.hold.lock().await;
        if !self.hold_lane(lane, &slot, &mut guard).await? {
            return Ok(Vec::new());
        }
        let Some(hold) = guard.as_mut() else {
            return Ok(Vec::new());
        };
        let mut draft = Draft {
            budget,
            events: 0,
            bytes: 0,
            captures: Vec::new(),
            leased: Vec::new(),
            ids: HashSet::new(),
            full: false,
        };
        for queue in 0..2 {
            self.fill(lane, hold, queue, &mut draft).await?;
        }
        if draft.captures.is_empty() {
            hold.leased = draft.leased;
            if !self.pass_settled(lane, hold).await? {
                *guard = None;
            }
            return Ok(Vec::new());
        }
        // Reading took time: the request has to end before others may take the lane.
        let still_own = self.sessions.own(self.guard());
        if still_own.as_deref() != Some(hold.record.session.as_str()) {
            return Err(unavailable("the session is not good for a request now"));
        }
        for capture in &mut draft.captures {
            self.sealing.leased(capture)?;
        }
        hold.leased = draft.leased;
        hold.leased_at = Some(Instant::now());
        Ok(draft.captures)
    }

    async fn fill(
        &self,
        lane: &LaneKey,
        hold: &mut Hold,
        queue: usize,
        draft: &mut Draft,
    ) -> Result<(), OutboxError> {
        let cursor = hold.record.cursor(queue);
        let mut from = split(cursor).0.max(1);
        while !draft.full {
            let wanted = draft
                .budget
                .max_events
                .saturating_sub(draft.events)
                .div_ceil(2);
            let left = draft.budget.max_bytes.saturating_sub(draft.bytes);
            let bytes = ((left + MARGIN_BYTES) as f64 * hold.packing) as usize;
            let bound = (from, bytes.min(wanted * CAPTURE_BYTES));
            let read = self.read_queue(lane, queue, &hold.replaced, bound).await?;
            let Some(last) = read.last() else {
                return Ok(());
            };
            from = last.sequence + 1;
            hold.packing = packing(&read);
            let places = read.into_iter().flat_map(placed);
            let waiting = places.filter(|one| one.position >= cursor);
            self.take(lane, hold, queue, waiting.collect(), draft)
                .await?;
        }
        Ok(())
    }

    async fn take(
        &self,
        lane: &LaneKey,
        hold: &Hold,
        queue: usize,
        waiting: Vec<Placed>,
        draft: &mut Draft,
    ) -> Result<(), OutboxError> {
        let touched = hold.record.touched(queue);
        let tried = waiting
            .iter()
            .filter(|one| one.position <= touched || queue > 0);
        let ids: Vec<String> = tried.map(|one| one.first.capture_id.clone()).collect();
        let mut newest = self.newest_records(lane, hold.revision, &ids).await?;
        for one in waiting {
            let version = newest.remove(&one.first.capture_id).unwrap_or_else(|| {
                let behind = u64::from(one.first.behind);
                (
                    split(one.position).0.saturating_sub(behind),
                    one.first.clone(),
                )
            });
            if draft.full || !draft.take(lane, queue, one, version)? {
                draft.full = true;
                return Ok(());
            }
        }
        Ok(())
    }

    /// The last versions of records, from a replica that knows the lane's own record.
    pub(super) async fn newest_records(
        &self,
        lane: &LaneKey,
        lane_revision: u64,
        capture_ids: &[String],
    ) -> Result<HashMap<String, (u64, StoredRecord)>, OutboxError> {
        let mut newest = HashMap::new();
        let stream = self.layout.stream_of(&lane.integration_id);
        let lane_subject = self.layout.lane(lane);
        for some in capture_ids.chunks(READ) {
            let records = some
                .iter()
                .map(|id| self.layout.record(&lane.integration_id, id));
            let subjects: Vec<String> = records.chain([lane_subject.clone()]).collect();
            let mut tries = 0;
            let found = loop {
                let found = self.wire.last_of_each(&stream, &subjects).await?;
                let known = found.iter().find(|one| one.subject == lane_subject);
                if known.is_some_and(|one| one.sequence >= lane_revision) {
                    break found;
                }
                tries += 1;
                if tries > TRIES {
                    return Err(unavailable("the replicas are behind"));
                }
                tokio::time::sleep(TRY_AGAIN).await;
            };
            for one in found.into_iter().filter(|one| one.subject != lane_subject) {
                let record: StoredRecord = decode("record", one.payload)?;
                newest.insert(record.capture_id.clone(), (one.sequence, record));
            }
        }
        Ok(newest)
    }
}

/// A capture of a queue.
struct Placed {
    position: u64,
    /// Where the next one is.
    next: u64,
    /// Its record at the time.
    first: StoredRecord,
    waiting: Waiting,
}

/// Bytes of messages for each byte of the events in them, so that a lease reads about as much as it takes.
fn packing(read: &[ReadChunk]) -> f64 {
    let of = |payload: &Option<Payload>| payload.as_ref().map_or(0, |it| it.bytes.len());
    let captures = read.iter().flat_map(|chunk| &chunk.captures);
    let events: usize = captures.map(|one| of(&one.identify) + of(&one.track)).sum();
    let bytes: usize = read.iter().map(|chunk| chunk.bytes).sum();
    (bytes as f64 / events.max(1) as f64).clamp(0.02, 2.0)
}

/// The captures of a message, with their positions.
fn placed(chunk: ReadChunk) -> impl Iterator<Item = Placed> {
    let (sequence, count) = (chunk.sequence, chunk.captures.len());
    let captures = chunk.captures.into_iter().enumerate();
    captures.filter_map(move |(index, mut waiting)| {
        let is_last = index + 1 == count;
        Some(Placed {
            position: position(sequence, index),
            next: match is_last {
                true => position(sequence + 1, 0),
                false => position(sequence, index + 1),
            },
            first: waiting.record.take()?,
            waiting,
        })
    })
}

impl Draft {
    /// Takes a capture, or notes that nothing of it waits. Returns whether there may
    /// be room for more; an error where its record can't be read.
    fn take(
        &mut self,
        lane: &LaneKey,
        queue: usize,
        mut one: Placed,
        (revision, stored): (u64, StoredRecord),
    ) -> Result<bool, OutboxError> {
        // What can't be read, such as a version that is newer than this relay, is not passed over: it
        // would be removed with what is settled behind it.
        let record = stored.open(&lane.integration_id)?;
        // Two requests would settle the same record.
        if self.ids.contains(&stored.capture_id) {
            return Ok(false);
        }
        let mut damaged = false;
        let mut take = |event: EventType| {
            let waits = !record.event(event).state.is_final();
            let payload = one.waiting.payload_mut(event).take().filter(|_| waits)?;
            damaged |= !payload.is_sound();
            Some(payload.bytes)
        };
        let (identify, mut track) = (take(EventType::Identify), take(EventType::Track));
        let carries = [identify.is_some(), track.is_some()];
        let leased = Leased {
            queue,
            position: one.position,
            next: one.next,
            stored,
            record: record.clone(),
            revision,
            carries,
            done: carries == [false; 2],
        };
        if leased.done {
            self.leased.push(leased);
            return Ok(true);
        }
        if self.budget.max_events == 1 && identify.is_some() {
            track = None;
        }
        let payloads = [&identify, &track];
        let size = |payload: &Option<Bytes>| {
            payload
                .as_ref()
                .map_or(0, |bytes| crate::vault::unsealed_len(bytes) + 1)
        };
        let events = payloads.iter().filter(|payload| payload.is_some()).count();
        let bytes: usize = payloads.into_iter().map(size).sum();
        let (all_events, all_bytes) = (self.events + events, self.bytes + bytes);
        let over = all_events > self.budget.max_events || all_bytes > self.budget.max_bytes;
        if !self.captures.is_empty() && over {
            return Ok(false);
        }
        (self.events, self.bytes) = (all_events, all_bytes);
        self.ids.insert(leased.stored.capture_id.clone());
        self.leased.push(leased);
        self.captures.push(LeasedCapture {
            sequence: i64::try_from(one.position).unwrap_or(i64::MAX),
            record: Arc::new(record),
            identify,
            track,
            damaged,
        });
        Ok(self.events < self.budget.max_events)
    }
}
