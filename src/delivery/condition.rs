//! When an integration's deliveries stop working, and when they work again: what
//! people are told.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use super::verdict::Verdict;
use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, LeasedCapture},
    proto::DeliveryReason,
    region::Region,
    status::CaptureRecord,
    time::UnixMillis,
};

/// How a source takes its events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Condition {
    /// It takes them, or nothing is known yet.
    #[default]
    Healthy,
    /// The write key is refused.
    Parked,
    /// Deliveries have failed for long.
    Broken,
}

/// One source's history, as far as it matters.
#[derive(Clone, Copy, Debug, Default)]
struct Track {
    condition: Condition,
    failing_since: Option<UnixMillis>,
}

impl Track {
    /// Notes what an answer means; returns a change of the condition.
    fn note(&mut self, verdict: Verdict, now: UnixMillis, after: Duration) -> Option<Condition> {
        let next = match verdict {
            // Segment has looked at the events, so the source works.
            Verdict::Delivered | Verdict::Poisoned => {
                self.failing_since = None;
                Condition::Healthy
            }
            Verdict::Unauthorized => Condition::Parked,
            // Segment is busy; that is no fault.
            Verdict::Pause(_) => self.condition,
            Verdict::Retry(_) | Verdict::Rejected => {
                let since = *self.failing_since.get_or_insert(now);
                if self.condition == Condition::Healthy && now.since(since) >= after {
                    Condition::Broken
                } else {
                    self.condition
                }
            }
        };
        let changed = next != self.condition;
        self.condition = next;
        changed.then_some(next)
    }

    /// How a source stood before the relay was started, by what its events have
    /// been through since they were queued.
    fn of_history(record: &CaptureRecord, after: Duration) -> Option<Self> {
        let mut attempts = record.attempts.iter();
        let first = attempts.find(|attempt| attempt.time >= record.queue_time)?;
        let last = attempts.next_back().unwrap_or(first);
        let failing_since = Some(first.time);
        let condition = match last.reason {
            DeliveryReason::Unauthorized => Condition::Parked,
            DeliveryReason::Network | DeliveryReason::Timeout | DeliveryReason::ServerError => {
                if last.time.since(first.time) >= after {
                    Condition::Broken
                } else {
                    Condition::Healthy
                }
            }
            _ => return None,
        };
        Some(Self {
            condition,
            failing_since,
        })
    }
}

/// The conditions of all sources.
#[derive(Debug)]
pub struct Conditions {
    broken_after: Duration,
    tracks: Mutex<HashMap<(IntegrationId, Region), Track>>,
}

impl Conditions {
    /// A source is broken when its deliveries have failed for so long.
    #[must_use]
    pub fn new(broken_after: Duration) -> Self {
        Self {
            broken_after,
            tracks: Mutex::default(),
        }
    }

    /// Remembers how a source stood before the relay was started, so that people are
    /// told once that it fails, and that it works again.
    pub(super) fn recall(&self, lane: &LaneKey, leased: &[LeasedCapture]) {
        let source = (lane.integration_id.clone(), lane.region);
        let mut tracks = self.tracks.lock().unwrap_or_else(PoisonError::into_inner);
        if tracks.contains_key(&source) {
            return;
        }
        let mut records = leased.iter().map(|capture| &capture.record);
        let known = records.find_map(|record| Track::of_history(record, self.broken_after));
        if let Some(track) = known {
            tracks.insert(source, track);
        }
    }

    /// Notes what an answer means; returns a change of the condition.
    pub(super) fn note(
        &self,
        id: &IntegrationId,
        region: Region,
        verdict: Verdict,
        now: UnixMillis,
    ) -> Option<Condition> {
        let mut tracks = self.tracks.lock().unwrap_or_else(PoisonError::into_inner);
        let track = tracks.entry((id.clone(), region)).or_default();
        track.note(verdict, now, self.broken_after)
    }

    /// Forgets an integration that is no more.
    pub fn forget(&self, id: &IntegrationId) {
        let mut tracks = self.tracks.lock().unwrap_or_else(PoisonError::into_inner);
        tracks.retain(|(known, _), _| known != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_parked_at_once_broken_after_a_while_and_healthy_with_one_success() {
        let after = Duration::from_secs(10);
        let failed = Verdict::Retry(DeliveryReason::Network);
        let mut track = Track::default();
        let at = |seconds: i64| UnixMillis(seconds * 1_000);
        for (verdict, seconds, change) in [
            (Verdict::Delivered, 0, None),
            (failed, 1, None),
            (failed, 10, None),
            (failed, 11, Some(Condition::Broken)),
            (failed, 50, None),
            (Verdict::Delivered, 51, Some(Condition::Healthy)),
            (failed, 52, None),
            (Verdict::Unauthorized, 53, Some(Condition::Parked)),
            (Verdict::Unauthorized, 54, None),
            (failed, 100, None),
            (Verdict::Pause(after), 101, None),
            (Verdict::Poisoned, 102, Some(Condition::Healthy)),
        ] {
            assert_eq!(
                track.note(verdict, at(seconds), after),
                change,
                "at {seconds}"
            );
        }
    }
}
