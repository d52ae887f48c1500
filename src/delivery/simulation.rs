//! A deterministic simulation of delivery: the real lanes, evidence and rates, on
//! the reference outbox, against an imagined Segment, over outages, events that fail by
//! themselves, sources that refuse everything, lost answers, crashes and clocks that jump.
//! One seed is one history; a failing one is printed and replays with `SIMULATION_SEED=n cargo test simulation`; a longer run is
//! `SIMULATION_SEEDS=1000000 cargo test --release simulation`.

mod faults;
mod promises;
mod segment;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU32,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use fastrand::Rng;
use governor::clock::FakeRelativeClock;

use super::{
    Backoff, Begun, Credentials, Disposition, Ended, Lane, LaneOptions, Plan, RateLimits, Sources,
    Step, classify, suspects::MAX_SUSPECTS,
};
use crate::{
    event::{EventPair, EventType},
    integration::IntegrationId,
    outbox::{
        Content, LaneKey, LeasedCapture, Limits, NewCapture, SHARDS, Submitted, model::Model,
    },
    region::Region,
    segment::Answer,
    time::UnixMillis,
};

use segment::Segment;

/// Seeds of an ordinary run.
const SEEDS: u64 = 2_000;
/// Steps in which every history has to come to rest once all faults are over.
const STEPS_TO_REST: usize = 200_000;
const RATE: u32 = 50;
const STRICT_MAX_AGE_SECONDS: u64 = 200 * 3_600;
/// People, of whom each lane has some.
const USERS: u64 = 24;

fn sources() -> Sources {
    Sources::new(Duration::from_secs(30))
}

/// A lane as its worker drives it.
struct Working {
    lane: Lane,
    /// A request under way, with the moment at which its answer comes.
    in_flight: Option<InFlight>,
    /// Nothing to do before this moment of the monotonic clock.
    idle_until: u64,
    /// Unless new captures come.
    resting: bool,
}

struct InFlight {
    sent: Vec<LeasedCapture>,
    begun: Begun,
    answer: Answer,
    /// When it comes.
    at: u64,
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
    sources: Sources,
    credentials: HashMap<(IntegrationId, Region), Credentials>,
    /// Changes of the integrations.
    changes: u64,
    /// Only faults with a cause: then no healthy event is given up, whatever its age.
    strict: bool,
    next_capture: u64,
    accepted: BTreeSet<(IntegrationId, String)>,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let strict = rng.bool();
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
            max_age: Duration::from_secs(match strict {
                true => STRICT_MAX_AGE_SECONDS,
                false => rng.u64(60..7_200),
            }),
        };
        let plenty = Limits {
            max_events: 10_000,
            max_bytes: 10_000_000,
            max_integration_events: 10_000,
            max_integration_bytes: 10_000_000,
        };
        Self {
            segment: Segment::new(rng.fork(), options, burst.get(), strict),
            rng,
            outbox: Model::new(plenty),
            rates: RateLimits::with_clock(rate, burst, clock.clone()),
            clock,
            elapsed: 0,
            wall_offset: 1_800_000_000_000,
            options,
            lanes: BTreeMap::new(),
            sources: sources(),
            credentials: HashMap::new(),
            changes: 0,
            strict,
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
            let user = u16::try_from(number * 7_919 % USERS).expect("small");
            let id = IntegrationId::new(["acme", "other"][usize::from(user % 2)]).expect("valid");
            let region = if number.is_multiple_of(5) {
                Region::Eu
            } else {
                Region::NonEu
            };
            let payload = |event: EventType| {
                let (name, event) = (format!("{number}-{}", event.name()), event.name());
                let filler = "x".repeat(usize::try_from(number % 90).expect("small"));
                format!(r#"{{"messageId":"{name}","userId":"{user}","{event}":"{filler}"}}"#)
                    .into_bytes()
            };
            let new = NewCapture {
                integration_id: id.clone(),
                capture_id: number.to_string(),
                digest: [0; 16],
                region,
                mapping_version: 1,
                revision: 0,
                accept_time: self.now(),
                user_id: Some(user.to_string()),
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
                self.accepted
                    .insert((id.clone(), record.capture_id.clone()));
                let lane = LaneKey {
                    integration_id: id,
                    region,
                    shard: user % SHARDS,
                };
                self.hear_of_captures(&lane);
            }
        }
    }

    fn hear_of_captures(&mut self, lane: &LaneKey) {
        if let Some(working) = self.lanes.get_mut(lane) {
            working.lane.hear_of_captures();
            if std::mem::take(&mut working.resting) {
                working.idle_until = 0;
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
        self.sources = sources();
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
        self.changes += 1;
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
        let is_due = |working: &Working| match &working.in_flight {
            Some(in_flight) => in_flight.at <= self.elapsed,
            None => working.idle_until <= self.elapsed,
        };
        let mut keys = self.outbox.waiting_lanes();
        keys.retain(|key| self.lanes.get(key).is_none_or(is_due));
        let in_flight = |working: &Working| working.in_flight.is_some() && is_due(working);
        let answered = self.lanes.iter().filter(|(_, working)| in_flight(working));
        keys.extend(answered.map(|(key, _)| key.clone()));
        let mut keys: Vec<LaneKey> = keys.into_iter().collect();
        self.rng.shuffle(&mut keys);
        for key in keys {
            let mut working = self.lanes.remove(&key).unwrap_or_else(|| Working {
                lane: Lane::new(key.clone(), self.options),
                in_flight: None,
                idle_until: 0,
                resting: false,
            });
            self.turn(&key, &mut working);
            self.lanes.insert(key, working);
        }
    }

    /// What a worker does in one turn, as far as time allows.
    fn turn(&mut self, key: &LaneKey, working: &mut Working) {
        if let Some(in_flight) = working.in_flight.take() {
            if in_flight.at > self.elapsed {
                working.in_flight = Some(in_flight);
                return;
            }
            self.answered(key, working, in_flight);
        }
        if working.idle_until > self.elapsed {
            return;
        }
        working.resting = false;
        let until = |moment: UnixMillis, now: UnixMillis| {
            u64::try_from(moment.since(now).as_millis()).expect("short")
        };
        let evidence = self.sources.evidence(key);
        let (budget, scope) = match working.lane.plan(self.now(), &evidence) {
            Plan::WaitUntil(moment) => {
                working.idle_until = self.elapsed + until(moment, self.now());
                return;
            }
            Plan::RestUntil(moment) => {
                working.idle_until = self.elapsed + until(moment, self.now());
                working.resting = true;
                return;
            }
            Plan::Send(budget, scope) => (budget, scope),
        };
        let leased = self.outbox.lease(key, budget, &scope);
        if leased.is_empty() {
            if working.lane.found_nothing() {
                let _ = self.sources.emptied(key);
                working.lane.hear_of_captures();
            }
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

    fn answered(&mut self, key: &LaneKey, working: &mut Working, in_flight: InFlight) {
        let now = self.now();
        let InFlight {
            sent,
            begun,
            answer,
            ..
        } = in_flight;
        if let Disposition::Pause(wait) = classify(&answer) {
            self.rates.pause(&key.integration_id, key.region, now, wait);
        }
        let ended = Ended {
            begun,
            answer: &answer,
            now,
            jitter: self.rng.f64(),
        };
        let evidence = self.sources.evidence(key);
        let (settlement, finding) = working.lane.settle(sent, ended, &evidence);
        for captured in &settlement.captures {
            self.outbox.settle(captured);
        }
        self.segment.answered(key);
        let set_aside = working.lane.set_aside();
        assert!(
            evidence.set_aside + set_aside <= MAX_SUSPECTS,
            "too many suspects"
        );
        let sources = &self.sources;
        let change = sources.note(key, begun.request, finding, set_aside, now);
        if change.recovered {
            for (other, working) in &mut self.lanes {
                if other.integration_id == key.integration_id && other.region == key.region {
                    working.idle_until = 0;
                }
            }
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
                let begun = self.sources.begin(key, &self.changes.to_string());
                let (reply, latency) = self.segment.receive(key, &leased, self.elapsed);
                let answer = Answer {
                    reply,
                    started: now,
                    latency: Duration::from_millis(latency),
                };
                working.in_flight = Some(InFlight {
                    sent: leased,
                    begun,
                    answer,
                    at: self.elapsed + latency,
                });
            }
        }
    }
}

/// Plays all seeds, on all processors.
#[test]
fn simulation_of_thousands_of_histories_keeps_every_promise() {
    let number = |name: &str| std::env::var_os(name)?.to_str()?.parse::<u64>().ok();
    let (first, end) = match number("SIMULATION_SEED") {
        Some(seed) => (seed, seed + 1),
        None => (0, number("SIMULATION_SEEDS").unwrap_or(SEEDS)),
    };
    let next = AtomicU64::new(first);
    let play = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            if seed > first && seed.is_multiple_of(50_000) {
                println!("{seed} of {end} seeds");
            }
            let run = std::panic::catch_unwind(|| Simulation::new(seed).run());
            if run.is_err() {
                next.fetch_add(end, Ordering::Relaxed);
            }
            assert!(
                run.is_ok(),
                "seed {seed} fails; replay it with SIMULATION_SEED={seed}"
            );
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(play);
        }
    });
}
