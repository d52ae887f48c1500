//! Faults that are none of a plain kind: mixed answers, answers that ask to wait, answers that
//! look like the endpoint's own.

use super::driven::{Driven, Events, queue, reset, roomy, status};
use super::*;

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
fn a_share_of_servers_that_refuse_everything_for_a_while_costs_few_events() {
    let mut rng = fastrand::Rng::with_seed(7);
    let segment = move |_: Events<'_>, now: UnixMillis| match now.since(NOW) < MINUTE && rng.bool()
    {
        true => status(400),
        false => status(200),
    };
    let queues = (0..4).map(|_| queue(60)).collect();
    let mut driven = Driven::new(queues, roomy(), segment);
    driven.run(10 * MINUTE, |driven| driven.done.len() == 480);
    assert!(
        driven.dead().is_empty(),
        "{} {:?}",
        driven.dead().len(),
        driven.now.since(NOW)
    );
}
