//! The captures whose newest state is in the journal and not in the database yet.
//!
//! One thread changes it (`committer`), everybody reads it. Whoever looks for a
//! capture looks here first: what stands here is newer than what the database has.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use sha2::{Digest, Sha256};

use super::tally::Tally;
use crate::{
    event::{EventPair, EventType},
    integration::IntegrationId,
    outbox::{Backlog, LaneKey, LeaseBudget, LeasedCapture},
    status::CaptureRecord,
    time::UnixMillis,
    vault::unsealed_len,
};

/// A capture's newest state.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) sequence: i64,
    pub(super) record: CaptureRecord,
    pub(super) digest: [u8; 16],
    /// The lane's shard, where there is something to send.
    pub(super) shard: Option<u16>,
    /// Bytes of the events that wait.
    pub(super) waiting: [Option<u64>; 2],
    pub(super) origin: Origin,
    /// Number of the first record of the journal that made it differ from what the
    /// database has.
    pub(super) since: u64,
}

/// What the database has of a capture.
#[derive(Debug)]
pub(super) enum Origin {
    /// Nothing yet.
    New {
        /// Whose data it is, blinded.
        subject: Option<i64>,
        /// The payloads, while one of them waits or is a dead letter.
        payloads: Option<Arc<EventPair>>,
    },
    /// An older state.
    Stored,
}

impl Entry {
    pub(super) fn lane(&self) -> Option<LaneKey> {
        Some(LaneKey {
            integration_id: self.record.integration_id.clone(),
            region: self.record.region,
            shard: self.shard?,
        })
    }

    fn fresh_events(&self) -> u64 {
        match self.origin {
            Origin::New { .. } => events(&self.waiting),
            Origin::Stored => 0,
        }
    }
}

fn events(waiting: &[Option<u64>; 2]) -> u64 {
    waiting.iter().flatten().count() as u64
}

fn bytes(waiting: &[Option<u64>; 2]) -> u64 {
    waiting.iter().flatten().sum()
}

/// Tells captures apart by integration and id: 128 bits of a hash.
pub(super) type Key = u128;

/// The key of a capture.
pub(super) fn key_of(integration: &IntegrationId, capture_id: &str) -> Key {
    let mut hash = Sha256::new();
    hash.update(integration.as_str().as_bytes());
    // An integration id holds no NUL, so no two pairs read the same.
    hash.update([0]);
    hash.update(capture_id.as_bytes());
    let mut key = [0; 16];
    key.copy_from_slice(&hash.finalize()[..16]);
    u128::from_le_bytes(key)
}

/// The part of a key by which the database finds a capture.
pub(super) fn stored_key(key: Key) -> i64 {
    let [a, b, c, d, e, f, g, h, ..] = key.to_le_bytes();
    i64::from_le_bytes([a, b, c, d, e, f, g, h])
}

#[derive(Debug, Default)]
struct Lane {
    /// New captures with events that wait.
    fresh: BTreeSet<i64>,
    fresh_events: u64,
    /// No capture of the database up to this one waits; they are settled here.
    passed: i64,
}

/// What a lease finds here.
pub(super) struct Fresh {
    pub(super) captures: Vec<Arc<Entry>>,
    /// Whether captures of the database wait too: older ones, or replayed ones.
    pub(super) stored_wait: bool,
    pub(super) passed: i64,
}

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    entries: HashMap<i64, Arc<Entry>>,
    keys: HashMap<Key, i64>,
    lanes: HashMap<LaneKey, Lane>,
    pub(super) tally: Tally,
}

impl Overlay {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&self, sequence: i64) -> Option<&Arc<Entry>> {
        self.entries.get(&sequence)
    }

    pub(super) fn find(&self, key: Key) -> Option<&Arc<Entry>> {
        self.entries.get(self.keys.get(&key)?)
    }

    /// All that differs from the database since a record up to `through`, in no order.
    pub(super) fn changed_through(&self, through: u64) -> Vec<Arc<Entry>> {
        let entries = self.entries.values();
        entries
            .filter(|entry| entry.since <= through)
            .cloned()
            .collect()
    }

    /// Takes a capture's next state. `before` is what waited of one that is not here.
    pub(super) fn put(&mut self, key: Key, entry: Arc<Entry>, before: [Option<u64>; 2]) {
        let old = self.entries.insert(entry.sequence, Arc::clone(&entry));
        let waited = old.as_ref().map_or(before, |old| old.waiting);
        if old.is_none() {
            self.keys.insert(key, entry.sequence);
        }
        let Some(lane) = entry.lane() else { return };
        let state = self.lanes.entry(lane.clone()).or_default();
        state.fresh_events += entry.fresh_events();
        state.fresh_events -= old.as_ref().map_or(0, |old| old.fresh_events());
        if entry.fresh_events() > 0 {
            state.fresh.insert(entry.sequence);
        } else {
            state.fresh.remove(&entry.sequence);
        }
        self.tally.remove(&lane, events(&waited), bytes(&waited));
        self.tally
            .add(&lane, events(&entry.waiting), bytes(&entry.waiting));
    }

    /// These states are in the database now. What was changed meanwhile was so after
    /// record number `through`.
    pub(super) fn flushed(&mut self, entries: &[Arc<Entry>], through: u64) {
        for entry in entries {
            let Some(current) = self.entries.get(&entry.sequence) else {
                continue;
            };
            let changed = !Arc::ptr_eq(current, entry);
            if let Some(lane) = entry.lane()
                && let Some(state) = self.lanes.get_mut(&lane)
                && state.fresh.remove(&entry.sequence)
            {
                state.fresh_events -= current.fresh_events();
            }
            if changed {
                let stored = Entry {
                    record: current.record.clone(),
                    origin: Origin::Stored,
                    since: through + 1,
                    ..**current
                };
                self.entries.insert(entry.sequence, Arc::new(stored));
            } else {
                self.entries.remove(&entry.sequence);
                let record = &entry.record;
                self.keys
                    .remove(&key_of(&record.integration_id, &record.capture_id));
            }
        }
        if self.entries.is_empty() {
            // What a burst has taken goes back.
            self.entries.shrink_to(1_024);
            self.keys.shrink_to(1_024);
            self.lanes.retain(|_, lane| lane.passed > 0);
        }
    }

    /// The database has been changed beside this, while it was empty.
    pub(super) fn replace_tally(&mut self, tally: Tally) {
        self.tally = tally;
        self.lanes.clear();
    }

    /// What waits here of a lane, as far as a budget can take it.
    pub(super) fn fresh(&self, lane: &LaneKey, budget: LeaseBudget) -> Fresh {
        let state = self.lanes.get(lane);
        let mut filler = Filler::new(budget);
        let mut captures = Vec::new();
        for sequence in state.iter().flat_map(|state| &state.fresh) {
            let Some(entry) = self.entries.get(sequence) else {
                continue;
            };
            let sizes = entry.sizes(budget);
            if filler.is_full() || !filler.take(sizes.into_iter().flatten()) {
                break;
            }
            captures.push(Arc::clone(entry));
        }
        let fresh_events = state.map_or(0, |state| state.fresh_events);
        Fresh {
            captures,
            stored_wait: self.tally.lane(lane).events > fresh_events,
            passed: state.map_or(0, |state| state.passed),
        }
    }

    /// Notes that no capture of the database up to `sequence` waits in a lane.
    pub(super) fn pass(&mut self, lane: &LaneKey, sequence: i64) {
        let state = self.lanes.entry(lane.clone()).or_default();
        state.passed = state.passed.max(sequence);
    }

    /// What waits for an integration here and in the database; `oldest` is of what
    /// waits here. Returns the lanes of which the database may know an older one.
    pub(super) fn backlog(&self, id: &IntegrationId) -> (Backlog, Vec<(LaneKey, i64)>) {
        let mut backlog = Backlog::default();
        let mut stored = Vec::new();
        for (lane, waiting) in self.tally.waiting_lanes() {
            if lane.integration_id != *id {
                continue;
            }
            backlog.lanes += 1;
            backlog.events += waiting.events;
            backlog.bytes += waiting.bytes;
            let state = self.lanes.get(lane);
            let first = state.and_then(|state| state.fresh.first());
            let first = first.and_then(|sequence| self.entries.get(sequence));
            let time = first.map(|entry| entry.record.accept_time);
            backlog.oldest = earlier(backlog.oldest, time);
            if waiting.events > state.map_or(0, |state| state.fresh_events) {
                stored.push((lane.clone(), state.map_or(0, |state| state.passed)));
            }
        }
        (backlog, stored)
    }
}

/// The earlier of two times.
pub(super) fn earlier(a: Option<UnixMillis>, b: Option<UnixMillis>) -> Option<UnixMillis> {
    a.into_iter().chain(b).min()
}

impl Entry {
    /// Bytes of the events that a lease would take.
    fn sizes(&self, budget: LeaseBudget) -> [Option<usize>; 2] {
        let [identify, track] = self.waiting;
        let split = budget.max_events == 1 && identify.is_some();
        let Origin::New {
            payloads: Some(payloads),
            ..
        } = &self.origin
        else {
            return [None, None];
        };
        [
            identify.map(|_| unsealed_len(&payloads.identify)),
            track
                .filter(|_| !split)
                .map(|_| unsealed_len(&payloads.track)),
        ]
    }

    /// A new capture as a lane takes it.
    pub(super) fn leased(&self, budget: LeaseBudget) -> LeasedCapture {
        let [identify, track] = self.sizes(budget).map(|size| size.is_some());
        let payload = |event| match &self.origin {
            Origin::New {
                payloads: Some(payloads),
                ..
            } => Some(payloads.get(event).to_vec()),
            _ => None,
        };
        LeasedCapture {
            sequence: self.sequence,
            record: self.record.clone(),
            identify: identify.then(|| payload(EventType::Identify)).flatten(),
            track: track.then(|| payload(EventType::Track)).flatten(),
            damaged: false,
        }
    }
}

/// How full a lease is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filler {
    budget: LeaseBudget,
    events: usize,
    bytes: usize,
    captures: usize,
}

impl Filler {
    pub(super) fn new(budget: LeaseBudget) -> Self {
        Self {
            budget,
            events: 0,
            bytes: 0,
            captures: 0,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.captures > 0 && self.events >= self.budget.max_events
    }

    /// Takes a capture with events of these sizes, if it fits; the first one always
    /// does.
    pub(super) fn take(&mut self, sizes: impl Iterator<Item = usize>) -> bool {
        let (mut events, mut bytes) = (self.events, self.bytes);
        for size in sizes {
            events += 1;
            bytes += size + 1;
        }
        let fits = events <= self.budget.max_events && bytes <= self.budget.max_bytes;
        if fits || self.captures == 0 {
            self.captures += 1;
            (self.events, self.bytes) = (events, bytes);
            return true;
        }
        false
    }
}

/// The overlay as its threads share it.
#[derive(Debug, Default)]
pub(super) struct Shared {
    overlay: Mutex<Overlay>,
    leasing: Mutex<()>,
    rekeying: AtomicBool,
}

impl Shared {
    /// Whether payloads are being sealed anew.
    pub(super) fn is_rekeying(&self) -> bool {
        self.rekeying.load(Ordering::Relaxed)
    }

    pub(super) fn set_rekeying(&self, rekeying: bool) {
        self.rekeying.store(rekeying, Ordering::Relaxed);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Overlay> {
        self.overlay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// While this is held nothing leaves the overlay: so a snapshot of the database
    /// that is taken after it misses nothing.
    pub(super) fn hold(&self) -> MutexGuard<'_, ()> {
        self.leasing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
