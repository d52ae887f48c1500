//! Which lanes this relay holds.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use prost::Message;

use super::{
    Shared,
    message::{LaneRecord, StoredRecord, decode},
    names::{lane_token, parse_lane},
    queue::Replaced,
    removal::Removal,
    wire::{StoreError, ToStore, unavailable},
};
use crate::{
    outbox::{LaneKey, OutboxError},
    status::CaptureRecord,
};

/// How often it is looked whether a lane was handed over.
const HANDOVER_POLL: Duration = Duration::from_millis(50);
/// How long a wish for a lane holds, unless it is repeated.
const WISH: Duration = Duration::from_secs(1);

/// The lanes that were asked for here.
#[derive(Default)]
pub(super) struct Lanes(Mutex<HashMap<LaneKey, Arc<Slot>>>);

/// A lane's place.
#[derive(Default)]
pub(super) struct Slot {
    /// What is held; one works with it at a time.
    pub(super) hold: tokio::sync::Mutex<Option<Hold>>,
    /// The session that has asked for it, and when.
    wanted_by: Mutex<Option<(String, Instant)>>,
    /// How many need it to stay here: erasures.
    pins: Mutex<usize>,
}

/// A lane that this relay holds.
pub(super) struct Hold {
    /// Of the lane's record.
    pub(super) revision: u64,
    pub(super) record: LaneRecord,
    /// What was leased last, in order, with what was passed over.
    pub(super) leased: Vec<Leased>,
    /// When, if it is not settled.
    pub(super) leased_at: Option<Instant>,
    pub(super) removal: Removal,
    pub(super) replaced: Replaced,
    /// Bytes of messages for each byte of events, as last read.
    pub(super) packing: f64,
}

/// A waiting capture that was read.
pub(super) struct Leased {
    pub(super) queue: usize,
    /// Where it waits.
    pub(super) position: u64,
    /// Where the next one does.
    pub(super) next: u64,
    pub(super) stored: StoredRecord,
    pub(super) record: CaptureRecord,
    /// Of the record's last version.
    pub(super) revision: u64,
    /// Which events it has payloads of.
    pub(super) carries: [bool; 2],
    /// Whether nothing of it waits any more.
    pub(super) done: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lanes {
    pub(super) fn slot(&self, lane: &LaneKey) -> Arc<Slot> {
        Arc::clone(lock(&self.0).entry(lane.clone()).or_default())
    }

    fn all(&self) -> Vec<(LaneKey, Arc<Slot>)> {
        let slots = lock(&self.0);
        slots
            .iter()
            .map(|(lane, slot)| (lane.clone(), Arc::clone(slot)))
            .collect()
    }

    /// The session has ended: all lanes are lost.
    pub(super) fn forget_all(&self) {
        // Whoever works with one finds its revision changed.
        lock(&self.0).clear();
    }
}

impl Slot {
    pub(super) fn pin(self: &Arc<Self>) -> Pin {
        *lock(&self.pins) += 1;
        Pin(Arc::clone(self))
    }

    fn is_pinned(&self) -> bool {
        *lock(&self.pins) > 0
    }

    /// The session that still asks for it.
    fn wanted_by(&self) -> Option<String> {
        let wanted = lock(&self.wanted_by);
        let (session, at) = wanted.as_ref()?;
        (at.elapsed() < WISH).then(|| session.clone())
    }
}

/// Keeps a lane where it is, for as long as it lives.
pub(super) struct Pin(Arc<Slot>);

impl Drop for Pin {
    fn drop(&mut self) {
        *lock(&self.0.pins) -= 1;
    }
}

impl Hold {
    /// Whether a request with what was leased may be under way.
    pub(super) fn is_in_flight(&self, guard: Duration) -> bool {
        self.leased_at.is_some_and(|at| at.elapsed() < guard)
    }
}

impl Shared {
    /// Makes sure that this relay holds the lane, if it may. Returns whether it does.
    pub(super) async fn hold_lane(
        &self,
        lane: &LaneKey,
        slot: &Slot,
        hold: &mut Option<Hold>,
    ) -> Result<bool, OutboxError> {
        let wanted_by = slot.wanted_by();
        let may_keep = slot.is_pinned() || (wanted_by.is_none() && self.sessions.prefers_own(lane));
        if may_keep {
            if hold.is_none() {
                *hold = self.claim(lane, false).await?;
            }
            if hold.is_none() {
                // Another relay that lives has it: it gives it up between two requests.
                self.ask_for(lane).await;
            }
            return Ok(hold.is_some());
        }
        if hold.is_none() && wanted_by.is_some() {
            // It may be this relay's without its knowledge: an answer was lost, or nobody works here.
            *hold = self.claim(lane, true).await?;
        }
        if let Some(held) = hold.as_ref()
            && !held.is_in_flight(self.guard())
        {
            lock(&slot.wanted_by).take();
            self.hand_over(lane, hold, wanted_by.unwrap_or_default())
                .await?;
        }
        Ok(false)
    }

    async fn ask_for(&self, lane: &LaneKey) {
        if let Some(own) = self.sessions.name() {
            let wanted = format!("{} {own}", lane_token(lane));
            let asked = self
                .wire
                .client
                .publish(self.layout.wanted(), wanted.into());
            if let Err(error) = asked.await {
                tracing::debug!(%error, %lane, "nobody was asked for a lane");
            }
        }
    }

    /// Takes the lane, if nobody who lives holds it; or if it is this relay's already.
    async fn claim(&self, lane: &LaneKey, only_own: bool) -> Result<Option<Hold>, OutboxError> {
        let (stream, subject) = (
            self.layout.stream_of(&lane.integration_id),
            self.layout.lane(lane),
        );
        let found = self.wire.last(&stream, &subject).await?;
        let (before, mut record) = match &found {
            None => (0, LaneRecord::default()),
            Some((stored, _)) => (stored.sequence, decode("lane", stored.payload.clone())?),
        };
        let Some(own) = self.sessions.own(self.guard()) else {
            return Err(unavailable("the session is not good for a request now"));
        };
        if only_own && record.session != own {
            return Ok(None);
        }
        let free = record.session.is_empty() || record.session == own;
        if !free && !self.sessions.has_ended(&self.wire, &record.session).await? {
            return Ok(None);
        }
        record.session = own;
        record.cursors.resize(2, 0);
        record.touched.resize(2, 0);
        record.beyond.resize(2, 0);
        let stored = self.wire.store(vec![ToStore {
            subject: subject.clone(),
            payload: record.encode_to_vec().into(),
            expected: Some(before),
            keep: None,
        }]);
        let revision = match stored.await {
            Ok(revision) => revision,
            Err(StoreError::Conflict) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        tracing::debug!(%lane, revision, "took a lane");
        // Versions that nobody removed.
        if let Err(error) = self.wire.purge_before(&stream, &subject, revision).await {
            tracing::debug!(%error, %lane, "old records of a lane stay");
        }
        let hold = Hold {
            revision,
            record,
            leased: Vec::new(),
            leased_at: None,
            removal: Removal::default(),
            replaced: self.replaced(lane).await?,
            packing: 1.0,
        };
        let all = hold.replaced.iter().flatten().copied();
        self.finish_replacing(lane, all).await?;
        Ok(Some(hold))
    }

    /// Gives the lane to a session, or to whoever comes.
    async fn hand_over(
        &self,
        lane: &LaneKey,
        hold: &mut Option<Hold>,
        session: String,
    ) -> Result<(), OutboxError> {
        let Some(held) = hold else { return Ok(()) };
        let record = LaneRecord {
            session,
            ..held.record.clone()
        };
        let stored = self.wire.store(vec![ToStore {
            subject: self.layout.lane(lane),
            payload: record.encode_to_vec().into(),
            expected: Some(held.revision),
            keep: None,
        }]);
        match stored.await {
            Ok(_) | Err(StoreError::Conflict) => {
                self.deleter
                    .remove(&self.layout.stream_of(&lane.integration_id), held.revision);
                *hold = None;
                tracing::debug!(%lane, "gave a lane up");
                self.tell_lanes(std::slice::from_ref(lane)).await;
                Ok(())
            }
            Err(error) => {
                // It may have been given up: whoever holds it is asked before the next lease.
                *hold = None;
                Err(error.into())
            }
        }
    }

    /// Gives up the lanes that others should have.
    pub(super) async fn hand_over_misplaced(&self) {
        for (lane, slot) in self.lanes.all() {
            let Ok(mut hold) = slot.hold.try_lock() else {
                continue;
            };
            if hold.is_none() || self.closing.is_cancelled() {
                continue;
            }
            let may_keep = slot.is_pinned()
                || (slot.wanted_by().is_none() && self.sessions.prefers_own(&lane));
            if !may_keep && let Err(error) = self.hold_lane(&lane, &slot, &mut hold).await {
                tracing::debug!(%error, %lane, "a lane cannot be given up now");
            }
        }
    }

    /// Takes a lane for an erasure, from a relay that lives too: it gives the lane up
    /// when no request of the lane is under way. Requests of this relay are waited for, too:
    /// where another relay has replayed dead letters meanwhile, nobody has held their lane yet.
    pub(super) async fn take_lane(&self, lane: &LaneKey) -> Result<Pin, OutboxError> {
        let slot = self.lanes.slot(lane);
        let pin = slot.pin();
        let deadline = Instant::now() + self.guard() + self.lease();
        loop {
            let mut hold = slot.hold.lock().await;
            let is_here = self.hold_lane(lane, &slot, &mut hold).await?;
            let is_idle = hold
                .as_ref()
                .is_some_and(|hold| !hold.is_in_flight(self.guard()));
            drop(hold);
            if is_here && is_idle {
                return Ok(pin);
            }
            if Instant::now() > deadline {
                return Err(unavailable(format!(
                    "the lane {lane} was not given up in time"
                )));
            }
            tokio::time::sleep(HANDOVER_POLL).await;
        }
    }
}

/// Gives up lanes that others ask for, until the outbox closes.
pub(super) async fn serve_wanted(shared: Arc<Shared>) {
    loop {
        let Ok(mut asked) = shared.wire.client.subscribe(shared.layout.wanted()).await else {
            return;
        };
        loop {
            let next = tokio::select! {
                () = shared.closing.cancelled() => return,
                next = asked.next() => next,
            };
            let Some(message) = next else { break };
            let text = String::from_utf8_lossy(&message.payload);
            let Some((lane, session)) = text.split_once(' ') else {
                continue;
            };
            if shared.sessions.name().as_deref() == Some(session) {
                continue;
            }
            let Some(lane) = parse_lane(lane) else {
                continue;
            };
            let slot = shared.lanes.slot(&lane);
            *lock(&slot.wanted_by) = Some((session.to_owned(), Instant::now()));
            // Whoever works with it now hands it over at the next lease.
            let Ok(mut hold) = slot.hold.try_lock() else {
                continue;
            };
            if slot.is_pinned() {
                continue;
            }
            if let Err(error) = shared.hold_lane(&lane, &slot, &mut hold).await {
                tracing::debug!(%error, %lane, "a lane cannot be given up now");
            }
        }
    }
}
