//! What has to hold at the end of every history.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    STEPS_TO_REST, Simulation, USERS, Working,
    faults::{self, Fault},
    segment::{Arrival, MAX_LATENCY_MILLIS},
};
use crate::{
    event::EventType,
    outbox::{LaneKey, SHARDS},
    proto::DeliveryReason,
    status::{CaptureRecord, State},
};

/// Steps in which most of what is healthy is delivered.
const STEPS_BEFORE_AGE: usize = 300;
/// Requests that a lane may need for each event that waits, and for each user with an event
/// that fails by itself, once its source is well.
const REQUESTS_FOR_EVENT: usize = 3;
const REQUESTS_FOR_SUSPECT: usize = 40;

/// What waits in a lane.
#[derive(Default)]
struct Waiting {
    events: usize,
    /// Events of users without one that fails by itself.
    clean: usize,
    suspects: usize,
}

impl Simulation {
    /// Faults end, keys are right, and time passes until nothing waits.
    pub(super) fn come_to_rest(&mut self) {
        self.segment.behave();
        // What was under way may be answered with a fault, and with a wait, still.
        self.pass(MAX_LATENCY_MILLIS);
        self.work();
        self.segment.forget_requests();
        self.credentials.clear();
        self.changes += 1;
        for working in self.lanes.values_mut() {
            working.lane.resume();
            working.idle_until = 0;
        }
        if self.strict {
            self.deliver_what_is_healthy();
        } else {
            for _ in 0..STEPS_BEFORE_AGE {
                self.step();
            }
        }
        // What is left fails by itself, or waits behind that.
        let age = i64::try_from(self.options.max_age.as_millis()).expect("short");
        for step in 0..STEPS_TO_REST {
            if step % STEPS_BEFORE_AGE == 0 {
                self.wall_offset += age + 60_000;
            }
            if self.outbox.waiting_lanes().is_empty() {
                return;
            }
            self.step();
        }
        panic!("events still wait: {:?}", self.outbox.waiting_lanes());
    }

    /// Works, and goes straight to the next moment at which a lane has something to do.
    fn step(&mut self) {
        self.work();
        let moment = |working: &Working| match &working.in_flight {
            Some(in_flight) => in_flight.at,
            None => working.idle_until,
        };
        let moments = self.lanes.values().map(moment);
        let next = moments.filter(|at| *at > self.elapsed).min();
        self.pass(next.map_or(1, |at| at - self.elapsed));
    }

    /// Users without an event that fails by itself have theirs delivered, each lane within a
    /// bounded number of requests.
    fn deliver_what_is_healthy(&mut self) {
        let before = self.waiting();
        for step in 0..STEPS_TO_REST {
            self.step();
            if step % 16 > 0 {
                continue;
            }
            let now = self.waiting();
            if now.values().all(|lane| lane.clean == 0) {
                return;
            }
            for (lane, _) in now.iter().filter(|(_, waiting)| waiting.clean > 0) {
                let Some(had) = before.get(lane) else {
                    continue;
                };
                let most =
                    20 + REQUESTS_FOR_EVENT * had.events + REQUESTS_FOR_SUSPECT * had.suspects;
                let requests = self.segment.requests(lane);
                assert!(requests <= most, "{lane}: {requests} of {most} requests");
            }
        }
        panic!(
            "healthy events still wait: {:?}",
            self.outbox.waiting_lanes()
        );
    }

    fn waiting(&self) -> BTreeMap<LaneKey, Waiting> {
        let mut lanes: BTreeMap<LaneKey, Waiting> = BTreeMap::new();
        let mut held: BTreeSet<(LaneKey, u64)> = BTreeSet::new();
        let mut all = Vec::new();
        for (_, record) in self.outbox.records() {
            let number: u64 = record.capture_id.parse().expect("a number");
            let user = number * 7_919 % USERS;
            let lane = LaneKey {
                integration_id: record.integration_id.clone(),
                region: record.region,
                shard: u16::try_from(user).expect("small") % SHARDS,
            };
            for event in EventType::ALL {
                if record.event(event).state.is_final() {
                    continue;
                }
                if faults::of_event(&arrival(record, event)).is_some() {
                    held.insert((lane.clone(), user));
                }
                all.push((lane.clone(), user));
            }
        }
        for (lane, user) in all {
            let waiting = lanes.entry(lane.clone()).or_default();
            waiting.events += 1;
            waiting.clean += usize::from(!held.contains(&(lane, user)));
        }
        for (lane, _) in held {
            lanes.entry(lane).or_default().suspects += 1;
        }
        lanes
    }

    pub(super) fn check(&self) {
        let known: BTreeSet<_> = self
            .outbox
            .records()
            .map(|(_, record)| (record.integration_id.clone(), record.capture_id.clone()))
            .collect();
        assert_eq!(known, self.accepted, "an acknowledged capture is lost");
        for (sequence, record) in self.outbox.records() {
            for event in EventType::ALL {
                self.check_event(sequence, record, event);
            }
        }
        self.segment.check_order();
    }

    fn check_event(&self, sequence: i64, record: &CaptureRecord, event: EventType) {
        let arrival = arrival(record, event);
        let own = faults::of_event(&arrival);
        let has_it = self.segment.has(&arrival);
        let named = || format!("{sequence} {arrival:?} {own:?} {:?}", record.event(event));
        match record.event(event).state {
            State::Delivered { .. } => assert!(has_it, "delivered, but Segment lacks {}", named()),
            State::DeadLettered { reason, .. } => {
                let refused = own.is_some_and(Fault::is_refusal);
                match reason {
                    DeliveryReason::PayloadRejected | DeliveryReason::RequestRejected => {
                        assert!(refused, "no reason to give up {}", named());
                    }
                    DeliveryReason::Expired => {
                        let tried = record.event(event).attempt_count > 0;
                        assert!(tried, "given up untried {}", named());
                        assert!(
                            own.is_some() || !self.strict,
                            "a healthy event is given up {}",
                            named()
                        );
                    }
                    other => panic!("given up for {other:?} {}", named()),
                }
            }
            other => panic!("not at rest: {other:?} {}", named()),
        }
        if own.is_some() {
            assert!(!has_it, "Segment took an event that fails {}", named());
        }
    }
}

fn arrival(record: &CaptureRecord, event: EventType) -> Arrival {
    Arrival {
        capture: record.capture_id.clone(),
        event,
    }
}
