//! The outbox in its simplest form, in memory: what an implementation is compared
//! with, and what the simulation of delivery runs on.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    Content, LaneKey, LeaseBudget, LeaseScope, LeasedCapture, Limits, NewCapture, Quota,
    SettledCapture, Submitted,
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    status::{CaptureRecord, EventStatus, State},
    time::UnixMillis,
};

/// A capture with what waits of it.
#[derive(Clone, Debug)]
struct Stored {
    digest: [u8; 16],
    lane: Option<LaneKey>,
    user: Option<String>,
    record: CaptureRecord,
    waiting: [Option<Bytes>; 2],
    dead: [Option<Bytes>; 2],
    replay: bool,
}

/// The reference.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    limits: Limits,
    captures: BTreeMap<i64, Stored>,
    ids: HashMap<(IntegrationId, String), i64>,
    /// What waits in each lane: live captures before replayed ones.
    queues: BTreeMap<LaneKey, BTreeSet<(bool, i64)>>,
}

impl Model {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            captures: BTreeMap::new(),
            ids: HashMap::new(),
            queues: BTreeMap::new(),
        }
    }

    fn waiting(&self, of: Option<&IntegrationId>) -> (u64, u64) {
        let own = |stored: &&Stored| of.is_none_or(|id| *id == stored.record.integration_id);
        let payloads = self
            .captures
            .values()
            .filter(own)
            .flat_map(|stored| &stored.waiting);
        payloads.flatten().fold((0, 0), |(events, bytes), payload| {
            (events + 1, bytes + payload.len() as u64)
        })
    }

    fn full(&self, id: &IntegrationId, bytes: u64) -> Option<Quota> {
        let (own_events, own_bytes) = self.waiting(Some(id));
        let (events, all_bytes) = self.waiting(None);
        let limits = &self.limits;
        if own_events + 2 > limits.max_integration_events {
            Some(Quota::IntegrationEvents)
        } else if own_bytes + bytes > limits.max_integration_bytes {
            Some(Quota::IntegrationBytes)
        } else if events + 2 > limits.max_events {
            Some(Quota::Events)
        } else if all_bytes + bytes > limits.max_bytes {
            Some(Quota::Bytes)
        } else {
            None
        }
    }

    pub(crate) fn submit(&mut self, capture: NewCapture) -> Submitted {
        let key = (capture.integration_id.clone(), capture.capture_id.clone());
        if let Some(sequence) = self.ids.get(&key) {
            let stored = &self.captures[sequence];
            if !capture.replaces(&stored.record, &stored.digest) {
                return if stored.digest == capture.digest {
                    Submitted::Duplicate(Arc::new(stored.record.clone()))
                } else {
                    Submitted::Conflict
                };
            }
        }
        let (state, lane, waiting) = match capture.content {
            Content::Skip { reason } => (State::Skipped { reason }, None, [None, None]),
            Content::Send { shard, events } => {
                let bytes = (events.identify.len() + events.track.len()) as u64;
                if let Some(quota) = self.full(&capture.integration_id, bytes) {
                    return Submitted::Full(quota);
                }
                let lane = LaneKey {
                    integration_id: capture.integration_id.clone(),
                    region: capture.region,
                    shard,
                };
                (
                    State::Queued,
                    Some(lane),
                    [events.identify, events.track].map(|it| Some(it.into())),
                )
            }
        };
        let record = CaptureRecord {
            integration_id: capture.integration_id,
            capture_id: capture.capture_id,
            region: capture.region,
            mapping_version: capture.mapping_version,
            accept_time: capture.accept_time,
            queue_time: capture.accept_time,
            identify: EventStatus::new(state),
            track: EventStatus::new(state),
            attempts: Vec::new(),
            trace: capture.trace,
        };
        let sequence = self
            .captures
            .last_key_value()
            .map_or(1, |(last, _)| last + 1);
        let stored = Stored {
            digest: capture.digest,
            lane,
            user: capture.user_id,
            record: record.clone(),
            waiting,
            dead: [None, None],
            replay: false,
        };
        if let Some(lane) = stored.lane.clone() {
            self.queues
                .entry(lane)
                .or_default()
                .insert((false, sequence));
        }
        self.captures.insert(sequence, stored);
        if let Some(replaced) = self.ids.insert(key, sequence) {
            self.captures.remove(&replaced);
        }
        Submitted::Accepted(Arc::new(record))
    }

    pub(crate) fn lease(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
        scope: &LeaseScope,
    ) -> Vec<LeasedCapture> {
        let queue = self.queues.get(lane).into_iter().flatten();
        let rows = queue
            .map(|(_, sequence)| (sequence, &self.captures[sequence]))
            .filter(|(_, stored)| match scope {
                LeaseScope::All => true,
                LeaseScope::Except(users) => stored
                    .user
                    .as_ref()
                    .is_none_or(|user| !users.contains(user)),
                LeaseScope::Only(user) => stored.user.as_ref() == Some(user),
            });
        let mut leased: Vec<LeasedCapture> = Vec::new();
        let (mut events, mut bytes) = (0, 0);
        for (sequence, stored) in rows {
            let [identify, mut track] = stored.waiting.clone();
            if budget.max_events == 1 && identify.is_some() {
                track = None;
            }
            let payloads = [&identify, &track];
            events += payloads.iter().filter(|payload| payload.is_some()).count();
            bytes += payloads
                .iter()
                .map(|p| p.as_ref().map_or(0, |p| p.len() + 1))
                .sum::<usize>();
            if !leased.is_empty() && (events > budget.max_events || bytes > budget.max_bytes) {
                break;
            }
            let record = Arc::new(stored.record.clone());
            let sequence = *sequence;
            leased.push(LeasedCapture {
                sequence,
                record,
                identify,
                track,
                damaged: false,
            });
            if events >= budget.max_events {
                break;
            }
        }
        leased
    }

    pub(crate) fn settle(&mut self, settled: &SettledCapture) {
        let Some(stored) = self.captures.get_mut(&settled.sequence) else {
            return;
        };
        if stored.waiting.iter().all(Option::is_none) {
            return;
        }
        stored.record.attempts.clone_from(&settled.record.attempts);
        for event in settled.changed.iter() {
            let status = settled.record.event(event).clone();
            let place = usize::from(event == EventType::Track);
            if status.state.is_final()
                && let Some(payload) = stored.waiting[place].take()
                && matches!(status.state, State::DeadLettered { .. })
            {
                stored.dead[place] = Some(payload);
            }
            *stored.record.event_mut(event) = status;
        }
        if stored.waiting.iter().all(Option::is_none) {
            let place = (stored.replay, settled.sequence);
            stored.replay = false;
            if let Some(queue) = stored
                .lane
                .as_ref()
                .and_then(|lane| self.queues.get_mut(lane))
            {
                queue.remove(&place);
            }
        }
    }

    /// Replays all dead letters of an integration; returns how many.
    pub(crate) fn replay(&mut self, id: &IntegrationId, now: UnixMillis) -> u64 {
        let mut replayed = 0;
        for (sequence, stored) in &mut self.captures {
            if stored.record.integration_id != *id {
                continue;
            }
            let fresh = stored.waiting.iter().all(Option::is_none);
            for (place, event) in EventType::ALL.into_iter().enumerate() {
                if let Some(payload) = stored.dead[place].take() {
                    stored.waiting[place] = Some(payload);
                    stored.replay |= fresh;
                    if let Some(lane) = stored.lane.clone() {
                        let queue = self.queues.entry(lane).or_default();
                        queue.insert((stored.replay, *sequence));
                    }
                    stored.record.event_mut(event).replay();
                    stored.record.queue_time = now;
                    replayed += 1;
                }
            }
        }
        replayed
    }

    pub(crate) fn find(&self, id: &IntegrationId, capture_id: &str) -> Option<&CaptureRecord> {
        let sequence = self.ids.get(&(id.clone(), capture_id.to_owned()))?;
        self.captures.get(sequence).map(|stored| &stored.record)
    }

    /// All records in the order of acceptance.
    pub(crate) fn records(&self) -> impl Iterator<Item = (i64, &CaptureRecord)> {
        self.captures
            .iter()
            .map(|(sequence, stored)| (*sequence, &stored.record))
    }

    /// The lanes in which events wait.
    pub(crate) fn waiting_lanes(&self) -> BTreeSet<LaneKey> {
        let waits = self.queues.iter().filter(|(_, queue)| !queue.is_empty());
        waits.map(|(lane, _)| lane.clone()).collect()
    }

    /// Events and bytes that wait for one integration.
    pub(crate) fn backlog(&self, id: &IntegrationId) -> (u64, u64) {
        self.waiting(Some(id))
    }

    /// The integration and capture of each dead letter, in order.
    pub(crate) fn dead_letters(&self) -> Vec<(String, String)> {
        let mut letters = Vec::new();
        for stored in self.captures.values() {
            let record = &stored.record;
            let name = (
                record.integration_id.as_str().to_owned(),
                record.capture_id.clone(),
            );
            letters.extend(stored.dead.iter().flatten().map(|_| name.clone()));
        }
        letters.sort();
        letters
    }
}
