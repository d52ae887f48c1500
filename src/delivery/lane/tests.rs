use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::outbox::EventSet;
use crate::{
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
        max_age: Duration::from_secs(3_600),
    }
}

fn id() -> IntegrationId {
    IntegrationId::new("acme").expect("valid")
}

fn lane() -> Lane {
    Lane::new(
        LaneKey {
            integration_id: id(),
            region: Region::Eu,
            shard: 0,
        },
        options(),
    )
}

fn leased(sequence: i64) -> LeasedCapture {
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
        identify: Some(Bytes::from_static(b"{}")),
        track: Some(Bytes::from_static(b"{}")),
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

fn max_events(lane: &mut Lane, now: UnixMillis) -> usize {
    match lane.plan(now) {
        Plan::Send(budget) => budget.max_events,
        Plan::WaitUntil(moment) => panic!("waits until {moment:?}"),
    }
}

fn waits(lane: &mut Lane, now: UnixMillis) -> Duration {
    match lane.plan(now) {
        Plan::Send(_) => Duration::ZERO,
        Plan::WaitUntil(moment) => moment.since(now),
    }
}

#[test]
fn a_delivered_batch_settles_every_event_that_it_carried() {
    let mut lane = lane();
    let mut half = leased(2);
    half.identify = None;
    Arc::make_mut(&mut half.record).identify =
        EventStatus::new(State::Delivered { at: UnixMillis(1) });
    let settled = lane.settle(vec![leased(1), half], &answer(200, None), NOW, 0.5);
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
        let _ = lane.settle(vec![leased(1)], &answer(503, None), NOW, 1.0);
        assert_eq!(waits(&mut lane, NOW), Duration::from_millis(expected));
        assert_eq!(
            waits(&mut lane, NOW.plus(Duration::from_millis(expected))),
            Duration::ZERO
        );
    }
    assert_eq!(lane.failures(), 4);
    let _ = lane.settle(vec![leased(1)], &answer(200, None), NOW, 1.0);
    assert_eq!(
        (waits(&mut lane, NOW), lane.failures()),
        (Duration::ZERO, 0)
    );
}

#[test]
fn a_pause_that_segment_asks_for_is_not_a_failure() {
    let mut lane = lane();
    let settled = lane.settle(vec![leased(1)], &answer(429, Some(7)), NOW, 1.0);
    assert_eq!(lane.failures(), 0);
    assert_eq!(waits(&mut lane, NOW), Duration::from_secs(7));
    assert_eq!(
        settled.captures[0].record.identify.state,
        State::Retrying {
            reason: DeliveryReason::RateLimited,
            next_attempt: NOW.plus(Duration::from_secs(7))
        }
    );
}

#[test]
fn a_refused_key_parks_the_lane_until_the_integration_changes() {
    let mut lane = lane();
    let settled = lane.settle(vec![leased(1)], &answer(401, None), NOW, 0.0);
    assert_eq!(
        settled.captures[0].record.track.state.reason(),
        DeliveryReason::Unauthorized
    );
    assert_eq!(waits(&mut lane, NOW), Duration::from_secs(300));
    lane.resume();
    assert_eq!(waits(&mut lane, NOW), Duration::ZERO);
}

fn settled(step: Step) -> Settlement {
    match step {
        Step::Settle(settlement) => settlement,
        Step::Send(leased) => panic!("{} captures are sent", leased.len()),
    }
}

fn sent(step: Step) -> Vec<i64> {
    match step {
        Step::Settle(settlement) => panic!("{settlement:?}"),
        Step::Send(leased) => leased.iter().map(|capture| capture.sequence).collect(),
    }
}

#[test]
fn an_event_is_given_up_when_it_is_too_old_but_never_untried() {
    let mut lane = lane();
    let age = Duration::from_secs(3_600);
    let later = NOW.plus(age + Duration::from_millis(1));
    let mut tried = leased(1);
    Arc::make_mut(&mut tried.record).identify.attempt_count = 1;
    let batch = || vec![tried.clone(), leased(2)];
    assert_eq!(
        sent(lane.next_step(batch(), Credentials::Ready, NOW.plus(age))),
        [1, 2]
    );
    let expired = settled(lane.next_step(batch(), Credentials::Ready, later));
    assert_eq!(expired.captures.len(), 1);
    assert_eq!(
        expired.captures[0].record.track.state,
        State::DeadLettered {
            reason: DeliveryReason::Expired,
            at: later
        }
    );
    assert_eq!(
        sent(lane.next_step(vec![leased(2)], Credentials::Ready, later)),
        [2]
    );
}

#[test]
fn a_pause_is_no_part_of_an_events_age() {
    let mut lane = lane();
    let age = Duration::from_secs(3_600);
    let mut tried = leased(1);
    Arc::make_mut(&mut tried.record).identify.attempt_count = 1;
    // Paused for ten times the maximum age.
    let resumed = NOW.plus(10 * age);
    lane.count_ages_from(Some(resumed));
    let batch = || vec![tried.clone()];
    let ready = Credentials::Ready;
    assert_eq!(sent(lane.next_step(batch(), ready, resumed)), [1]);
    let last = resumed.plus(age);
    assert_eq!(sent(lane.next_step(batch(), ready, last)), [1]);
    let later = last.plus(Duration::from_millis(1));
    let expired = settled(lane.next_step(batch(), ready, later));
    let state = expired.captures[0].record.track.state;
    assert_eq!(state.reason(), DeliveryReason::Expired);
    // One that was queued later has an age of its own.
    lane.count_ages_from(Some(UnixMillis(0)));
    assert_eq!(sent(lane.next_step(batch(), ready, NOW.plus(age))), [1]);
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
    let _ = lane.settle(vec![leased(1)], &answer(503, None), NOW, 1.0);
    let put_back = UnixMillis(NOW.0 - 3_600_000);
    assert_eq!(waits(&mut lane, put_back), Duration::from_millis(500));
    assert_eq!(
        waits(&mut lane, put_back.plus(Duration::from_millis(500))),
        Duration::ZERO
    );
}

/// Sends `count` captures through a lane to a Segment that answers 400 to every
/// request with one of `poisoned` events; returns the final states, and how many
/// requests it took.
fn drive(count: i64, poisoned: &[(i64, EventType)]) -> (Vec<Arc<CaptureRecord>>, usize) {
    let mut lane = lane();
    let mut queue: Vec<LeasedCapture> = (0..count).map(leased).collect();
    let mut done = Vec::new();
    let mut requests = 0;
    while !queue.is_empty() {
        let budget = max_events(&mut lane, NOW);
        let mut batch = Vec::new();
        let mut events = 0;
        for capture in &queue {
            let mut capture = capture.clone();
            if budget == 1 && capture.identify.is_some() {
                capture.track = None;
            }
            events += capture.event_count() as usize;
            if events > budget {
                break;
            }
            batch.push(capture);
        }
        requests += 1;
        let bad = batch.iter().any(|capture| {
            EventType::ALL.into_iter().any(|event| {
                capture.payload(event).is_some() && poisoned.contains(&(capture.sequence, event))
            })
        });
        let status = if bad { 400 } else { 200 };
        for SettledCapture {
            sequence, record, ..
        } in lane.settle(batch, &answer(status, None), NOW, 0.5).captures
        {
            let place = queue
                .iter()
                .position(|c| c.sequence == sequence)
                .expect("queued");
            if record.is_final() {
                queue.remove(place);
                done.push(record);
            } else {
                for event in EventType::ALL {
                    if record.event(event).state.is_final() {
                        match event {
                            EventType::Identify => queue[place].identify = None,
                            EventType::Track => queue[place].track = None,
                        }
                    }
                }
                queue[place].record = record;
            }
        }
        assert!(requests < 10_000, "the lane makes no progress");
    }
    (done, requests)
}

proptest! {
    #[test]
    fn of_a_refused_batch_only_the_poisoned_events_are_given_up(
        count in 1..40_i64,
        poison in prop::collection::vec((0..40_i64, any::<bool>()), 0..4),
    ) {
        let poisoned: Vec<_> = poison
            .into_iter()
            .map(|(at, track)| (at, if track { EventType::Track } else { EventType::Identify }))
            .collect();
        let (done, requests) = drive(count, &poisoned);
        prop_assert_eq!(done.len() as i64, count);
        for (place, record) in done.iter().enumerate() {
            // They are settled in the order in which they were accepted.
            prop_assert_eq!(&record.capture_id, &place.to_string());
            for event in EventType::ALL {
                let expected = if poisoned.contains(&(place as i64, event)) {
                    State::DeadLettered { reason: DeliveryReason::PayloadRejected, at: NOW }
                } else {
                    State::Delivered { at: NOW }
                };
                prop_assert_eq!(record.event(event).state, expected);
            }
        }
        // Halving finds each within about log2(16) requests, and grows back.
        prop_assert!(requests <= count as usize + 12 * poisoned.len());
    }
}
