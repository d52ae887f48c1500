//! Faults that are none of a plain kind: mixed answers, answers that ask to wait, answers that
//! look like the endpoint's own.

use super::driven::{Driven, Events, queue, reset, roomy, status};
use super::*;
use crate::delivery::Condition;

const MINUTE: Duration = Duration::from_secs(60);

/// Whether capture 20, the bad one, is among the events.
fn has_bad(events: Events<'_>) -> bool {
    events.iter().any(|(sequence, _)| *sequence == 20)
}

#[test]
fn an_event_that_fails_in_another_way_each_time_holds_up_its_own_user_alone() {
    let replies = [status(500), reset(), Reply::TimedOut, status(404)];
    for kinds in 2..=replies.len() {
        let (replies, mut turn) = (replies.clone(), 0);
        let segment = move |events: Events<'_>, _: UnixMillis| {
            if !has_bad(events) {
                return status(200);
            }
            turn += 1;
            replies[turn % kinds].clone()
        };
        let mut driven = Driven::new(vec![queue(41)], roomy(), segment);
        driven.run(MINUTE, |driven| driven.delivered() == 80);
        assert_eq!(driven.delivered(), 80, "{kinds} kinds");
        assert!(driven.requests < 60, "{} requests", driven.requests);
    }
}

#[test]
fn an_event_with_the_answer_of_a_wrong_path_holds_up_its_own_user_alone() {
    for refusal in [404, 421] {
        let segment = move |events: Events<'_>, _: UnixMillis| match has_bad(events) {
            true => status(refusal),
            false => status(200),
        };
        let mut driven = Driven::new(vec![queue(41)], roomy(), segment);
        driven.run(MINUTE, |driven| driven.delivered() == 80);
        assert_eq!(driven.delivered(), 80, "{refusal}");
        assert!(driven.dead().is_empty(), "{:?}", driven.dead());
    }
}

#[test]
fn a_sick_source_that_asks_to_wait_is_not_asked_before() {
    let times = std::cell::RefCell::new(Vec::new());
    let segment = |_: Events<'_>, now: UnixMillis| {
        times.borrow_mut().push(now);
        answer(503, Some(120)).reply
    };
    let mut driven = Driven::new(vec![queue(41)], roomy(), segment);
    driven.run(60 * MINUTE, |_| false);
    let times = times.borrow();
    let short = times
        .windows(2)
        .filter(|pair| pair[1].since(pair[0]) < Duration::from_secs(120));
    // While it looks for a suspect, four users are tried.
    assert!(short.count() <= 4, "{} requests", times.len());
}

#[test]
fn a_share_of_servers_that_refuses_everything_for_a_while_costs_few_events() {
    // As while a bad deployment is rolled out: each request is refused with this chance.
    for (percent, most) in [(10, 0), (50, 5), (90, 200)] {
        let mut dead = 0;
        for seed in 0..40 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let segment = |_: Events<'_>, now: UnixMillis| match now.since(NOW) < MINUTE
                && rng.u32(0..100) < percent
            {
                true => status(400),
                false => status(200),
            };
            let queues = (0..4).map(|_| queue(60)).collect();
            let mut driven = Driven::new(queues, roomy(), segment);
            driven.run(30 * MINUTE, |driven| driven.done.len() == 480);
            assert_eq!(driven.done.len(), 480);
            dead += driven.dead().len();
        }
        assert!(dead <= most, "{percent} %: {dead} of 19,200 events");
    }
}

#[test]
fn a_bound_on_the_size_casts_no_doubt_on_what_is_refused() {
    let segment = |events: Events<'_>, _: UnixMillis| match (has_bad(events), events.len()) {
        (_, 33..) => status(413),
        (true, _) => status(400),
        _ => status(200),
    };
    let mut driven = Driven::new(vec![queue(500)], roomy(), segment);
    driven.run(MINUTE, |driven| driven.done.len() == 1_000);
    assert_eq!((driven.delivered(), driven.dead().len()), (998, 2));
}

/// How long after the first success everything of four lanes is delivered.
fn after_recovery(reply: fn() -> Reply, users: i64) -> Duration {
    let well = NOW.plus(6 * 60 * MINUTE);
    let first = std::cell::Cell::new(None);
    let segment = |_: Events<'_>, now: UnixMillis| match now < well {
        true => reply(),
        false => {
            first.set(first.get().or(Some(now)));
            status(200)
        }
    };
    let queues = (0..4).map(|_| queue(users)).collect();
    let mut driven = Driven::new(queues, roomy(), segment);
    let all = usize::try_from(8 * users).expect("few");
    driven.run(24 * 60 * MINUTE, |driven| driven.delivered() == all);
    assert_eq!(driven.delivered(), all);
    driven.now.since(first.get().expect("taken"))
}

#[test]
fn one_success_of_a_sick_source_ends_the_waits_of_all_its_lanes_and_suspects() {
    for reply in [
        || status(500),
        || status(402),
        || status(401),
        || status(404),
        || answer(503, Some(120)).reply,
    ] {
        for users in [2, 30] {
            let took = after_recovery(reply, users);
            assert!(
                took < Duration::from_secs(5),
                "{users} {:?} {took:?}",
                reply()
            );
        }
    }
}

#[test]
fn users_behind_many_suspects_are_reached_first() {
    // The first 50 users fail; while they do, nothing is taken, and the source looks sick.
    let segment =
        |events: Events<'_>, _: UnixMillis| match events.iter().any(|(sequence, _)| *sequence < 50)
        {
            true => status(500),
            false => status(200),
        };
    let mut driven = Driven::new(vec![queue(60)], roomy(), segment);
    driven.run(60 * 60 * MINUTE, |driven| driven.delivered() == 20);
    assert_eq!(driven.delivered(), 20);
    assert!(driven.requests < 50 + 30, "{} requests", driven.requests);
}

#[test]
fn suspects_are_tried_also_where_one_without_a_free_place_is_next() {
    // All fail at first, and later only those that found no place.
    let places = i64::try_from(MAX_SUSPECTS).expect("few");
    let segment = |events: Events<'_>, now: UnixMillis| {
        let fails = |(sequence, _): &(i64, EventType)| *sequence >= places;
        match now.since(NOW) < 60 * 12 * MINUTE || events.iter().any(fails) {
            true => status(500),
            false => status(200),
        }
    };
    let mut driven = Driven::new(vec![queue(places + 10)], roomy(), segment);
    driven.run(60 * 20 * MINUTE, |driven| {
        driven.delivered() == 2 * MAX_SUSPECTS
    });
    assert_eq!(driven.delivered(), 2 * MAX_SUSPECTS);
}

/// Answers nothing for so many hours.
fn unreachable(hours: u32) -> impl FnMut(Events<'_>, UnixMillis) -> Reply {
    move |_, now| match now.since(NOW) < hours * 60 * MINUTE {
        true => Reply::Broken {
            error: "no connection".to_owned(),
            sent: false,
        },
        false => status(200),
    }
}

#[test]
fn what_can_not_be_sent_is_given_up_when_it_and_the_outage_are_too_old() {
    // The maximum age is 24 hours.
    let mut driven = Driven::new(vec![queue(9)], options(), unreachable(23));
    driven.run(30 * 60 * MINUTE, |driven| driven.done.len() == 18);
    assert_eq!((driven.delivered(), driven.dead().len()), (18, 0));

    let mut driven = Driven::new(vec![queue(9)], options(), unreachable(30));
    driven.run(20 * 60 * MINUTE, |_| false);
    let mut young = leased(100);
    Arc::make_mut(&mut young.record).queue_time = driven.now;
    driven.lanes[0].2.push(young);
    driven.run(20 * 60 * MINUTE, |driven| driven.done.len() == 20);
    let dead = driven.dead();
    assert!(
        dead.iter()
            .all(|(_, _, reason)| *reason == DeliveryReason::Expired)
    );
    assert_eq!((driven.delivered(), dead.len()), (2, 18));

    // Another lane of the source is served.
    let one_lane = |events: Events<'_>, _: UnixMillis| match events[0].0 < 9 {
        true => answer(429, None).reply,
        false => status(200),
    };
    let mut driven = Driven::new(vec![queue(9), Vec::new()], options(), one_lane);
    for turn in 0..40 {
        driven.lanes[1].2.push(leased(100 + turn));
        driven.lanes[1].0.hear_of_captures();
        driven.run(60 * MINUTE, |_| false);
    }
    assert_eq!((driven.delivered(), driven.dead().len()), (80, 0));
}

/// Requests until capture 8, whose track event is bad, is given up; nothing comes after it.
#[test]
fn the_last_event_is_given_up_by_what_was_taken_of_its_company() {
    let segment = |events: Events<'_>, _: UnixMillis| match events.contains(&(8, EventType::Track))
    {
        true => status(400),
        false => status(200),
    };
    let mut driven = Driven::new(vec![queue(9)], roomy(), segment);
    driven.run(MINUTE, |driven| driven.done.len() == 18);
    let rejected = DeliveryReason::PayloadRejected;
    assert_eq!(driven.dead(), [(8, EventType::Track, rejected)].into());
    assert_eq!(driven.delivered(), 17);
    assert!(driven.requests < 12, "{} requests", driven.requests);
}

#[test]
fn what_was_refused_beside_a_bad_event_is_not_given_up_at_its_first_refusal_alone() {
    // Capture 3 is bad, and its neighbour is refused twice when it is by itself.
    let mut unlucky = 2;
    let segment = move |events: Events<'_>, _: UnixMillis| {
        let of = |wanted: i64| move |(sequence, _): &(i64, EventType)| *sequence == wanted;
        let is_unlucky = events.iter().all(of(2)) && unlucky > 0;
        unlucky -= i32::from(is_unlucky);
        match is_unlucky || events.iter().any(of(3)) {
            true => status(400),
            false => status(200),
        }
    };
    let mut driven = Driven::new(vec![queue(4)], roomy(), segment);
    driven.lanes[0].2.push(leased(50));
    driven.run(10 * MINUTE, |driven| driven.delivered() == 8);
    assert_eq!(driven.delivered(), 8, "{:?}", driven.dead());
}

#[test]
fn a_bad_event_in_little_traffic_is_told_of_once() {
    for reply in [status(500), Reply::TimedOut, status(404)] {
        let segment =
            |events: Events<'_>, _: UnixMillis| match events.contains(&(20, EventType::Track)) {
                true => reply.clone(),
                false => status(200),
            };
        let mut driven = Driven::new(vec![vec![leased(20)], Vec::new()], roomy(), segment);
        // People are told after five minutes; others come every 20 minutes, in both lanes.
        for turn in 0..30 {
            driven.run(20 * MINUTE, |_| false);
            let lane = usize::from(turn % 3 == 0);
            driven.lanes[lane].2.push(leased(100 + turn));
            driven.lanes[lane].0.hear_of_captures();
        }
        assert_eq!(driven.told, [Condition::Broken], "{reply:?}");
        // It is given up for its age in the end.
        driven.run(60 * 24 * MINUTE, |_| false);
        let told = [Condition::Broken, Condition::Healthy];
        assert_eq!(driven.told, told, "{reply:?}");
    }
}

#[test]
fn a_lane_that_takes_a_part_of_its_events_is_told_of_once() {
    // Of each user the first event is taken and the second is not.
    for reply in [status(500), Reply::TimedOut, status(404)] {
        let segment = |events: Events<'_>, _: UnixMillis| {
            let is_bad = |(_, event): &(i64, EventType)| *event == EventType::Track;
            match events.iter().any(is_bad) {
                true => reply.clone(),
                false => status(200),
            }
        };
        let mut driven = Driven::new(vec![vec![leased(0)]], roomy(), segment);
        for turn in 1..60 {
            driven.run(7 * MINUTE, |_| false);
            driven.lanes[0].2.push(leased(turn));
            driven.lanes[0].0.hear_of_captures();
        }
        assert_eq!(driven.told, [Condition::Broken], "{reply:?}");
        assert_eq!(driven.delivered(), 59);
    }
}
