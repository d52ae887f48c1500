//! The captures whose newest state is in the journal and not in the database yet.
//!
//! One thread changes it (`committer`), everybody reads it. Whoever looks for a
//! capture looks here first: what stands here is newer than what the database has.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use foldhash::HashMap;

use super::{
    entry::{Entry, Key, Origin, bytes, events},
    filter::Filter,
    fresh::Fresh,
    recent::Recent,
    tally::{Reserved, Tally},
};
use crate::{
    integration::IntegrationId,
    outbox::{Backlog, LaneKey, LeaseBudget, LeaseScope},
    time::UnixMillis,
};

/// So long after a refusal room counts as scarce.
const SCARCE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Lane {
    /// New captures with events that wait.
    fresh: Fresh,
    fresh_events: u64,
    /// No capture of the database up to this one waits; they are settled here.
    passed: i64,
}

/// What a lease finds here.
pub(super) struct Found {
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
    /// Captures here with dead letters, which the database may not have yet.
    dead: HashMap<IntegrationId, usize>,
    pub(super) tally: Tally,
    /// Room that captures on their way here have.
    pub(super) reserved: Reserved,
    /// When a capture was refused for want of room, the last time.
    pub(super) last_refusal: Option<Instant>,
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

    /// The keys of all captures here.
    pub(super) fn keys(&self) -> impl Iterator<Item = Key> {
        self.keys.keys().copied()
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
    pub(super) fn put(&mut self, entry: &Arc<Entry>, before: [Option<u64>; 2]) {
        let old = self.entries.insert(entry.sequence, Arc::clone(entry));
        let waited = old.as_ref().map_or(before, |old| old.waiting);
        let was_dead = old.as_ref().is_some_and(|old| old.has_dead_letter());
        match (was_dead, entry.has_dead_letter()) {
            (false, true) => {
                *self
                    .dead
                    .entry(entry.record.integration_id.clone())
                    .or_default() += 1
            }
            (true, false) => self.forget_dead(entry),
            _ => {}
        }
        if old.is_none() {
            self.keys.insert(entry.key, entry.sequence);
        }
        let Some(lane) = &entry.lane else { return };
        let was = old.map_or(0, |old| old.fresh_events());
        self.count_fresh(lane, entry.sequence, was, entry.fresh_events());
        let (gone, come) = (events(&waited), events(&entry.waiting));
        if gone > 0 {
            self.tally.remove(lane, gone, bytes(&waited));
        }
        if come > 0 {
            self.tally.add(lane, come, bytes(&entry.waiting));
        }
    }

    /// These states are in the database now. What was changed meanwhile was so after
    /// record number `through`.
    pub(super) fn flushed(&mut self, entries: &[Arc<Entry>], through: u64) {
        for entry in entries {
            let Some(current) = self.entries.get(&entry.sequence) else {
                continue;
            };
            let was = current.fresh_events();
            if !Arc::ptr_eq(current, entry) {
                let stored = Entry {
                    record: Arc::clone(&current.record),
                    lane: current.lane.clone(),
                    origin: Origin::Stored,
                    since: through + 1,
                    ..**current
                };
                self.entries.insert(entry.sequence, Arc::new(stored));
            } else {
                self.entries.remove(&entry.sequence);
                if entry.has_dead_letter() {
                    self.forget_dead(entry);
                }
                // A newer capture may have its place.
                if self.keys.get(&entry.key) == Some(&entry.sequence) {
                    self.keys.remove(&entry.key);
                }
            }
            if let Some(lane) = &entry.lane {
                self.count_fresh(lane, entry.sequence, was, 0);
            }
        }
        if self.entries.is_empty() {
            // What a burst has taken goes back.
            self.entries.shrink_to(1_024);
            self.keys.shrink_to(1_024);
            self.lanes.retain(|_, lane| {
                lane.fresh = Fresh::default();
                lane.passed > 0
            });
        }
    }

    fn forget_dead(&mut self, entry: &Entry) {
        let id = &entry.record.integration_id;
        if let Some(count) = self.dead.get_mut(id) {
            *count -= 1;
            if *count == 0 {
                self.dead.remove(id);
            }
        }
    }

    /// Whether dead letters of integrations of these names, or of any, may be here alone.
    pub(super) fn has_dead_letters(&self, names: Option<&[IntegrationId]>) -> bool {
        match names {
            None => !self.dead.is_empty(),
            Some(names) => self
                .dead
                .keys()
                .any(|id| names.iter().any(|one| one.name() == id.name())),
        }
    }

    /// Notes how many events of a new capture wait here, and how many did.
    fn count_fresh(&mut self, lane: &LaneKey, sequence: i64, was: u64, is: u64) {
        if was == is {
            return;
        }
        let entries = &self.entries;
        change_lane(&mut self.lanes, lane, |state| {
            state.fresh_events = state.fresh_events + is - was;
            if was == 0 {
                state.fresh.add(sequence);
            } else if is == 0 {
                let others = |other| entries.get(&other).is_some_and(is_fresh);
                state.fresh.remove(sequence, others);
            }
        });
    }

    /// The database has been changed beside this, while it was empty.
    pub(super) fn replace_tally(&mut self, tally: Tally) {
        self.tally = tally;
        self.lanes.clear();
    }

    /// What waits here of a lane, as far as a scope and a budget can take it.
    pub(super) fn fresh(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
        scope: &LeaseScope<i64>,
    ) -> Found {
        let state = self.lanes.get(lane);
        let mut filler = Filler::new(budget);
        let mut captures = Vec::new();
        let waiting = state.iter().flat_map(|state| self.waiting(state));
        for entry in waiting.filter(|entry| entry.is_in(scope)) {
            let sizes = entry.sizes(budget);
            if filler.is_full() || !filler.take(sizes.into_iter().flatten()) {
                break;
            }
            captures.push(Arc::clone(entry));
        }
        let fresh_events = state.map_or(0, |state| state.fresh_events);
        Found {
            captures,
            stored_wait: self.tally.lane(lane).events > fresh_events,
            passed: state.map_or(0, |state| state.passed),
        }
    }

    /// The new captures of a lane with events that wait, in their order.
    fn waiting(&self, lane: &Lane) -> impl Iterator<Item = &Arc<Entry>> {
        let entries = lane.fresh.iter().filter_map(|one| self.entries.get(&one));
        entries.filter(|entry| is_fresh(entry))
    }

    /// Notes that no capture of the database up to `sequence` waits in a lane.
    pub(super) fn pass(&mut self, lane: &LaneKey, sequence: i64) {
        change_lane(&mut self.lanes, lane, |state| {
            state.passed = state.passed.max(sequence);
        });
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
            let first = state.and_then(|state| self.waiting(state).next());
            let time = first.map(|entry| entry.record.accept_time);
            backlog.oldest = earlier(backlog.oldest, time);
            if waiting.events > state.map_or(0, |state| state.fresh_events) {
                stored.push((lane.clone(), state.map_or(0, |state| state.passed)));
            }
        }
        (backlog, stored)
    }
}

fn is_fresh(entry: &Arc<Entry>) -> bool {
    entry.fresh_events() > 0
}

/// Changes what is known of a lane. A key is copied for a new one alone: copies change a
/// count that all threads share.
fn change_lane(lanes: &mut HashMap<LaneKey, Lane>, lane: &LaneKey, change: impl FnOnce(&mut Lane)) {
    if let Some(state) = lanes.get_mut(lane) {
        change(state);
    } else {
        change(lanes.entry(lane.clone()).or_default());
    }
}

/// The earlier of two times.
pub(super) fn earlier(a: Option<UnixMillis>, b: Option<UnixMillis>) -> Option<UnixMillis> {
    a.into_iter().chain(b).min()
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
    /// Whether a capture was refused for want of room of late.
    scarce: AtomicBool,
    /// Whether callers wait for the flush under way, or soon will.
    urgent: AtomicBool,
    /// Which ids may be known; nothing while that is found out.
    filter: Mutex<Option<Arc<Filter>>>,
    /// Keys of the database that are not in its index yet.
    pub(super) recent: Arc<Recent>,
    /// Rows at which lists and counts have looked.
    scanned: AtomicU64,
}

impl Shared {
    pub(super) fn note_scanned(&self, rows: usize) {
        self.scanned.fetch_add(rows as u64, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn scanned(&self) -> u64 {
        self.scanned.load(Ordering::Relaxed)
    }

    /// Whether payloads are being sealed anew.
    pub(super) fn is_rekeying(&self) -> bool {
        self.rekeying.load(Ordering::Relaxed)
    }

    pub(super) fn set_rekeying(&self, rekeying: bool) {
        self.rekeying.store(rekeying, Ordering::Relaxed);
    }

    /// Whether room is to be reserved before a capture is handed over.
    pub(super) fn is_scarce(&self) -> bool {
        self.scarce.load(Ordering::Relaxed)
    }

    /// Notes that a capture finds no room.
    pub(super) fn note_refusal(&self, overlay: &mut Overlay, now: Instant) {
        overlay.last_refusal = Some(now);
        self.scarce.store(true, Ordering::Relaxed);
    }

    /// Notes that captures found room.
    pub(super) fn note_room(&self, overlay: &Overlay, now: Instant) {
        let of_late = |at| now.saturating_duration_since(at) < SCARCE;
        if self.is_scarce() && !overlay.last_refusal.is_some_and(of_late) {
            self.scarce.store(false, Ordering::Relaxed);
        }
    }

    /// Whether the writer should not rest.
    pub(super) fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed)
    }

    pub(super) fn set_urgent(&self, urgent: bool) {
        self.urgent.store(urgent, Ordering::Relaxed);
    }

    pub(super) fn set_filter(&self, filter: Arc<Filter>) {
        *self.filter.lock().unwrap_or_else(PoisonError::into_inner) = Some(filter);
    }

    pub(super) fn filter(&self) -> Option<Arc<Filter>> {
        let filter = self.filter.lock();
        filter.unwrap_or_else(PoisonError::into_inner).clone()
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
