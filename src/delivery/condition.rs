//! How a source takes its events: what people are told.

use std::time::Duration;

use super::{classify::FaultKind, evidence::Finding};
use crate::{
    outbox::SHARDS,
    proto::{DeliveryReason, SourceCondition},
    status::CaptureRecord,
    time::UnixMillis,
};

/// Refused keys of single events in a row, with nothing taken in between, that park a source.
const KEYS_IN_ROW: u32 = 2;

/// How a source or a lane takes its events, from the best to the worst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// It takes them, or nothing is known yet.
    #[default]
    Healthy,
    /// Deliveries have failed for long.
    Broken,
    /// Several events in a row were refused alone, and none was taken.
    Suspended,
    /// The same, and it is the write key that is refused.
    Parked,
}

impl Condition {
    /// From 0, healthy, to 3, parked.
    #[must_use]
    pub fn rank(self) -> u8 {
        self as u8
    }

    /// The schema's condition.
    #[must_use]
    pub fn to_proto(self) -> SourceCondition {
        match self {
            Self::Healthy => SourceCondition::Healthy,
            Self::Broken => SourceCondition::Broken,
            Self::Suspended => SourceCondition::Suspended,
            Self::Parked => SourceCondition::Parked,
        }
    }
}

/// One lane's history, as far as it matters.
#[derive(Clone, Copy, Debug, Default)]
struct Track {
    condition: Condition,
    failing_since: Option<UnixMillis>,
}

impl Track {
    fn fail(&mut self, worse: Condition, now: UnixMillis, after: Duration) {
        let since = *self.failing_since.get_or_insert(now);
        let by_time = match now.since(since) >= after {
            true => Condition::Broken,
            false => Condition::Healthy,
        };
        self.condition = self.condition.max(worse).max(by_time);
    }

    /// How a lane stood before the relay was started, by what an event of it has been
    /// through since it was queued.
    fn of_history(record: &CaptureRecord, after: Duration) -> Option<Self> {
        let own = |attempt: &&crate::status::Attempt| attempt.time >= record.queue_time;
        let mut attempts = record.attempts.iter().filter(own);
        let first = attempts.next()?;
        let refused = |one: &&crate::status::Attempt| one.reason == DeliveryReason::Unauthorized;
        let keys = record.attempts.iter().filter(own).filter(refused).count();
        let last = attempts.next_back().unwrap_or(first);
        if last.reason == DeliveryReason::Unspecified {
            return None;
        }
        let condition = if last.reason == DeliveryReason::Unauthorized && keys > 1 {
            Condition::Parked
        } else if last.time.since(first.time) >= after {
            Condition::Broken
        } else {
            Condition::Healthy
        };
        Some(Self {
            condition,
            failing_since: Some(first.time),
        })
    }
}

/// A source's condition: that of its worst lane.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SourceTrack {
    lanes: [Option<Track>; SHARDS as usize],
    keys_in_row: u32,
}

impl SourceTrack {
    pub(super) fn condition(&self) -> Condition {
        let lanes = self.lanes.iter().flatten();
        lanes.map(|lane| lane.condition).max().unwrap_or_default()
    }

    /// Notes what came of a request of a lane, of which so many suspects are set aside now.
    /// `sick`: several suspects in a row.
    pub(super) fn note(
        &mut self,
        shard: u16,
        finding: Finding,
        (set_aside, sick): (usize, bool),
        now: UnixMillis,
        after: Duration,
    ) {
        let Some(lane) = self.lanes.get_mut(usize::from(shard)) else {
            return;
        };
        let worse = match finding {
            // The lane goes on without it: it is no fault of the source.
            Finding::Nothing
            | Finding::Alone {
                is_passed: true, ..
            } => return,
            Finding::Taken | Finding::TakenAfterAll(_) | Finding::GivenUp => {
                self.keys_in_row = 0;
                // What people were told of is over when what failed has been settled.
                let is_told = lane.is_some_and(|lane| lane.condition > Condition::Healthy);
                if set_aside == 0 || !is_told {
                    *lane = Some(Track::default());
                }
                return;
            }
            Finding::Alone {
                kind: FaultKind::Key,
                ..
            } => {
                self.keys_in_row = self.keys_in_row.saturating_add(1);
                match self.keys_in_row >= KEYS_IN_ROW {
                    true => Condition::Parked,
                    false => Condition::Healthy,
                }
            }
            Finding::Alone {
                kind: FaultKind::Final,
                ..
            } if sick => Condition::Suspended,
            Finding::Alone { .. } | Finding::Together(_) | Finding::Held => Condition::Healthy,
        };
        lane.get_or_insert_default().fail(worse, now, after);
    }

    /// Nothing waits in a lane any more.
    pub(super) fn emptied(&mut self, shard: u16) {
        if let Some(lane) = self.lanes.get_mut(usize::from(shard)) {
            *lane = Some(Track::default());
        }
    }

    /// Remembers how a lane stood before the relay was started, so that people are told once
    /// that it fails, and that it works again.
    pub(super) fn recall<'a>(
        &mut self,
        shard: u16,
        mut records: impl Iterator<Item = &'a CaptureRecord>,
        after: Duration,
    ) {
        if let Some(lane @ None) = self.lanes.get_mut(usize::from(shard)) {
            *lane = records.find_map(|record| Track::of_history(record, after));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{Attempt, EventStatus, State};

    const AFTER: Duration = Duration::from_secs(10);

    fn alone(kind: FaultKind) -> Finding {
        Finding::Alone {
            kind,
            is_new: false,
            is_passed: false,
        }
    }

    /// Notes findings of lanes at seconds; the condition after each.
    fn conditions(findings: &[(u16, Finding, bool, i64)]) -> Vec<Condition> {
        let mut track = SourceTrack::default();
        let note = |(shard, finding, sick, seconds): &(u16, Finding, bool, i64)| {
            let now = UnixMillis(seconds * 1_000);
            track.note(*shard, *finding, (0, *sick), now, AFTER);
            track.condition()
        };
        findings.iter().map(note).collect()
    }

    #[test]
    fn one_lane_that_fails_for_long_breaks_a_source_whose_other_lanes_work() {
        use Condition::{Broken, Healthy};
        let failed = Finding::Together(FaultKind::Transient);
        assert_eq!(
            conditions(&[
                (0, Finding::Taken, false, 0),
                (1, failed, false, 1),
                (0, Finding::Taken, false, 10),
                (1, failed, false, 11),
                (0, Finding::Taken, false, 12),
                (2, Finding::Taken, false, 13),
                (1, Finding::Held, false, 14),
                (1, Finding::Taken, false, 15),
                (1, failed, false, 16),
            ]),
            [
                Healthy, Healthy, Healthy, Broken, Broken, Broken, Broken, Healthy, Healthy
            ]
        );
    }

    #[test]
    fn a_refused_key_parks_once_and_a_refused_lane_beside_good_ones_does_not_flap() {
        use Condition::{Broken, Healthy, Parked};
        let refused = alone(FaultKind::Key);
        assert_eq!(
            conditions(&[
                (0, refused, false, 1),
                (1, refused, false, 2),
                (0, Finding::Together(FaultKind::Key), false, 3),
                (1, Finding::Together(FaultKind::Key), false, 3),
                (2, Finding::Taken, false, 4),
                (1, Finding::Taken, false, 5),
            ]),
            [Healthy, Parked, Parked, Parked, Parked, Healthy]
        );
        let mut beside = Vec::new();
        for turn in 0..20 {
            beside.push((0, refused, false, turn));
            beside.push((1, Finding::Taken, false, turn));
        }
        let conditions = conditions(&beside);
        let changes = conditions.windows(2).filter(|pair| pair[0] != pair[1]);
        assert_eq!(changes.count(), 1);
        assert_eq!(conditions.last(), Some(&Broken));
    }

    #[test]
    fn a_source_that_refuses_everything_is_suspended_until_what_failed_is_settled() {
        use Condition::{Healthy, Suspended};
        let refused = alone(FaultKind::Final);
        assert_eq!(
            conditions(&[
                (0, refused, false, 1),
                (0, refused, true, 2),
                (1, Finding::Taken, false, 3),
                (0, Finding::GivenUp, false, 4),
            ]),
            [Healthy, Suspended, Suspended, Healthy]
        );
        let mut track = SourceTrack::default();
        track.note(3, refused, (1, true), UnixMillis(0), AFTER);
        track.emptied(3);
        assert_eq!(track.condition(), Healthy);
    }

    #[test]
    fn a_lane_that_people_were_told_of_recovers_with_the_last_event_that_is_set_aside() {
        use Condition::{Broken, Healthy};
        let failed = alone(FaultKind::Transient);
        for settled in [Finding::Taken, Finding::TakenAfterAll(1), Finding::GivenUp] {
            let mut track = SourceTrack::default();
            let mut note = |finding, set_aside, seconds: i64| {
                let now = UnixMillis(seconds * 1_000);
                track.note(1, finding, (set_aside, false), now, AFTER);
                track.condition()
            };
            // Others pass before people are told.
            assert_eq!(note(failed, 1, 1), Healthy);
            assert_eq!(note(Finding::Taken, 1, 10), Healthy);
            assert_eq!(note(failed, 1, 11), Healthy);
            assert_eq!(note(failed, 1, 21), Broken);
            assert_eq!(note(settled, 2, 22), Broken);
            assert_eq!(note(settled, 0, 23), Healthy, "{settled:?}");
            assert_eq!(note(failed, 1, 30), Healthy);
        }
    }

    /// The condition of a lane by the attempts of an event: reasons at seconds since it was
    /// queued.
    fn recalled(attempts: &[(DeliveryReason, i64)]) -> Condition {
        let state = State::Queued;
        let attempt = |(reason, seconds): &(DeliveryReason, i64)| Attempt {
            identify: true,
            track: false,
            time: UnixMillis(1_000_000 + seconds * 1_000),
            http_status: 0,
            latency: Duration::ZERO,
            reason: *reason,
            error: String::new(),
        };
        let record = CaptureRecord {
            integration_id: crate::integration::IntegrationId::new("acme").expect("valid"),
            capture_id: "1".to_owned(),
            region: crate::region::Region::Eu,
            mapping_version: 1,
            accept_time: UnixMillis(0),
            queue_time: UnixMillis(1_000_000),
            identify: EventStatus::new(state),
            track: EventStatus::new(state),
            attempts: attempts.iter().map(attempt).collect(),
            trace: None,
        };
        let mut track = SourceTrack::default();
        track.recall(2, [&record].into_iter(), AFTER);
        track.condition()
    }

    #[test]
    fn what_an_event_went_through_since_it_was_queued_is_recalled_after_a_restart() {
        use Condition::{Broken, Healthy, Parked};
        use DeliveryReason::{ServerError, Unauthorized, Unspecified};
        for (attempts, expected) in [
            (&[][..], Healthy),
            (&[(ServerError, 0), (ServerError, 9)], Healthy),
            (&[(ServerError, 0), (ServerError, 10)], Broken),
            (&[(ServerError, 0), (Unspecified, 10)], Healthy),
            (&[(Unauthorized, 1)], Healthy),
            (&[(Unauthorized, 1), (Unauthorized, 2)], Parked),
            (&[(ServerError, 1), (Unauthorized, 2)], Healthy),
            (
                &[(Unauthorized, 1), (Unauthorized, 2), (ServerError, 3)],
                Healthy,
            ),
            // Before it was replayed.
            (&[(ServerError, -99), (ServerError, 1)], Healthy),
            (&[(Unauthorized, -99), (Unauthorized, 1)], Healthy),
        ] {
            assert_eq!(recalled(attempts), expected, "{attempts:?}");
        }
        // What has happened since the start counts more.
        let mut track = SourceTrack::default();
        track.note(2, alone(FaultKind::Key), (1, false), UnixMillis(1), AFTER);
        track.note(2, alone(FaultKind::Key), (1, false), UnixMillis(2), AFTER);
        track.recall(2, std::iter::empty(), AFTER);
        assert_eq!(track.condition(), Parked);
    }
}
