//! An imagined Segment, which checks what it is sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use fastrand::Rng;

use super::{
    RATE,
    faults::{self, Fault},
};
use crate::{
    delivery::LaneOptions,
    event::EventType,
    integration::IntegrationId,
    outbox::{LaneKey, LeasedCapture},
    region::Region,
    segment::Reply,
};

/// Longer than any answer takes.
pub(super) const MAX_LATENCY_MILLIS: u64 = 300;

/// An event as Segment knows it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Arrival {
    pub(super) capture: String,
    pub(super) event: EventType,
}

/// How it answers.
#[derive(Clone, Copy, Debug)]
enum Mood {
    Good,
    /// This share of the requests fails, with these statuses or no answer.
    Bad {
        percent: u32,
    },
    Down,
}

pub(super) struct Segment {
    rng: Rng,
    options: LaneOptions,
    burst: u32,
    mood: Mood,
    /// No random faults.
    strict: bool,
    /// Sources that fail as a whole.
    faults: BTreeMap<(IntegrationId, Region), Fault>,
    /// Sources that have refused everything for a while: none does so twice. Nobody can
    /// tell an event that is refused in two outages from one that is bad.
    refused_once: BTreeSet<(IntegrationId, Region)>,
    /// Requests with more events are not answered in time.
    slow_beyond: usize,
    in_flight: BTreeSet<LaneKey>,
    /// The bytes of each event at its first arrival, in the order of arrival.
    taken: HashMap<Arrival, Vec<u8>>,
    order: Vec<(LaneKey, String, Arrival, i64)>,
    sent: BTreeMap<IntegrationId, Vec<(u64, u32)>>,
    requests: BTreeMap<LaneKey, usize>,
}

impl Segment {
    pub(super) fn new(mut rng: Rng, options: LaneOptions, burst: u32, strict: bool) -> Self {
        let slow_beyond = match rng.u8(0..4) {
            0 => rng.usize(1..20),
            _ => usize::MAX,
        };
        Self {
            slow_beyond,
            strict,
            faults: BTreeMap::new(),
            refused_once: BTreeSet::new(),
            requests: BTreeMap::new(),
            rng,
            options,
            burst,
            mood: Mood::Good,
            in_flight: BTreeSet::new(),
            taken: HashMap::new(),
            order: Vec::new(),
            sent: BTreeMap::new(),
        }
    }

    pub(super) fn change_mood(&mut self) {
        self.mood = match self.rng.u8(0..4) {
            0 => Mood::Down,
            1 | 2 if !self.strict => Mood::Bad {
                percent: self.rng.u32(1..90),
            },
            _ => Mood::Good,
        };
        let id = IntegrationId::new(["acme", "other"][self.rng.usize(0..2)]);
        let source = (
            id.expect("valid"),
            Region::ALL[self.rng.usize(0..Region::ALL.len())],
        );
        if self.faults.remove(&source).is_none() && self.rng.bool() {
            let fault = faults::of_source(&mut self.rng);
            if !fault.is_refusal() || self.refused_once.insert(source.clone()) {
                self.faults.insert(source, fault);
            }
        }
    }

    pub(super) fn change_key(&mut self, id: &IntegrationId, region: Region) {
        let source = (id.clone(), region);
        if let Some(Fault::Status(401 | 403)) = self.faults.get(&source) {
            self.faults.remove(&source);
        }
    }

    pub(super) fn behave(&mut self) {
        self.mood = Mood::Good;
        self.faults.clear();
    }

    /// Counts requests from now on.
    pub(super) fn forget_requests(&mut self) {
        self.requests.clear();
    }

    pub(super) fn connections_broke(&mut self) {
        self.in_flight.clear();
    }

    pub(super) fn answered(&mut self, lane: &LaneKey) {
        self.in_flight.remove(lane);
    }

    /// Checks a request; its answer, and how long that takes in milliseconds.
    pub(super) fn receive(
        &mut self,
        lane: &LaneKey,
        leased: &[LeasedCapture],
        at: u64,
    ) -> (Reply, u64) {
        assert!(
            self.in_flight.insert(lane.clone()),
            "two requests of {lane} at once"
        );
        let mut events = Vec::new();
        for capture in leased {
            for event in EventType::ALL {
                if let Some(payload) = capture.payload(event) {
                    let capture_id = capture.record.capture_id.clone();
                    let arrival = Arrival {
                        capture: capture_id,
                        event,
                    };
                    let id = format!("{}-{}", arrival.capture, event.name());
                    let expected = format!("{{\"messageId\":\"{id}\",");
                    assert!(
                        payload.starts_with(expected.as_bytes()),
                        "another id than before"
                    );
                    events.push((arrival, payload.to_vec(), capture.sequence));
                }
            }
        }
        self.check_limits(lane, &events, at);
        *self.requests.entry(lane.clone()).or_default() += 1;
        let latency = self.rng.u64(1..MAX_LATENCY_MILLIS);
        let own = |(arrival, _, _): &(Arrival, Vec<u8>, i64)| faults::of_event(arrival);
        let fault = events.iter().find_map(own);
        let fault = fault.or((events.len() > self.slow_beyond).then_some(Fault::Hang));
        let (reply, takes) = self.answer(lane, fault);
        if takes && fault.is_none() {
            for (arrival, payload, sequence) in events {
                self.take(lane, arrival, payload, sequence);
            }
        }
        (reply, latency)
    }

    fn check_limits(&mut self, lane: &LaneKey, events: &[(Arrival, Vec<u8>, i64)], at: u64) {
        assert!(!events.is_empty(), "an empty request");
        assert!(
            events.len() <= self.options.max_batch_events,
            "too many events"
        );
        let bytes: usize = events.iter().map(|(_, payload, _)| payload.len() + 1).sum();
        // One capture may be larger than the bound, which real bounds rule out.
        let captures: BTreeSet<_> = events
            .iter()
            .map(|(arrival, _, _)| &arrival.capture)
            .collect();
        assert!(
            bytes <= self.options.max_batch_bytes || captures.len() == 1,
            "too many bytes"
        );

        // Over any time, no more than the burst and what has flowed in since.
        let count = u32::try_from(events.len()).expect("few");
        let sent = self.sent.entry(lane.integration_id.clone()).or_default();
        sent.push((at, count));
        let mut total = 0_u64;
        for (then, count) in sent.iter().rev() {
            total += u64::from(*count);
            let flowed = (at - then) * u64::from(RATE) / 1_000 + 1;
            assert!(
                total <= u64::from(self.burst) + flowed,
                "{} sends too fast",
                lane.integration_id
            );
        }
    }

    /// The answer, and whether Segment takes the events (if none fails by itself).
    fn answer(&mut self, lane: &LaneKey, own: Option<Fault>) -> (Reply, bool) {
        let status = |status| Reply::Status {
            status,
            retry_after: None,
        };
        let source = (lane.integration_id.clone(), lane.region);
        if let Some(fault) = self.faults.get(&source) {
            return (fault.reply(&mut self.rng), false);
        }
        let percent = match self.mood {
            Mood::Good => 0,
            Mood::Bad { percent } => percent,
            Mood::Down => 100,
        };
        if self.rng.u32(0..100) >= percent {
            let reply = own.map(|fault| fault.reply(&mut self.rng));
            return (reply.unwrap_or(status(200)), true);
        }
        // An answer may be lost after the events were taken.
        let lost_late = self.rng.bool();
        match self.rng.u8(0..8) {
            0 | 1 => (
                status([500, 502, 503, 504, 408, 460][self.rng.usize(0..6)]),
                false,
            ),
            2 => {
                let status = [429, 503][self.rng.usize(0..2)];
                (faults::slow_down(&mut self.rng, status), false)
            }
            3 => (Reply::TimedOut, lost_late),
            4 => (
                Reply::Status {
                    status: 429,
                    retry_after: None,
                },
                false,
            ),
            5 => (status([404, 421][self.rng.usize(0..2)]), false),
            _ => (
                Reply::Broken {
                    error: "the connection broke".to_owned(),
                    sent: true,
                },
                lost_late,
            ),
        }
    }

    fn take(&mut self, lane: &LaneKey, arrival: Arrival, payload: Vec<u8>, sequence: i64) {
        if let Some(before) = self.taken.get(&arrival) {
            assert_eq!(*before, payload, "the same messageId with another event");
            return;
        }
        let text = String::from_utf8_lossy(&payload).into_owned();
        let user = text.split('"').nth(7).unwrap_or_default().to_owned();
        self.order
            .push((lane.clone(), user, arrival.clone(), sequence));
        self.taken.insert(arrival, payload);
    }

    /// The events of one user arrived in the order in which they were accepted.
    pub(super) fn check_order(&self) {
        let mut last: HashMap<(&LaneKey, &String), (i64, EventType)> = HashMap::new();
        for (lane, user, arrival, sequence) in &self.order {
            let place = (*sequence, arrival.event);
            if let Some(before) = last.insert((lane, user), place) {
                assert!(
                    before < place,
                    "user {user}: {before:?} arrived before {place:?}"
                );
            }
        }
    }

    pub(super) fn has(&self, arrival: &Arrival) -> bool {
        self.taken.contains_key(arrival)
    }

    /// Requests of a lane since all faults are over.
    pub(super) fn requests(&self, lane: &LaneKey) -> usize {
        self.requests.get(lane).copied().unwrap_or(0)
    }
}
