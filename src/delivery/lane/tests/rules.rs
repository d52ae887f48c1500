//! Single rules of a lane, step by step.

use super::*;

fn later(minutes: u64) -> UnixMillis {
    NOW.plus(Duration::from_secs(60 * minutes))
}

/// A request with an answer at a moment.
fn settle_at(lane: &mut Lane, sent: Vec<LeasedCapture>, reply: Reply, now: UnixMillis) -> Finding {
    let answer = Answer {
        reply,
        started: now,
        latency: Duration::ZERO,
    };
    let ended = Ended {
        begun: Begun::default(),
        answer: &answer,
        now,
        jitter: 1.0,
    };
    lane.settle(sent, ended, &Evidence::default()).1
}

fn several() -> Vec<LeasedCapture> {
    (1..9).map(leased).collect()
}

/// One event.
fn single(sequence: i64) -> Vec<LeasedCapture> {
    vec![LeasedCapture {
        track: None,
        ..leased(sequence)
    }]
}

fn status(status: u16) -> Reply {
    answer(status, None).reply
}

fn broken(sent: bool) -> Reply {
    Reply::Broken {
        error: "reset".to_owned(),
        sent,
    }
}

fn planned(lane: &mut Lane, now: UnixMillis) -> (LeaseBudget, LeaseScope) {
    match lane.plan(now, &Evidence::default()) {
        Plan::Send(budget, scope) => (budget, scope),
        other => panic!("it waits: {other:?}"),
    }
}

fn size(lane: &mut Lane) -> usize {
    planned(lane, later(10)).0.max_events
}

#[test]
fn several_events_are_halved_from_the_second_failure_after_a_success_on() {
    let mut lane = lane();
    for _ in 0..2 {
        let _ = settle_at(&mut lane, several(), status(500), NOW);
        assert_eq!(size(&mut lane), 16);
        let _ = settle_at(&mut lane, several(), broken(true), NOW);
        assert_eq!(size(&mut lane), 8);
        let _ = settle_at(&mut lane, several(), status(200), NOW);
        assert_eq!(size(&mut lane), 16);
    }
    // What is refused for good is halved at once.
    let _ = settle_at(&mut lane, several(), status(400), NOW);
    assert_eq!(size(&mut lane), 8);
}

#[test]
fn where_time_outs_made_batches_smaller_the_next_one_does_so_at_once() {
    let mut lane = lane();
    let mut settle = |reply| {
        let _ = settle_at(&mut lane, several(), reply, NOW);
        size(&mut lane)
    };
    let replies = [
        Reply::TimedOut,
        Reply::TimedOut,
        status(200),
        Reply::TimedOut,
    ];
    assert_eq!(replies.map(&mut settle), [16, 8, 9, 8]);
    // Another failure is none of the size.
    assert_eq!([status(200), status(500)].map(&mut settle), [9, 9]);
}

#[test]
fn a_single_event_that_times_out_says_nothing_of_the_size() {
    let mut lane = lane();
    for _ in 0..2 {
        let _ = settle_at(&mut lane, several(), Reply::TimedOut, NOW);
    }
    let _ = settle_at(&mut lane, single(1), Reply::TimedOut, NOW);
    let _ = settle_at(&mut lane, several(), status(200), NOW);
    assert_eq!(planned(&mut lane, NOW).0.max_events, 16);
}

#[test]
fn a_search_waits_more_and_more_only_where_the_source_is_sick() {
    for (suspects_in_row, expected) in [(0, [500, 500, 500]), (4, [500, 1_000, 2_000])] {
        let mut lane = lane();
        let evidence = Evidence {
            suspects_in_row,
            ..Evidence::default()
        };
        let waits = [(); 3].map(|()| {
            let ended = Ended {
                begun: Begun::default(),
                answer: &answer(500, None),
                now: NOW,
                jitter: 1.0,
            };
            let _ = lane.settle(several(), ended, &evidence);
            waits(&mut lane, NOW).as_millis()
        });
        assert_eq!(waits, expected);
    }
}

#[test]
fn what_can_not_be_sent_at_all_halves_nothing() {
    let mut lane = lane();
    for reply in [broken(false), broken(false), status(429), status(429)] {
        let finding = settle_at(&mut lane, several(), reply, NOW);
        assert_eq!((finding, size(&mut lane)), (Finding::Held, 16));
    }
}

#[test]
fn a_success_and_a_change_of_the_integration_begin_the_waits_anew() {
    let fail = |lane: &mut Lane| {
        let _ = settle(lane, several(), &answer(429, None), 1.0);
        waits(lane, NOW).as_millis()
    };
    let mut lane = lane();
    assert_eq!([(); 3].map(|()| fail(&mut lane)), [500, 1_000, 2_000]);
    let _ = settle(&mut lane, several(), &answer(200, None), 1.0);
    assert_eq!([(); 2].map(|()| fail(&mut lane)), [500, 1_000]);
    lane.resume();
    assert_eq!(fail(&mut lane), 500);
}

#[test]
fn suspects_and_others_take_turns_by_what_was_sent_and_not_by_what_was_planned() {
    let mut lane = lane();
    let _ = settle_at(&mut lane, single(1), status(500), NOW);
    let is_suspects = |lane: &mut Lane, minutes| matches!(planned(lane, later(minutes)).1, LeaseScope::Only(user) if user == "1");
    for minutes in (10..50).step_by(10) {
        // The rate keeps each back at first.
        for _ in 0..3 {
            assert!(is_suspects(&mut lane, minutes));
        }
        let _ = settle_at(&mut lane, single(1), status(500), later(minutes));
        for _ in 0..3 {
            assert!(!is_suspects(&mut lane, minutes + 5));
        }
        let _ = settle_at(&mut lane, several(), status(200), later(minutes + 5));
    }
}

#[test]
fn a_recovery_of_the_source_and_a_change_end_the_waits_of_lane_and_suspects() {
    let slow_down = || answer(503, Some(120)).reply;
    let suspects = |lane: &mut Lane, evidence: &Evidence| {
        matches!(lane.plan(NOW, evidence), Plan::Send(_, LeaseScope::Only(_)))
    };
    let mut lane = lane();
    let _ = settle_at(&mut lane, single(1), slow_down(), NOW);
    let _ = settle_at(&mut lane, several(), slow_down(), NOW);
    assert!(!suspects(&mut lane, &Evidence::default()));
    let recovered = Evidence {
        recoveries: 1,
        ..Evidence::default()
    };
    assert!(lane.has_recovered(&recovered));
    assert!(suspects(&mut lane, &recovered));
    assert!(!lane.has_recovered(&recovered));
    let _ = settle_at(&mut lane, single(1), slow_down(), NOW);
    assert!(matches!(lane.plan(later(1), &recovered), Plan::Send(..)));
    let _ = settle_at(&mut lane, several(), slow_down(), NOW);
    assert!(!suspects(&mut lane, &recovered));
    lane.resume();
    assert!(suspects(&mut lane, &recovered));
}
