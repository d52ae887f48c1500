use bytes::Bytes;
use proptest::prelude::*;

mod blame;
mod driven;
mod kinds;
mod rules;

use super::*;
use crate::outbox::EventSet;
use crate::{
    delivery::{Sources, suspects::MAX_SUSPECTS},
    integration::IntegrationId,
    region::Region,
    segment::Reply,
    status::{CaptureRecord, EventStatus, State},
};

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

fn options() -> LaneOptions {
    LaneOptions {
        max_batch_events: 16,
        max_batch_bytes: 1_000,
        backoff: Backoff {
            base: Duration::from_millis(500),
            max: Duration::from_secs(60),
        },
        unauthorized_retry: Duration::from_secs(300),
        max_age: Duration::from_secs(24 * 3_600),
    }
}

fn id() -> IntegrationId {
    IntegrationId::new("acme").expect("valid")
}

fn key() -> LaneKey {
    LaneKey {
        integration_id: id(),
        region: Region::Eu,
        shard: 0,
    }
}

fn lane() -> Lane {
    Lane::new(key(), options())
}

/// Settles with an answer, of a source of which nothing else is known.
fn settle(lane: &mut Lane, sent: Vec<LeasedCapture>, answer: &Answer, jitter: f64) -> Settlement {
    let ended = Ended {
        begun: Begun::default(),
        answer,
        now: NOW,
        jitter,
    };
    lane.settle(sent, ended, &Evidence::default()).0
}

/// A capture, of which each is another person's.
fn leased(sequence: i64) -> LeasedCapture {
    let event = || Some(Bytes::from(format!(r#"{{"userId":"{sequence}"}}"#)));
    LeasedCapture {
        sequence,
        record: Arc::new(CaptureRecord {
            integration_id: id(),
            capture_id: sequence.to_string(),
            region: Region::Eu,
            mapping_version: 1,
            accept_time: NOW,
            queue_time: NOW,
            identify: EventStatus::new(State::Queued),
            track: EventStatus::new(State::Queued),
            attempts: Vec::new(),
            trace: None,
        }),
        identify: event(),
        track: event(),
        damaged: false,
    }
}

fn answer(status: u16, retry_after: Option<u64>) -> Answer {
    Answer {
        reply: Reply::Status {
            status,
            retry_after: retry_after.map(Duration::from_secs),
        },
        started: NOW,
        latency: Duration::from_millis(3),
    }
}

fn waits(lane: &mut Lane, now: UnixMillis) -> Duration {
    match lane.plan(now, &Evidence::default()) {
        Plan::Send(..) => Duration::ZERO,
        Plan::WaitUntil(moment) | Plan::RestUntil(moment) => moment.since(now),
    }
}

#[test]
fn a_delivered_batch_settles_every_event_that_it_carried() {
    let mut lane = lane();
    let mut half = leased(2);
    half.identify = None;
    Arc::make_mut(&mut half.record).identify =
        EventStatus::new(State::Delivered { at: UnixMillis(1) });
    let settled = settle(&mut lane, vec![leased(1), half], &answer(200, None), 0.5);
    assert_eq!(settled.captures[0].changed, EventSet::BOTH);
    assert_eq!(
        settled.captures[1].changed,
        [EventType::Track].into_iter().collect()
    );
    for SettledCapture { record, .. } in &settled.captures {
        assert!(record.is_final());
        assert_eq!(record.track.state, State::Delivered { at: NOW });
        assert_eq!(record.track.attempt_count, 1);
        assert_eq!(record.attempts.len(), 1);
    }
    assert_eq!(
        settled.captures[1].record.identify.state,
        State::Delivered { at: UnixMillis(1) }
    );
    assert_eq!(settled.captures[1].record.identify.attempt_count, 0);
}

#[test]
fn waits_grow_with_failures_and_end_with_a_success() {
    let mut lane = lane();
    for expected in [500, 1_000, 2_000, 4_000] {
        let _ = settle(&mut lane, vec![leased(1)], &answer(429, None), 1.0);
        assert_eq!(waits(&mut lane, NOW), Duration::from_millis(expected));
        assert_eq!(
            waits(&mut lane, NOW.plus(Duration::from_millis(expected))),
            Duration::ZERO
        );
    }
    let _ = settle(&mut lane, vec![leased(1)], &answer(200, None), 1.0);
    assert_eq!(waits(&mut lane, NOW), Duration::ZERO);
}

#[test]
fn a_pause_that_segment_asks_for_is_not_a_failure() {
    let mut lane = lane();
    let settled = settle(&mut lane, vec![leased(1)], &answer(429, Some(7)), 1.0);
    assert_eq!(waits(&mut lane, NOW), Duration::from_secs(7));
    assert_eq!(
        settled.captures[0].record.identify.state,
        State::Retrying {
            reason: DeliveryReason::RateLimited,
            next_attempt: NOW.plus(Duration::from_secs(7))
        }
    );
}

fn settled(step: Step) -> Settlement {
    match step {
        Step::Settle(settlement) => settlement,
        Step::Send(leased) => panic!("{} captures are sent", leased.len()),
    }
}

#[test]
fn a_pause_is_no_part_of_an_events_age() {
    let age = options().max_age;
    let mut failing = leased(1);
    failing.track = None;
    Arc::make_mut(&mut failing.record).identify.failing_since = Some(NOW);
    // Paused for ten times the maximum age.
    let resumed = NOW.plus(10 * age);
    let fails_at = |now: UnixMillis| {
        let mut lane = lane();
        lane.count_ages_from(Some(resumed));
        let ended = Ended {
            begun: Begun::default(),
            answer: &answer(500, None),
            now,
            jitter: 1.0,
        };
        let (settled, _) = lane.settle(vec![failing.clone()], ended, &Evidence::default());
        settled.captures[0].record.identify.state.reason()
    };
    let last = resumed.plus(age);
    for now in [resumed, last] {
        assert_eq!(fails_at(now), DeliveryReason::ServerError);
    }
    let later = last.plus(Duration::from_millis(1));
    assert_eq!(fails_at(later), DeliveryReason::Expired);
}

#[test]
fn what_waits_too_long_after_a_removal_is_given_up_tried_or_not() {
    let mut lane = lane();
    let given_up = settled(lane.next_step(vec![leased(1)], Credentials::Overdue, NOW));
    let record = &given_up.captures[0].record;
    assert_eq!(record.identify.attempt_count, 0);
    for event in EventType::ALL {
        let state = State::DeadLettered {
            reason: DeliveryReason::Expired,
            at: NOW,
        };
        assert_eq!(record.event(event).state, state);
    }
}

#[test]
fn what_is_damaged_is_never_sent_and_holds_nobody_up() {
    let mut lane = lane();
    let mut damaged = leased(1);
    damaged.damaged = true;
    let step = lane.next_step(vec![damaged, leased(2)], Credentials::Ready, NOW);
    let aside = settled(step);
    assert_eq!(aside.captures.len(), 1);
    assert_eq!(
        aside.captures[0].record.identify.state.reason(),
        DeliveryReason::Damaged
    );
    assert_eq!(waits(&mut lane, NOW), Duration::ZERO);
}

#[test]
fn without_credentials_events_wait_and_without_integration_they_are_dead_letters() {
    let mut lane = lane();
    let gone = settled(lane.next_step(vec![leased(1)], Credentials::IntegrationGone, NOW));
    assert_eq!(
        gone.captures[0].record.track.state,
        State::DeadLettered {
            reason: DeliveryReason::IntegrationDeleted,
            at: NOW
        }
    );
    let parked = settled(lane.next_step(vec![leased(1)], Credentials::NoneForRegion, NOW));
    let state = parked.captures[0].record.track.state;
    assert_eq!(state.reason(), DeliveryReason::RegionNotConfigured);
    assert!(!state.is_final());
    assert_eq!(waits(&mut lane, NOW), Duration::from_secs(300));
}

#[test]
fn a_clock_that_is_put_back_makes_no_wait_longer() {
    let mut lane = lane();
    let _ = settle(&mut lane, vec![leased(1)], &answer(503, None), 1.0);
    let put_back = UnixMillis(NOW.0 - 3_600_000);
    assert_eq!(waits(&mut lane, put_back), Duration::from_millis(500));
    assert_eq!(
        waits(&mut lane, put_back.plus(Duration::from_millis(500))),
        Duration::ZERO
    );
}
