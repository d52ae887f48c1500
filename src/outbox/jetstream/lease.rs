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
    message::{StoredRecord, Waiting, decode},
    wire::{Stored, unavailable},
};
use crate::{
    event::EventType,
    outbox::{LaneKey, LeaseBudget, LeasedCapture, OutboxError},
};

/// Captures of one read; also the most subjects that are asked for at once.
const READ: usize = 500;
/// What protobuf and encryption add to a capture's events, at the most.
const OVERHEAD_BYTES: usize = 64 * 1024;
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
        if draft.captures.is_empty() && hold.unpurged {
            self.purge_settled(lane, hold).await;
        }
        // Reading took time: the request has to end before others may take the lane.
        let still_own = self.sessions.own(self.guard());
        if still_own.as_deref() != Some(hold.record.session.as_str()) {
            return Err(unavailable("the session is not good for a request now"));
        }
        hold.leased = draft.leased;
        hold.leased_at = (!draft.captures.is_empty()).then(Instant::now);
        for capture in &mut draft.captures {
            self.sealing.leased(capture);
        }
        Ok(draft.captures)
    }

    async fn fill(
        &self,
        lane: &LaneKey,
        hold: &Hold,
        queue: usize,
        draft: &mut Draft,
    ) -> Result<(), OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let subject = self.layout.queue(lane, queue);
        let mut from = hold.record.cursor(queue).max(1);
        while !draft.full {
            let wanted = draft
                .budget
                .max_events
                .saturating_sub(draft.events)
                .div_ceil(2);
            let left = draft.budget.max_bytes.saturating_sub(draft.bytes);
            let bound = ((wanted + 1).min(READ), left + left / 4 + OVERHEAD_BYTES);
            let read = self.wire.read(&stream, &subject, from, bound).await?;
            let Some(last) = read.last() else {
                return Ok(());
            };
            from = last.sequence + 1;
            self.take(lane, hold, queue, read, draft).await?;
        }
        Ok(())
    }

    async fn take(
        &self,
        lane: &LaneKey,
        hold: &Hold,
        queue: usize,
        read: Vec<Stored>,
        draft: &mut Draft,
    ) -> Result<(), OutboxError> {
        let mut waiting: Vec<(u64, Waiting)> = Vec::with_capacity(read.len());
        for stored in read {
            match decode::<Waiting>("capture", &stored.payload) {
                Ok(one) => waiting.push((stored.sequence, one)),
                Err(error) => {
                    tracing::error!(%lane, sequence = stored.sequence, %error, "a message is passed over");
                }
            }
        }
        let touched = hold.record.touched(queue);
        let tried = waiting
            .iter()
            .filter(|(sequence, _)| *sequence <= touched || queue > 0);
        let ids = tried
            .filter_map(|(_, one)| one.record.as_ref().map(|record| record.capture_id.clone()));
        let ids: Vec<String> = ids.collect();
        let mut newest = self.newest_records(lane, hold.revision, &ids).await?;
        for (sequence, one) in waiting {
            let Some(first) = one.record.clone() else {
                continue;
            };
            let (revision, stored) = newest
                .remove(&first.capture_id)
                .unwrap_or_else(|| (sequence - 1, first));
            if draft.full || !draft.take(lane, (queue, sequence), one, (revision, stored)) {
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
                let record: StoredRecord = decode("record", &one.payload)?;
                newest.insert(record.capture_id.clone(), (one.sequence, record));
            }
        }
        Ok(newest)
    }
}

impl Draft {
    /// Takes a capture, or notes that nothing of it waits. Returns whether there may
    /// be room for more.
    fn take(
        &mut self,
        lane: &LaneKey,
        (queue, sequence): (usize, u64),
        mut one: Waiting,
        (revision, stored): (u64, StoredRecord),
    ) -> bool {
        let record = match stored.open(&lane.integration_id) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(%lane, sequence, %error, "a capture is passed over");
                return true;
            }
        };
        // Two requests would settle the same record.
        if self.ids.contains(&stored.capture_id) {
            return false;
        }
        let mut damaged = false;
        let mut take = |event: EventType| {
            let waits = !record.event(event).state.is_final();
            let payload = one.payload_mut(event).take().filter(|_| waits)?;
            damaged |= !payload.is_sound();
            Some(payload.bytes)
        };
        let (identify, mut track) = (take(EventType::Identify), take(EventType::Track));
        let carries = [identify.is_some(), track.is_some()];
        let mut leased = Leased {
            queue,
            sequence,
            stored,
            record: record.clone(),
            revision,
            carries,
            done: carries == [false; 2],
        };
        if leased.done {
            self.leased.push(leased);
            return true;
        }
        if self.budget.max_events == 1 && identify.is_some() {
            track = None;
        }
        let payloads = [&identify, &track];
        let size = |payload: &Option<Vec<u8>>| {
            payload
                .as_ref()
                .map_or(0, |bytes| crate::vault::unsealed_len(bytes) + 1)
        };
        let events = payloads.iter().filter(|payload| payload.is_some()).count();
        let bytes: usize = payloads.into_iter().map(size).sum();
        let (all_events, all_bytes) = (self.events + events, self.bytes + bytes);
        let over = all_events > self.budget.max_events || all_bytes > self.budget.max_bytes;
        if !self.captures.is_empty() && over {
            return false;
        }
        (self.events, self.bytes) = (all_events, all_bytes);
        self.ids.insert(leased.stored.capture_id.clone());
        leased.stored.queued_at = sequence;
        self.leased.push(leased);
        self.captures.push(LeasedCapture {
            sequence: i64::try_from(sequence).unwrap_or(i64::MAX),
            record: Arc::new(record),
            identify: identify.map(Bytes::from),
            track: track.map(Bytes::from),
            damaged,
        });
        self.events < self.budget.max_events
    }
}
