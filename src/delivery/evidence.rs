//! What the lanes of a source learn from each other: evidence on whether an event, or the
//! source (an integration and a region), is to blame.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    classify::FaultKind,
    condition::{Condition, SourceTrack},
};
use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, LeasedCapture, SHARDS},
    region::Region,
    time::UnixMillis,
};

/// Suspects in a row, with nothing taken in between, after which it is the source that is sick.
const SUSPECTS_IN_ROW: u32 = 4;

/// How long a source's refusals are no proof after one of them was shown to be wrong.
const DOUBT: Duration = Duration::from_secs(600);

/// What a lane found out with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Nothing: Segment asked for a pause.
    Nothing,
    /// Events were taken.
    Taken,
    /// All events were taken by now of a request that had been refused for good, with this
    /// number: the source's refusals prove nothing.
    TakenAfterAll(u64),
    /// A suspect was given up for its own fault.
    GivenUp,
    /// It failed, and no event is to blame.
    Held,
    /// Several events failed together.
    Together(FaultKind),
    /// An event failed alone.
    Alone {
        /// How.
        kind: FaultKind,
        /// Whether it was no suspect before.
        is_new: bool,
        /// Whether others of its lane were taken since it failed first.
        is_passed: bool,
    },
}

/// What is known of a source at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Number of the last request that was taken.
    pub taken: Option<u64>,
    /// Number of the last request that was refused for good: with one event that was not
    /// given up for it, or of another lane.
    pub refused: Option<u64>,
    /// Suspects in a row, with nothing taken in between.
    pub suspects_in_row: u32,
    /// Suspects that other lanes have set aside.
    pub set_aside: usize,
    /// Since when nothing is taken, for no event's fault.
    pub sick_since: Option<UnixMillis>,
    /// When everything was taken last of a request that had been refused for good.
    pub disproved: Option<UnixMillis>,
    /// Counts up when a source that was sick takes something.
    pub recoveries: u64,
}

impl Evidence {
    /// Whether the source is to blame, and no single event.
    #[must_use]
    pub fn is_sick(&self) -> bool {
        self.suspects_in_row >= SUSPECTS_IN_ROW
    }

    /// Whether what is refused for good may be given up for it. While a share of an endpoint's
    /// servers refuses everything, it may not.
    #[must_use]
    pub fn is_believed(&self, now: UnixMillis) -> bool {
        self.disproved.is_none_or(|at| now.since(at) >= DOUBT)
    }

    /// The same with one more suspect.
    pub(super) fn with_suspect(mut self, is_new: bool) -> Self {
        self.suspects_in_row += u32::from(is_new);
        self
    }
}

/// A request that has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Begun {
    /// Its number in its source, from 1.
    pub request: u64,
    /// Number of the last request that had been taken by then.
    pub taken: Option<u64>,
}

/// What a finding changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The source's condition, if it is another one.
    pub condition: Option<Condition>,
    /// Whether the source was sick and works again: its lanes need not wait any longer.
    pub recovered: bool,
}

/// One source.
#[derive(Debug, Default)]
struct Source {
    /// Requests so far.
    requests: u64,
    /// The integration's etag at the last one.
    etag: String,
    /// Number of the last request before that etag.
    changed: u64,
    evidence: Evidence,
    set_aside: [usize; SHARDS as usize],
    /// Number of each lane's last request with several events that was refused for good.
    refused_together: [Option<u64>; SHARDS as usize],
    track: SourceTrack,
    told: Condition,
}

impl Source {
    fn begin(&mut self, etag: &str) -> Begun {
        if self.etag != etag {
            // What was taken with another key says nothing of this one, nor does what failed.
            etag.clone_into(&mut self.etag);
            self.changed = self.requests;
            self.evidence = Evidence {
                recoveries: self.evidence.recoveries,
                ..Evidence::default()
            };
        }
        self.requests += 1;
        Begun {
            request: self.requests,
            taken: self.evidence.taken,
        }
    }

    fn note(&mut self, shard: u16, finding: Finding, request: u64, now: UnixMillis) -> bool {
        let evidence = &mut self.evidence;
        match finding {
            Finding::Nothing | Finding::GivenUp => {}
            Finding::Taken | Finding::TakenAfterAll(_) => {
                if let Finding::TakenAfterAll(refused) = finding
                    && refused > self.changed
                {
                    evidence.disproved = Some(now);
                }
                let recovered = evidence.is_sick();
                evidence.taken = evidence.taken.max(Some(request));
                evidence.suspects_in_row = 0;
                evidence.sick_since = None;
                evidence.recoveries += u64::from(recovered);
                return recovered;
            }
            Finding::Held => {
                evidence.sick_since.get_or_insert(now);
            }
            Finding::Together(kind) => {
                let lane = self.refused_together.get_mut(usize::from(shard));
                if let Some(refused) = lane.filter(|_| kind.is_refusal()) {
                    *refused = Some(request);
                }
            }
            Finding::Alone { kind, is_new, .. } => {
                *evidence = evidence.with_suspect(is_new);
                if kind.is_refusal() {
                    evidence.refused = evidence.refused.max(Some(request));
                }
                if evidence.is_sick() {
                    evidence.sick_since.get_or_insert(now);
                } else {
                    evidence.sick_since = None;
                }
            }
        }
        false
    }

    /// A change of the condition since it was told.
    fn change(&mut self) -> Option<Condition> {
        let condition = self.track.condition();
        (condition != std::mem::replace(&mut self.told, condition)).then_some(condition)
    }
}

/// All sources.
#[derive(Debug)]
pub struct Sources {
    broken_after: Duration,
    sources: Mutex<HashMap<(IntegrationId, Region), Source>>,
}

impl Sources {
    /// A source is broken when the deliveries of a lane have failed for so long.
    #[must_use]
    pub fn new(broken_after: Duration) -> Self {
        Self {
            broken_after,
            sources: Mutex::default(),
        }
    }

    fn with<T>(&self, lane: &LaneKey, work: impl FnOnce(&mut Source) -> T) -> T {
        let mut sources = self.lock();
        let key = (lane.integration_id.clone(), lane.region);
        work(sources.entry(key).or_default())
    }

    /// Notes that a request begins, with the integration of this etag.
    pub(super) fn begin(&self, lane: &LaneKey, etag: &str) -> Begun {
        self.with(lane, |source| source.begin(etag))
    }

    /// What is known of a lane's source.
    pub(super) fn evidence(&self, lane: &LaneKey) -> Evidence {
        self.with(lane, |source| {
            let lanes = source.set_aside.iter().zip(&source.refused_together);
            let others = lanes.enumerate();
            let others = others.filter(|(shard, _)| *shard != usize::from(lane.shard));
            let mut evidence = source.evidence;
            for (_, (set_aside, refused)) in others {
                evidence.set_aside += set_aside;
                evidence.refused = evidence.refused.max(*refused);
            }
            evidence
        })
    }

    /// Notes what a lane found out with a request, and how many suspects it has now.
    pub(super) fn note(
        &self,
        lane: &LaneKey,
        request: u64,
        finding: Finding,
        set_aside: usize,
        now: UnixMillis,
    ) -> Change {
        self.with(lane, |source| {
            let recovered = source.note(lane.shard, finding, request, now);
            if let Some(count) = source.set_aside.get_mut(usize::from(lane.shard)) {
                *count = set_aside;
            }
            let (sick, after) = (source.evidence.is_sick(), self.broken_after);
            let standing = (set_aside, sick);
            source.track.note(lane.shard, finding, standing, now, after);
            Change {
                condition: source.change(),
                recovered,
            }
        })
    }

    /// Notes that nothing waits in a lane; returns a change of the condition.
    pub(super) fn emptied(&self, lane: &LaneKey) -> Option<Condition> {
        self.with(lane, |source| {
            source.track.emptied(lane.shard);
            if let Some(count) = source.set_aside.get_mut(usize::from(lane.shard)) {
                *count = 0;
            }
            source.change()
        })
    }

    /// Remembers how a source stood before the relay was started.
    pub(super) fn recall(&self, lane: &LaneKey, leased: &[LeasedCapture]) {
        self.with(lane, |source| {
            let records = leased.iter().map(|capture| &*capture.record);
            source.track.recall(lane.shard, records, self.broken_after);
            source.told = source.track.condition();
        });
    }

    /// The worst condition of an integration's sources.
    #[must_use]
    pub fn condition(&self, id: &IntegrationId) -> Condition {
        let sources = self.lock();
        let of = |region: &Region| sources.get(&(id.clone(), *region));
        let own = Region::ALL.iter().filter_map(of);
        let conditions = own.map(|source| source.track.condition());
        conditions.max().unwrap_or_default()
    }

    /// Forgets an integration that is no more.
    pub fn forget(&self, id: &IntegrationId) {
        self.lock().retain(|(known, _), _| known != id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(IntegrationId, Region), Source>> {
        // Nothing under this lock can panic half-way.
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
