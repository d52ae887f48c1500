//! A deterministic simulation of delivery: the real lanes, verdicts and rates, on
//! the reference outbox, against an imagined Segment, over outages, lost answers,
//! crashes and clocks that jump. One seed is one history; a failing one is printed
//! and replays with `SIMULATION_SEED=n cargo test simulation`; a longer run is
//! `SIMULATION_SEEDS=1000000 cargo test --release simulation`.

mod segment;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU32,
    time::Duration,
};

use fastrand::Rng;
use governor::clock::FakeRelativeClock;

use super::{Backoff, Credentials, Lane, LaneOptions, Plan, RateLimits, Step, Verdict, judge};
use crate::{
    event::{EventPair, EventType},
    integration::IntegrationId,
    outbox::{
        Content, LaneKey, LeasedCapture, Limits, NewCapture, SHARDS, Submitted, model::Model,
    },
    proto::DeliveryReason,
    region::Region,
    segment::Answer,
    status::{CaptureRecord, State},
    time::UnixMillis,
};

use segment::{Arrival, Segment};

/// Seeds of an ordinary run.
const SEEDS: u64 = 2_000;
/// Steps in which every history has to come to rest once all faults are over.
const STEPS_TO_REST: usize = 200_000;
const RATE: u32 = 50;

/// A lane as its worker drives it.
struct Working {
    lane: Lane,
    /// A request under way, with the moment at which its answer comes.
    in_flight: Option<(Vec<LeasedCapture>, Answer, u64)>,
    /// Nothing to do before this moment of the monotonic clock.
    idle_until: u64,
}

struct Simulation {
    rng: Rng,
    outbox: Model,
    segment: Segment,
    rates: RateLimits<FakeRelativeClock>,
    clock: FakeRelativeClock,
    /// Milliseconds since the start.
    elapsed: u64,
    /// The wall clock's distance from that.
    wall_offset: i64,
    options: LaneOptions,
    lanes: BTreeMap<LaneKey, Working>,
    credentials: HashMap<(IntegrationId, Region), Credentials>,
    next_capture: u64,
    accepted: BTreeSet<(IntegrationId, String)>,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let clock = FakeRelativeClock::default();
        let burst = NonZeroU32::new(rng.u32(8..60)).expect("not zero");
        let rate = NonZeroU32::new(RATE).expect("not zero");
        let options = LaneOptions {
            max_batch_events: rng.usize(2..=burst.get() as usize),
            max_batch_bytes: rng.usize(200..2_000),
            backoff: Backoff {
                base: Duration::from_millis(rng.u64(1..500)),
                max: Duration::from_millis(rng.u64(500..60_000)),
            },
            unauthorized_retry: Duration::from_secs(rng.u64(1..300)),
            max_age: Duration::from_secs(rng.u64(60..7_200)),
        };
        let plenty = Limits {
            max_events: 10_000,
            max_bytes: 10_000_000,
            max_integration_events: 10_000,
            max_integration_bytes: 10_000_000,
        };
        Self {
            segment: Segment::new(rng.fork(), options, burst.get()),
            rng,
            outbox: Model::new(plenty),
            rates: RateLimits::with_clock(rate, burst, clock.clone()),
            clock,
            elapsed: 0,
            wall_offset: 1_800_000_000_000,
            options,
            lanes: BTreeMap::new(),
            credentials: HashMap::new(),
            next_capture: 0,
            accepted: BTreeSet::new(),
        }
    }

    fn now(&self) -> UnixMillis {
        UnixMillis(self.wall_offset + i64::try_from(self.elapsed).expect("a short time"))
    }

    fn run(&mut self) {
        for _ in 0..self.rng.usize(50..400) {
            match self.rng.u32(0..100) {
                0..=29 => self.submit(),
                30..=33 => self.segment.change_mood(),
                34..=35 => self.crash(),
                36..=37 => self.jump_clock(),
                38..=40 => self.change_credentials(),
                _ => {}
            }
            let millis = self.rng.u64(1..400);
            self.pass(millis);
            self.work();
        }
        self.come_to_rest();
        self.check();
    }

    fn submit(&mut self) {
        for _ in 0..self.rng.usize(1..6) {
            // Now and then a capture comes twice.
            if self.rng.u8(0..10) > 0 || self.next_capture == 0 {
                self.next_capture += 1;
            }
            let number = self.next_capture;
            let user = u16::try_from(number * 7_919 % 8).expect("small");
            let id = IntegrationId::new(["acme", "other"][usize::from(user % 2)]).expect("valid");
            let region = if number.is_multiple_of(5) {
                Region::Eu
            } else {
                Region::NonEu
            };
            let payload = |event: EventType| {
                let id = format!("{number}-{}", event.name());
                let filler = "x".repeat(usize::try_from(number % 90).expect("small"));
                format!("{id}|{user}|{filler}").into_bytes()
            };
            let new = NewCapture {
                integration_id: id.clone(),
                capture_id: number.to_string(),
                digest: [0; 16],
                region,
                mapping_version: 1,
                revision: 0,
                accept_time: self.now(),
                user_id: None,
                room: None,
                trace: None,
                content: Content::Send {
                    shard: user % SHARDS,
                    events: EventPair {
                        identify: payload(EventType::Identify),
                        track: payload(EventType::Track),
                    },
                },
            };
            if let Submitted::Accepted(record) = self.outbox.submit(new) {
                self.accepted.insert((id, record.capture_id.clone()));
            }
        }
    }

    fn pass(&mut self, millis: u64) {
        self.elapsed += millis;
        self.clock.advance(Duration::from_millis(millis));
    }

    /// All that was in memory is gone; what Segment took, it has.
    fn crash(&mut self) {
        self.lanes.clear();
        self.segment.connections_broke();
    }

    fn jump_clock(&mut self) {
        let jump = self.rng.i64(-600_000..3_600_000);
        self.wall_offset += jump;
    }

    fn change_credentials(&mut self) {
        let id = IntegrationId::new(["acme", "other"][self.rng.usize(0..2)]).expect("valid");
        let region = Region::ALL[self.rng.usize(0..2)];
        let next = match self.rng.u8(0..3) {
            0 => Credentials::NoneForRegion,
            _ => Credentials::Ready,
        };
        self.credentials.insert((id.clone(), region), next);
        self.segment.change_key(&id, region);
        // The registry wakes the lanes of a changed integration.
        for (key, working) in &mut self.lanes {
            if key.integration_id == id {
                working.lane.resume();
                working.idle_until = 0;
            }
        }
    }

    /// Every lane that has something to do does it, in a random order.
    fn work(&mut self) {
        let mut keys: Vec<LaneKey> = self.outbox.waiting_lanes().into_iter().collect();
        keys.extend(
            self.lanes
                .keys()
                .filter(|key| self.lanes[*key].in_flight.is_some())
                .cloned(),
        );
        self.rng.shuffle(&mut keys);
        keys.dedup();
        for key in keys {
            let mut working = self.lanes.remove(&key).unwrap_or_else(|| Working {
                lane: Lane::new(key.clone(), self.options),
                in_flight: None,
                idle_until: 0,
            });
            self.turn(&key, &mut working);
            self.lanes.insert(key, working);
        }
    }

    /// What a worker does in one turn, as far as time allows.
    fn turn(&mut self, key: &LaneKey, working: &mut Working) {
        if let Some((sent, answer, at)) = working.in_flight.take() {
            if at > self.elapsed {
                working.in_flight = Some((sent, answer, at));
                return;
            }
            let now = self.now();
            if let Verdict::Pause(wait) = judge(&answer) {
                self.rates.pause(&key.integration_id, key.region, now, wait);
            }
            let settlement = working.lane.settle(sent, &answer, now, self.rng.f64());
            for captured in &settlement.captures {
                self.outbox.settle(captured);
            }
            self.segment.answered(key);
        }
        if working.idle_until > self.elapsed {
            return;
        }
        let budget = match working.lane.plan(self.now()) {
            Plan::WaitUntil(moment) => {
                let wait = u64::try_from(moment.since(self.now()).as_millis()).expect("short");
                working.idle_until = self.elapsed + wait;
                return;
            }
            Plan::Send(budget) => budget,
        };
        let leased = self.outbox.lease(key, budget);
        if leased.is_empty() {
            return;
        }
        let of = (key.integration_id.clone(), key.region);
        let credentials = self
            .credentials
            .get(&of)
            .copied()
            .unwrap_or(Credentials::Ready);
        match working.lane.next_step(leased, credentials, self.now()) {
            Step::Settle(settlement) => {
                for captured in &settlement.captures {
                    self.outbox.settle(captured);
                }
            }
            Step::Send(leased) => self.send(key, working, leased),
        }
    }

    fn send(&mut self, key: &LaneKey, working: &mut Working, leased: Vec<LeasedCapture>) {
        let count = leased.iter().map(LeasedCapture::event_count).sum();
        let now = self.now();
        match self.rates.take(&key.integration_id, key.region, count, now) {
            Err(wait) => {
                let wait = u64::try_from(wait.as_millis()).expect("short").max(1);
                working.idle_until = self.elapsed + wait;
            }
            Ok(()) => {
                let (reply, latency) = self.segment.receive(key, &leased, self.elapsed);
                let latency_time = Duration::from_millis(latency);
                let answer = Answer {
                    reply,
                    started: now,
                    latency: latency_time,
                };
                working.in_flight = Some((leased, answer, self.elapsed + latency));
            }
        }
    }

    /// Faults end, keys are right, and time passes until nothing waits.
    fn come_to_rest(&mut self) {
        self.segment.behave();
        self.credentials.clear();
        for working in self.lanes.values_mut() {
            working.lane.resume();
            working.idle_until = 0;
        }
        for _ in 0..STEPS_TO_REST {
            if self.outbox.waiting_lanes().is_empty() {
                return;
            }
            self.work();
            // Straight to the next moment at which a lane has something to do.
            let moment = |working: &Working| match &working.in_flight {
                Some((_, _, at)) => *at,
                None => working.idle_until,
            };
            let next = self
                .lanes
                .values()
                .map(moment)
                .filter(|at| *at > self.elapsed)
                .min();
            self.pass(next.map_or(1, |at| at - self.elapsed));
        }
        panic!("events still wait: {:?}", self.outbox.waiting_lanes());
    }

    fn check(&self) {
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
        let arrival = Arrival {
            capture: record.capture_id.clone(),
            event,
        };
        let has_it = self.segment.has(&arrival);
        let named = || format!("{sequence} {arrival:?} {:?}", record.event(event));
        match record.event(event).state {
            State::Delivered { .. } => assert!(has_it, "delivered, but Segment lacks {}", named()),
            State::DeadLettered {
                reason: DeliveryReason::PayloadRejected,
                ..
            } => {
                assert!(
                    self.segment.is_poison(&arrival),
                    "no reason to give up {}",
                    named()
                );
            }
            State::DeadLettered {
                reason: DeliveryReason::RequestRejected,
                ..
            } => {
                assert!(
                    self.segment.was_refused(&arrival),
                    "no reason to give up {}",
                    named()
                );
            }
            State::DeadLettered {
                reason: DeliveryReason::Expired,
                ..
            } => {
                // One event of the pair was tried; both go together.
                let tried = record.identify.attempt_count + record.track.attempt_count;
                assert!(tried > 0, "given up untried {}", named());
            }
            other => panic!("not at rest: {other:?} {}", named()),
        }
        if self.segment.is_poison(&arrival) {
            assert!(!has_it, "Segment took a poisoned event {}", named());
        }
    }
}

#[test]
fn simulation_of_thousands_of_histories_keeps_every_promise() {
    let number = |name: &str| std::env::var_os(name)?.to_str()?.parse::<u64>().ok();
    let seeds = match number("SIMULATION_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIMULATION_SEEDS").unwrap_or(SEEDS),
    };
    for seed in seeds {
        let run = std::panic::catch_unwind(|| Simulation::new(seed).run());
        assert!(
            run.is_ok(),
            "seed {seed} fails; replay it with SIMULATION_SEED={seed}"
        );
    }
}
