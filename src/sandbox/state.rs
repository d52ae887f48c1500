//! What the sandbox remembers: the last entries, the `messageId`s, the counters.
//! One lock, held for short; everything is bounded.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{broadcast, watch};

use super::check::CheckedBatch;
use super::entry::{DropReason, Dropped, Entry, Outcome, RequestInfo, Stats};
use super::event::CheckedEvent;
use super::{Region, SandboxOptions};

/// Everything that is remembered.
pub(super) struct Store {
    state: Mutex<State>,
    /// Raised after each change of the counters.
    version: watch::Sender<u64>,
    news: broadcast::Sender<Entry>,
    hasher: RandomState,
    keep_entries: usize,
    keep_bytes: usize,
}

struct State {
    stats: Stats,
    requests_ever: u64,
    entries_ever: u64,
    entries: VecDeque<Kept>,
    kept_bytes: usize,
    seen: Seen,
}

struct Kept {
    entry: Entry,
    /// The size of the request's body, on its first entry only.
    bytes: usize,
}

/// The last accepted `messageId`s, as 64-bit hashes with a secret key: two ids
/// fall together about once in 10^13 events.
struct Seen {
    hashes: HashSet<u64, BuildHasherDefault<IsHashed>>,
    oldest_first: VecDeque<u64>,
    limit: usize,
}

impl Store {
    pub(super) fn new(options: &SandboxOptions, subscription_entries: usize) -> Self {
        Self {
            state: Mutex::new(State {
                stats: Stats::default(),
                requests_ever: 0,
                entries_ever: 0,
                entries: VecDeque::new(),
                kept_bytes: 0,
                seen: Seen::new(options.remember_message_ids),
            }),
            version: watch::Sender::new(0),
            news: broadcast::Sender::new(subscription_entries),
            hasher: RandomState::new(),
            keep_entries: options.keep_entries,
            keep_bytes: options.keep_bytes,
        }
    }

    pub(super) fn entries(&self) -> Vec<Entry> {
        let state = self.lock();
        state
            .entries
            .iter()
            .map(|kept| kept.entry.clone())
            .collect()
    }

    pub(super) fn stats(&self) -> Stats {
        self.lock().stats.clone()
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Entry> {
        self.news.subscribe()
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Changes the counters.
    pub(super) fn count(&self, change: impl FnOnce(&mut Stats)) {
        change(&mut self.lock().stats);
        self.changed();
    }

    /// Counts a request that begins and returns its number.
    pub(super) fn begin_request(&self) -> u64 {
        let mut state = self.lock();
        state.requests_ever += 1;
        let number = state.requests_ever;
        let stats = &mut state.stats;
        stats.requests += 1;
        stats.requests_in_flight += 1;
        stats.most_requests_in_flight = stats.most_requests_in_flight.max(stats.requests_in_flight);
        drop(state);
        self.changed();
        number
    }

    /// Takes the events of a request, in their order.
    pub(super) fn take(&self, request: RequestInfo, batch: &CheckedBatch<'_>) {
        let hashes: Vec<Option<u64>> = batch
            .events
            .iter()
            .map(|event| self.hash(request.region, event))
            .collect();
        let request = Arc::new(request);
        let mut state = self.lock();
        if batch.events.is_empty() {
            let dropped = batch.whole.unwrap_or(DropReason::EmptyBatch.into());
            // An empty batch is no event, but must not go unseen in the counters.
            let events = u64::try_from(batch.total).unwrap_or(u64::MAX).max(1);
            state.stats.events_dropped += events;
            *state.stats.dropped.entry(dropped.reason).or_default() += events;
            self.keep(&mut state, &request, Outcome::Dropped(dropped), None);
        }
        for (event, hash) in batch.events.iter().zip(hashes) {
            let outcome = state.decide(batch.whole, event, hash);
            self.keep(&mut state, &request, outcome, Some(event));
        }
        drop(state);
        self.changed();
    }

    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.entries = VecDeque::new();
        state.kept_bytes = 0;
        state.seen = Seen::new(state.seen.limit);
        let before = std::mem::take(&mut state.stats);
        state.stats.requests_in_flight = before.requests_in_flight;
        state.stats.most_requests_in_flight = before.requests_in_flight;
        state.stats.connections_open = before.connections_open;
        drop(state);
        self.changed();
    }

    fn keep(
        &self,
        state: &mut State,
        request: &Arc<RequestInfo>,
        outcome: Outcome,
        event: Option<&CheckedEvent<'_>>,
    ) {
        state.entries_ever += 1;
        let entry = Entry {
            seq: state.entries_ever,
            request: Arc::clone(request),
            outcome,
            warnings: event
                .map(|event| event.warnings.clone())
                .unwrap_or_default(),
            range: event
                .map(|event| range_in(&request.body, event.text))
                .unwrap_or_default(),
        };
        if self.news.receiver_count() > 0 {
            // Fails where the last receiver has just gone, which is fine.
            let _nobody_listens = self.news.send(entry.clone());
        }
        let is_first = !state
            .entries
            .back()
            .is_some_and(|last| Arc::ptr_eq(&last.entry.request, request));
        let bytes = if is_first { request.body.len() } else { 0 };
        state.kept_bytes += bytes;
        state.entries.push_back(Kept { entry, bytes });
        while state.entries.len() > self.keep_entries || state.kept_bytes > self.keep_bytes {
            let Some(oldest) = state.entries.pop_front() else {
                break;
            };
            state.kept_bytes -= oldest.bytes;
        }
    }

    /// The hash of an event's `messageId`. Segment scopes these to nothing smaller
    /// than a region: not to a source and not to a workspace.
    fn hash(&self, region: Region, event: &CheckedEvent<'_>) -> Option<u64> {
        let id = event.message_id.as_deref()?;
        Some(self.hasher.hash_one((region, id)))
    }

    fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The counters stay usable where a thread died between two of them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where `part`, a slice of `whole`, is in it.
fn range_in(whole: &str, part: &str) -> Range<usize> {
    let start = part.as_ptr().addr().saturating_sub(whole.as_ptr().addr());
    start..start + part.len()
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl State {
    fn decide(
        &mut self,
        whole: Option<Dropped>,
        event: &CheckedEvent<'_>,
        hash: Option<u64>,
    ) -> Outcome {
        let fault = whole.map_or(event.verdict, Err);
        if let Err(dropped) = fault {
            self.stats.events_dropped += 1;
            *self.stats.dropped.entry(dropped.reason).or_default() += 1;
            return Outcome::Dropped(dropped);
        }
        if hash.is_some_and(|hash| !self.seen.is_new(hash)) {
            self.stats.events_duplicate += 1;
            return Outcome::Duplicate;
        }
        self.stats.events_accepted += 1;
        Outcome::Accepted
    }
}

impl Seen {
    fn new(limit: usize) -> Self {
        Self {
            hashes: HashSet::default(),
            oldest_first: VecDeque::new(),
            limit,
        }
    }

    /// Whether the hash isn't remembered; it is from now on.
    fn is_new(&mut self, hash: u64) -> bool {
        if !self.hashes.insert(hash) {
            return false;
        }
        self.oldest_first.push_back(hash);
        if self.oldest_first.len() > self.limit
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.hashes.remove(&oldest);
        }
        true
    }
}

/// Passes on what is a hash already.
#[derive(Default)]
struct IsHashed(u64);

impl Hasher for IsHashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[cfg(test)]
mod tests;
