//! Lanes against a Segment that fails by event, by size or as a whole.

use std::collections::BTreeSet;

use super::*;
use crate::{delivery::Condition, outbox::LeaseScope, status::MAX_ATTEMPTS_KEPT};

/// A request's events.
pub(super) type Events<'a> = &'a [(i64, EventType)];

/// Lanes of one source with their queues, and a Segment.
pub(super) struct Driven<S> {
    pub(super) lanes: Vec<(Lane, LaneKey, Vec<LeasedCapture>)>,
    pub(super) sources: Sources,
    pub(super) segment: S,
    pub(super) now: UnixMillis,
    pub(super) requests: usize,
    pub(super) done: Vec<(i64, EventType, State)>,
    /// Conditions of the source that people were told.
    pub(super) told: Vec<Condition>,
}

impl<S: FnMut(Events<'_>, UnixMillis) -> Reply> Driven<S> {
    /// Captures of each lane.
    pub(super) fn new(queues: Vec<Vec<LeasedCapture>>, options: LaneOptions, segment: S) -> Self {
        let lanes = queues.into_iter().zip(0..).map(|(queue, shard)| {
            let key = LaneKey { shard, ..key() };
            (Lane::new(key.clone(), options), key, queue)
        });
        Self {
            lanes: lanes.collect(),
            sources: Sources::new(Duration::from_secs(300)),
            segment,
            now: NOW,
            requests: 0,
            done: Vec::new(),
            told: Vec::new(),
        }
    }

    /// What the reference outbox leases, for captures that each have an own user, or the
    /// user that their payload names.
    fn lease(
        queue: &[LeasedCapture],
        budget: LeaseBudget,
        scope: &LeaseScope,
    ) -> Vec<LeasedCapture> {
        let mut batch: Vec<LeasedCapture> = Vec::new();
        let mut events = 0;
        for capture in queue {
            if !scope
                .admits(|| Ok::<_, ()>(capture.user_id()))
                .expect("found")
            {
                continue;
            }
            let mut capture = capture.clone();
            if budget.max_events == 1 && capture.identify.is_some() {
                capture.track = None;
            }
            events += capture.event_count() as usize;
            if events > budget.max_events {
                break;
            }
            batch.push(capture);
        }
        batch
    }

    /// One turn of a lane; returns when it has something to do next.
    fn turn(&mut self, place: usize) -> Option<UnixMillis> {
        let (lane, key, queue) = &mut self.lanes[place];
        let evidence = self.sources.evidence(key);
        let (budget, scope) = match lane.plan(self.now, &evidence) {
            Plan::WaitUntil(moment) | Plan::RestUntil(moment) => return Some(moment),
            Plan::Send(budget, scope) => (budget, scope),
        };
        let leased = Self::lease(queue, budget, &scope);
        if leased.is_empty() {
            if !lane.found_nothing() {
                return Some(self.now);
            }
            self.told.extend(self.sources.emptied(key));
            return None;
        }
        let carried: Vec<_> = leased
            .iter()
            .flat_map(|capture| {
                let events = EventType::ALL.into_iter();
                let carried = events.filter(|event| capture.payload(*event).is_some());
                carried.map(|event| (capture.sequence, event))
            })
            .collect();
        self.requests += 1;
        let begun = self.sources.begin(key, "etag");
        let answer = Answer {
            reply: (self.segment)(&carried, self.now),
            started: self.now,
            latency: Duration::from_millis(10),
        };
        self.now = self.now.plus(answer.latency);
        let ended = Ended {
            begun,
            answer: &answer,
            now: self.now,
            jitter: 1.0,
        };
        let (settlement, finding) = lane.settle(leased, ended, &evidence);
        for settled in settlement.captures {
            let place = queue
                .iter()
                .position(|one| one.sequence == settled.sequence);
            let place = place.expect("queued");
            assert!(settled.record.attempts.len() <= MAX_ATTEMPTS_KEPT);
            for event in settled.changed.iter() {
                let state = settled.record.event(event).state;
                if !state.is_final() {
                    continue;
                }
                self.done.push((settled.sequence, event, state));
                match event {
                    EventType::Identify => queue[place].identify = None,
                    EventType::Track => queue[place].track = None,
                }
            }
            queue[place].record = settled.record;
            if queue[place].event_count() == 0 {
                queue.remove(place);
            }
        }
        let set_aside = lane.set_aside();
        let sources = &self.sources;
        let change = sources.note(key, begun.request, finding, set_aside, self.now);
        self.told.extend(change.condition);
        Some(self.now)
    }

    /// Works until `done`, or a time has passed.
    pub(super) fn run(&mut self, longest: Duration, done: impl Fn(&Self) -> bool) {
        let end = self.now.plus(longest);
        while !done(self) && self.now < end {
            let turns: Vec<_> = (0..self.lanes.len())
                .filter_map(|at| self.turn(at))
                .collect();
            match turns.into_iter().min() {
                Some(next) => self.now = self.now.max(next.min(end)),
                None => return,
            }
        }
    }

    pub(super) fn delivered(&self) -> usize {
        let delivered = |state: &State| matches!(state, State::Delivered { .. });
        self.done
            .iter()
            .filter(|(.., state)| delivered(state))
            .count()
    }

    pub(super) fn dead(&self) -> BTreeSet<(i64, EventType, DeliveryReason)> {
        let dead = self
            .done
            .iter()
            .filter_map(|(sequence, event, state)| match state {
                State::DeadLettered { reason, .. } => Some((*sequence, *event, *reason)),
                _ => None,
            });
        dead.collect()
    }
}

pub(super) fn status(status: u16) -> Reply {
    answer(status, None).reply
}

pub(super) fn reset() -> Reply {
    Reply::Broken {
        error: "reset".to_owned(),
        sent: true,
    }
}

pub(super) fn page() -> Reply {
    Reply::NotTaken {
        status: 200,
        body: "an HTML page",
    }
}

pub(super) fn roomy() -> LaneOptions {
    LaneOptions {
        max_batch_events: 2_500,
        ..options()
    }
}

pub(super) fn queue(count: i64) -> Vec<LeasedCapture> {
    (0..count).map(leased).collect()
}

/// Both events of capture 20 fail, by their user's name, in any company.
pub(super) fn fails_with(reply: impl Fn() -> Reply) -> impl FnMut(Events<'_>, UnixMillis) -> Reply {
    move |events, _| match events.iter().any(|(sequence, _)| *sequence == 20) {
        true => reply(),
        false => status(200),
    }
}

#[test]
fn one_event_that_fails_in_any_way_holds_up_its_own_user_alone() {
    let replies: [fn() -> Reply; 7] = [
        || status(500),
        || status(503),
        || status(408),
        || Reply::TimedOut,
        reset,
        page,
        || status(403),
    ];
    for reply in replies {
        let mut driven = Driven::new(vec![queue(41)], roomy(), fails_with(reply));
        driven.run(Duration::from_secs(20), |driven| driven.delivered() == 80);
        assert_eq!(driven.delivered(), 80, "{:?}", reply());
        assert!(driven.requests < 40, "{} requests", driven.requests);
        assert!(driven.now.since(NOW) < Duration::from_secs(20));
    }
}

#[test]
fn no_delay_that_others_cause_ages_an_event_and_only_its_own_failures_do() {
    for reply in [|| status(500), || Reply::TimedOut] {
        let mut driven = Driven::new(vec![queue(41)], roomy(), fails_with(reply));
        driven.run(Duration::from_secs(73 * 3_600), |_| false);
        let expired = DeliveryReason::Expired;
        assert_eq!(driven.delivered(), 80);
        assert_eq!(
            driven.dead(),
            EventType::ALL.map(|event| (20, event, expired)).into()
        );
    }
}

#[test]
fn time_outs_shrink_batches_until_they_fit() {
    // 2 ms an event, and 400 ms for a request.
    let segment = |events: Events<'_>, _| match events.len() > 200 {
        true => Reply::TimedOut,
        false => status(200),
    };
    let mut driven = Driven::new(vec![queue(1_000)], roomy(), segment);
    driven.run(Duration::from_secs(600), |driven| {
        driven.delivered() == 2_000
    });
    assert_eq!(driven.delivered(), 2_000);
    assert!(driven.requests < 50, "{} requests", driven.requests);
    assert!(driven.dead().is_empty());
}

#[test]
fn a_source_that_refuses_everything_for_a_while_loses_nothing() {
    for refusal in [400, 401, 402, 403, 404, 413, 421, 501] {
        let queues = (0..4).map(|_| queue(60)).collect();
        let segment =
            move |_: Events<'_>, now: UnixMillis| match now.since(NOW) < Duration::from_secs(6) {
                true => status(refusal),
                false => status(200),
            };
        let mut driven = Driven::new(queues, roomy(), segment);
        driven.run(Duration::from_secs(600), |driven| driven.delivered() == 480);
        assert!(driven.dead().is_empty(), "{refusal}: {:?}", driven.dead());
        assert_eq!(driven.delivered(), 480, "{refusal}");
        assert!(driven.requests < 200, "{} requests", driven.requests);
    }
}

#[test]
fn what_is_refused_for_good_is_given_up_only_with_a_control() {
    for (refusal, reason) in [
        (400, DeliveryReason::PayloadRejected),
        (402, DeliveryReason::RequestRejected),
        (403, DeliveryReason::RequestRejected),
    ] {
        let segment = fails_with(move || status(refusal));
        let mut driven = Driven::new(vec![queue(41)], roomy(), segment);
        driven.run(Duration::from_secs(60), |driven| driven.done.len() == 82);
        assert_eq!(driven.delivered(), 80);
        let dead = EventType::ALL.map(|event| (20, event, reason));
        assert_eq!(driven.dead(), dead.into());
        // Nothing else is there to be taken.
        let alone = vec![leased(20)];
        let mut driven = Driven::new(vec![alone], roomy(), fails_with(move || status(refusal)));
        driven.run(Duration::from_secs(3_600), |_| false);
        assert!(driven.dead().is_empty());
    }
}

#[test]
fn suspects_stay_bounded_and_a_sick_source_is_tried_slowly() {
    let mut driven = Driven::new(vec![queue(500)], roomy(), |_, _| status(500));
    driven.run(Duration::from_secs(12 * 3_600), |driven| {
        assert!(driven.lanes[0].0.set_aside() <= MAX_SUSPECTS);
        false
    });
    assert!(driven.dead().is_empty());
    assert!(driven.requests < 1_000, "{} requests", driven.requests);
}

#[test]
fn a_users_events_keep_their_order_behind_a_suspect() {
    // Captures 0 to 29 are of three people; the first of each fails for ten seconds.
    let queue: Vec<LeasedCapture> = (0..30)
        .map(|sequence| {
            let event = || Some(Bytes::from(format!(r#"{{"userId":"{}"}}"#, sequence % 3)));
            LeasedCapture {
                identify: event(),
                track: event(),
                ..leased(sequence)
            }
        })
        .collect();
    let segment = |events: Events<'_>, now: UnixMillis| {
        let fails = events.iter().any(|(sequence, _)| *sequence < 2);
        match fails && now.since(NOW) < Duration::from_secs(10) {
            true => status(500),
            false => status(200),
        }
    };
    let mut driven = Driven::new(vec![queue], roomy(), segment);
    driven.run(Duration::from_secs(8), |driven| driven.delivered() == 20);
    assert_eq!(driven.delivered(), 20, "the third person passes");
    driven.run(Duration::from_secs(120), |driven| driven.delivered() == 60);
    assert_eq!(driven.delivered(), 60);
    for user in 0..3 {
        let own = driven
            .done
            .iter()
            .filter(|(sequence, ..)| sequence % 3 == user);
        let order: Vec<_> = own
            .map(|(sequence, event, _)| (*sequence, *event))
            .collect();
        assert!(order.is_sorted(), "{order:?}");
    }
}

proptest! {
    #[test]
    fn of_a_refused_batch_only_the_bad_events_are_given_up(
        count in 1..40_i64,
        bad in prop::collection::btree_set((0..40_i64, any::<bool>()), 0..4),
    ) {
        let bad: BTreeSet<(i64, EventType)> = bad
            .into_iter()
            .map(|(at, track)| (at, if track { EventType::Track } else { EventType::Identify }))
            .collect();
        let refused = bad.clone();
        let segment = move |events: Events<'_>, _: UnixMillis| {
            match events.iter().any(|event| refused.contains(event)) {
                true => status(400),
                false => status(200),
            }
        };
        let mut driven = Driven::new(vec![queue(count), queue(0)], options(), segment);
        let done = |driven: &Driven<_>| driven.done.len() as i64 == 2 * count;
        // Another lane of the source delivers now and then: the control.
        for turn in 0..8 {
            driven.run(Duration::from_secs(30), done);
            driven.lanes[1].2.push(leased(1_000 + turn));
            driven.lanes[1].0.hear_of_captures();
            driven.run(Duration::from_secs(1), |_| false);
            driven.done.retain(|(sequence, ..)| *sequence < 1_000);
        }
        let bad: BTreeSet<_> = bad.into_iter().filter(|(at, _)| *at < count).collect();
        let dead: BTreeSet<_> = driven.dead().into_iter().map(|(at, event, _)| (at, event)).collect();
        prop_assert!(dead.is_subset(&bad));
        prop_assert_eq!(driven.delivered(), 2 * count as usize - bad.len());
        prop_assert_eq!(&dead, &bad);
        prop_assert!(driven.requests <= count as usize + 40 * (bad.len() + 1) + 8);
    }
}

#[test]
fn an_event_that_waited_for_others_is_not_too_old_at_its_first_own_failure() {
    // Two captures of one person among others: the first fails for ever, the second twice.
    let of_one = |sequence| LeasedCapture {
        identify: leased(0).identify,
        track: leased(0).track,
        ..leased(sequence)
    };
    let queue = vec![of_one(0), of_one(1), leased(2), leased(3)];
    let mut failures = 0;
    let segment = move |events: Events<'_>, now: UnixMillis| {
        let old = now.since(NOW) > Duration::from_secs(24 * 3_600);
        let second = old && failures < 2 && events.iter().all(|(sequence, _)| *sequence == 1);
        failures += i32::from(second);
        match second || events.iter().any(|(sequence, _)| *sequence == 0) {
            true => status(500),
            false => status(200),
        }
    };
    let mut driven = Driven::new(vec![queue], roomy(), segment);
    driven.run(Duration::from_secs(73 * 3_600), |driven| {
        driven.done.len() == 8
    });
    let expired = DeliveryReason::Expired;
    let first = EventType::ALL.map(|event| (0, event, expired));
    assert_eq!(driven.dead(), first.into());
    assert_eq!(driven.delivered(), 6);
}
