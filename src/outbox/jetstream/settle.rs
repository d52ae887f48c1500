//! Makes the outcome of an attempt durable: records, dead letters and the lane's own
//! record in one atomic batch, which is refused where the lane went to another relay.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use prost::Message;

use super::{
    Shared,
    lanes::{Hold, Leased},
    message::{Dead, LaneRecord, Payload, decode},
    outcomes,
    position::split,
    wire::{StoreError, ToStore},
};
use crate::{
    event::EventType,
    outbox::{LaneKey, OutboxError, SettledCapture, Settlement},
    status::{CaptureRecord, State},
    time::UnixMillis,
};

/// Captures of one batch: with two dead letters each it is still below 1,000 messages.
const CHUNK: usize = 300;
/// Tries after others have changed records.
const TRIES: u32 = 10;

/// What one capture of a chunk becomes.
struct Next {
    /// Its place in what was leased.
    place: usize,
    record: CaptureRecord,
    changed: Vec<EventType>,
    done: bool,
    dead: bool,
    /// Whether its outcome stands in a message with others, and not in its record.
    shared: bool,
}

impl Shared {
    /// Settles as much as this relay may: nothing where it has lost the lane.
    pub(super) async fn settle_lane(&self, settlement: &Settlement) -> Result<(), OutboxError> {
        let lane = &settlement.lane;
        let slot = self.lanes.slot(lane);
        let mut guard = slot.hold.lock().await;
        let mut settled_all = true;
        for chunk in settlement.captures.chunks(CHUNK) {
            let Some(hold) = guard.as_mut() else {
                settled_all = false;
                break;
            };
            if !self.settle_chunk(lane, hold, chunk).await? {
                *guard = None;
            }
        }
        let Some(hold) = guard.as_mut().filter(|_| settled_all) else {
            tracing::warn!(%lane, "the lane went to another relay, which sends its events again");
            return Ok(());
        };
        hold.leased_at = None;
        self.remove_settled(lane, hold).await;
        hold.leased = Vec::new();
        Ok(())
    }

    /// Returns whether the lane is still this relay's.
    async fn settle_chunk(
        &self,
        lane: &LaneKey,
        hold: &mut Hold,
        chunk: &[SettledCapture],
    ) -> Result<bool, OutboxError> {
        for _ in 0..TRIES {
            let mut next = next_states(hold, chunk);
            let payloads = self.payloads_of_dead(lane, hold, &next).await?;
            let record = lane_record_after(hold, &next, false);
            let now = UnixMillis::now();
            for one in &mut next {
                let leased = &hold.leased[one.place];
                // What lies before the cursor is never read again as waiting.
                one.shared = leased.queue == 0
                    && leased.position < record.cursor(0)
                    && outcomes::may_share(leased, &one.record, self.options.remember, now);
            }
            let shared = next.iter().filter(|one| one.shared);
            let shared = shared.map(|one| (&hold.leased[one.place], one.record.clone()));
            let outcomes = outcomes::messages(self, lane, shared, now);
            // The lane's record comes first, then these.
            let before = 1 + outcomes.len() as u64;
            let batch = self.batch(lane, hold, &record, outcomes, &next, &payloads);
            match self.wire.store(batch).await {
                Ok(first) => {
                    self.signals.set_writable(true);
                    self.note_settled(lane, hold, record, next, (first, before))
                        .await;
                    return Ok(true);
                }
                Err(StoreError::Conflict) => {
                    if !self.refresh(lane, hold).await? {
                        return Ok(false);
                    }
                }
                Err(error) => {
                    self.signals.set_writable(false);
                    return Err(error.into());
                }
            }
        }
        Err(super::wire::unavailable("records change all the time"))
    }

    /// What is to be stored: the lane's record first.
    fn batch(
        &self,
        lane: &LaneKey,
        hold: &Hold,
        record: &LaneRecord,
        outcomes: Vec<ToStore>,
        next: &[Next],
        payloads: &HashMap<(usize, EventType), Payload>,
    ) -> Vec<ToStore> {
        let id = &lane.integration_id;
        let mut batch = vec![ToStore {
            subject: self.layout.lane(lane),
            payload: record.encode_to_vec().into(),
            expected: Some(hold.revision),
            keep: None,
        }];
        batch.extend(outcomes);
        for one in next.iter().filter(|one| !one.shared) {
            let leased = &hold.leased[one.place];
            let mut stored = leased.stored.clone();
            stored.set(&one.record);
            stored.queue_at(leased.position);
            batch.push(ToStore {
                subject: self.layout.record(id, &stored.capture_id),
                payload: stored.encode_to_vec().into(),
                expected: Some(leased.revision),
                keep: (!one.dead).then_some(self.options.remember),
            });
        }
        for one in next {
            for event in &one.changed {
                let State::DeadLettered { at, .. } = one.record.event(*event).state else {
                    continue;
                };
                let stored = &hold.leased[one.place].stored;
                let dead = Dead {
                    capture_id: stored.capture_id.clone(),
                    event: event.to_proto() as i32,
                    millis: at.0,
                    payload: payloads.get(&(one.place, *event)).cloned(),
                    shard: u32::from(lane.shard),
                };
                batch.push(ToStore {
                    subject: self.layout.dead(id, &stored.capture_id, *event),
                    payload: dead.encode_to_vec().into(),
                    expected: None,
                    keep: None,
                });
            }
        }
        batch
    }

    /// The stored payloads of events that are given up.
    async fn payloads_of_dead(
        &self,
        lane: &LaneKey,
        hold: &Hold,
        next: &[Next],
    ) -> Result<HashMap<(usize, EventType), Payload>, OutboxError> {
        let mut chunks: BTreeMap<u64, Vec<(usize, usize)>> = BTreeMap::new();
        for one in next {
            let given_up = |event: &EventType| {
                matches!(one.record.event(*event).state, State::DeadLettered { .. })
            };
            if one.changed.iter().any(given_up) {
                let (sequence, index) = split(hold.leased[one.place].position);
                chunks.entry(sequence).or_default().push((index, one.place));
            }
        }
        let mut found = HashMap::new();
        for (sequence, places) in chunks {
            let Some((_, chunk)) = self.chunk_at(lane, sequence).await? else {
                continue;
            };
            for (index, place) in places {
                let Some(one) = chunk.captures.get(index) else {
                    continue;
                };
                for event in EventType::ALL {
                    let payload = one.payload(event).cloned();
                    found.extend(payload.map(|payload| ((place, event), payload)));
                }
            }
        }
        Ok(found)
    }

    async fn note_settled(
        &self,
        lane: &LaneKey,
        hold: &mut Hold,
        record: LaneRecord,
        next: Vec<Next>,
        (first, before): (u64, u64),
    ) {
        let stream = self.layout.stream_of(&lane.integration_id);
        let mut gone = vec![hold.revision];
        (hold.revision, hold.record) = (first, record);
        let now = UnixMillis::now();
        let mut changes = Vec::with_capacity(next.len());
        let mut revision = first + before;
        for one in next {
            let leased = &mut hold.leased[one.place];
            leased.record = one.record.clone();
            leased.done = one.done;
            if one.done {
                self.counts.remove(lane, 1);
            }
            if !one.shared {
                // The first version goes by its time; those of retries are many.
                if leased.stored.own && leased.revision > 0 {
                    gone.push(leased.revision);
                }
                leased.revision = revision;
                revision += 1;
                leased.stored.set(&one.record);
                leased.stored.queue_at(leased.position);
            }
            changes.push((one.record, one.changed));
        }
        self.deleter.remove_all(&stream, gone);
        self.announce(changes, now).await;
    }

    /// Reads what others have changed. Returns whether the lane is still this relay's.
    async fn refresh(&self, lane: &LaneKey, hold: &mut Hold) -> Result<bool, OutboxError> {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(1..10))).await;
        let stream = self.layout.stream_of(&lane.integration_id);
        let found = self.wire.last(&stream, &self.layout.lane(lane)).await?;
        let Some((stored, _)) = found else {
            return Ok(false);
        };
        let record: LaneRecord = decode("lane", stored.payload)?;
        if Some(&record.session) != self.sessions.name().as_ref()
            || record.session != hold.record.session
        {
            return Ok(false);
        }
        (hold.revision, hold.record) = (stored.sequence, record);
        let ids: Vec<String> = hold
            .leased
            .iter()
            .map(|one| one.stored.capture_id.clone())
            .collect();
        let mut newest = self.newest_records(lane, hold.revision, &ids).await?;
        for leased in &mut hold.leased {
            match newest.remove(&leased.stored.capture_id) {
                None => leased.revision = 0,
                Some((revision, stored)) => {
                    leased.record = stored.open(&lane.integration_id)?;
                    leased.revision = revision;
                    leased.stored = stored;
                }
            }
        }
        Ok(true)
    }

    /// Goes on behind captures of which nothing waits any more, although nothing of them was leased.
    /// Returns whether the lane is still this relay's.
    pub(super) async fn pass_settled(
        &self,
        lane: &LaneKey,
        hold: &mut Hold,
    ) -> Result<bool, OutboxError> {
        hold.leased_at = None;
        let record = lane_record_after(hold, &[], true);
        if record != hold.record {
            let stored = self.wire.store(vec![ToStore {
                subject: self.layout.lane(lane),
                payload: record.encode_to_vec().into(),
                expected: Some(hold.revision),
                keep: None,
            }]);
            let revision = match stored.await {
                Ok(revision) => revision,
                Err(StoreError::Conflict) => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            let stream = self.layout.stream_of(&lane.integration_id);
            self.deleter.remove(&stream, hold.revision);
            (hold.revision, hold.record) = (revision, record);
        }
        self.remove_settled(lane, hold).await;
        hold.leased = Vec::new();
        Ok(true)
    }
}

/// Merges what is stored with what an attempt has changed.
fn next_states(hold: &Hold, chunk: &[SettledCapture]) -> Vec<Next> {
    let places = hold.leased.iter().enumerate();
    let places: HashMap<i64, usize> = places
        .map(|(place, one)| (i64::try_from(one.position).unwrap_or(i64::MAX), place))
        .collect();
    let mut next = Vec::with_capacity(chunk.len());
    for settled in chunk {
        let Some(place) = places.get(&settled.sequence).copied() else {
            continue;
        };
        let leased = &hold.leased[place];
        let waits = |event: &EventType| {
            leased.carries[usize::from(*event == EventType::Track)]
                && !leased.record.event(*event).state.is_final()
        };
        let changed: Vec<_> = settled.changed.iter().filter(waits).collect();
        if leased.done || !EventType::ALL.iter().any(waits) {
            continue;
        }
        let mut record = leased.record.clone();
        record.attempts.clone_from(&settled.record.attempts);
        for event in &changed {
            *record.event_mut(*event) = settled.record.event(*event).clone();
        }
        let dead = |event| matches!(record.event(event).state, State::DeadLettered { .. });
        next.push(Next {
            place,
            done: record.is_final(),
            shared: false,
            dead: EventType::ALL.into_iter().any(dead),
            changed,
            record,
        });
    }
    next
}

/// The lane's record once the chunk is stored; `idle` where the lane has nothing else to do.
fn lane_record_after(hold: &Hold, next: &[Next], idle: bool) -> LaneRecord {
    let mut record = hold.record.clone();
    let done: HashMap<usize, bool> = next.iter().map(|one| (one.place, one.done)).collect();
    let is_done = |(place, leased): &(usize, &Leased)| {
        done.get(place)
            .copied()
            .unwrap_or_else(|| leased.done || leased.record.is_final())
    };
    for queue in 0..2 {
        let own = || {
            hold.leased
                .iter()
                .enumerate()
                .filter(|(_, one)| one.queue == queue)
        };
        if let Some((_, last)) = own().take_while(is_done).last() {
            record.cursors[queue] = record.cursors[queue].max(last.next);
        }
        let tried = own()
            .filter(|(place, _)| done.contains_key(place))
            .map(|(_, one)| one.position)
            .max();
        if let Some(tried) = tried.filter(|tried| *tried >= record.cursors[queue]) {
            record.touched[queue] = record.touched[queue].max(tried);
        }
        let settled = |place: &usize| done.get(place).is_some_and(|done| *done);
        let before = hold.record.cursor(queue)..record.cursors[queue];
        // Not what an earlier try without an answer has counted, nor what was given up here before.
        let newly = own().filter(|(place, one)| {
            let counted = one.position < before.start || one.stored.left.contains(&one.position);
            settled(place) && !one.done && !counted
        });
        let passed = || own().filter(|(_, one)| before.contains(&one.position));
        let beyond = record.beyond[queue] + newly.count() as u64;
        let beyond = beyond.saturating_sub(passed().count() as u64);
        record.beyond[queue] = match record.touched[queue] < record.cursors[queue] {
            // Nothing behind the cursor was ever tried.
            true => 0,
            false => beyond,
        };
        // Of the messages that were passed as a whole: their last captures.
        let ends = passed().filter(|(_, one)| split(one.next).1 == 0);
        let whole: usize = ends.map(|(_, one)| split(one.position).1 + 1).sum();
        record.unpurged += whole as u64;
    }
    let dead = next.iter().filter(|one| one.dead);
    let dead = dead.map(|one| &hold.leased[one.place]);
    let letters = dead.map(|one| (one.position, one.queue));
    hold.removal.note(&mut record, letters, idle);
    record
}
