//! Who is to blame for a single event that failed, by what is known of its source.

use super::*;
use crate::delivery::{Finding, classify::FaultKind};

const WAIT: Duration = Duration::from_millis(500);

fn single(sequence: i64) -> LeasedCapture {
    LeasedCapture {
        track: None,
        ..leased(sequence)
    }
}

/// A request, with the number of the last one of its source that was taken before it began.
fn begun(request: u64, taken: u64) -> Begun {
    Begun {
        request,
        taken: (taken > 0).then_some(taken),
    }
}

fn ended(request: u64, answer: &Answer) -> Ended<'_> {
    Ended {
        begun: begun(request, 0),
        answer,
        now: NOW,
        jitter: 1.0,
    }
}

/// What comes of an event that fails alone: its state and what is learned.
fn fails(
    lane: &mut Lane,
    capture: LeasedCapture,
    answer: &Answer,
    begun: Begun,
    evidence: Evidence,
) -> (State, Finding) {
    let ended = Ended {
        begun,
        answer,
        now: NOW,
        jitter: 1.0,
    };
    let (settlement, finding) = lane.settle(vec![capture], ended, &evidence);
    (settlement.captures[0].record.identify.state, finding)
}

fn refused_before(request: u64) -> Evidence {
    Evidence {
        refused: (request > 0).then_some(request),
        ..Evidence::default()
    }
}

fn suspects_in_row(suspects_in_row: u32) -> Evidence {
    Evidence {
        suspects_in_row,
        ..Evidence::default()
    }
}

fn is_dead(state: State) -> bool {
    matches!(state, State::DeadLettered { .. })
}

/// The wait of the lane, and that of the event as it is told.
fn waits_of(lane: &mut Lane, state: State) -> (Duration, Duration) {
    let State::Retrying { next_attempt, .. } = state else {
        panic!("not tried again: {state:?}");
    };
    (waits(lane, NOW), next_attempt.since(NOW))
}

#[test]
fn a_control_is_taken_after_the_first_refusal_with_no_other_refusal_since() {
    for (status, needed) in [(400, 1), (402, 1), (413, 1), (401, 2), (403, 2)] {
        // Refused first by request 5.
        for (taken, refused, is_control) in [
            (0, 0, false),
            (4, 0, false),
            (6, 0, true),
            // Another event was refused: it may be all of them again.
            (6, 7, false),
            (8, 7, true),
        ] {
            let mut lane = lane();
            let answer = answer(status, None);
            let first = fails(
                &mut lane,
                single(1),
                &answer,
                begun(5, 4),
                refused_before(3),
            );
            assert!(!is_dead(first.0));
            for round in 1..=needed {
                let evidence = refused_before(refused);
                let again = fails(&mut lane, single(1), &answer, begun(9, taken), evidence);
                let expected = is_control && round == needed;
                assert_eq!(
                    is_dead(again.0),
                    expected,
                    "{status} {taken} {refused} {round}"
                );
                assert_eq!(again.1 == Finding::GivenUp, expected);
            }
        }
    }
}

#[test]
fn what_may_pass_is_never_given_up_for_a_control() {
    for status in [404, 408, 421, 429, 500, 503] {
        let mut lane = lane();
        for request in 1..20 {
            let failed = fails(
                &mut lane,
                single(1),
                &answer(status, None),
                begun(2 * request, 2 * request - 1),
                Evidence::default(),
            );
            assert!(!is_dead(failed.0), "{status}");
        }
    }
}

#[test]
fn a_key_with_which_others_were_taken_since_is_not_what_is_refused() {
    let mut lane = lane();
    let mut kind = |request, taken| {
        let evidence = Evidence::default();
        let answer = answer(401, None);
        let failed = fails(
            &mut lane,
            single(1),
            &answer,
            begun(request, taken),
            evidence,
        );
        match failed.1 {
            Finding::Alone { kind, is_new, .. } => (kind, is_new),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(kind(5, 4), (FaultKind::Key, true));
    assert_eq!(kind(7, 6), (FaultKind::Final, false));
}

#[test]
fn the_fourth_suspect_in_a_row_shows_that_the_source_is_sick() {
    // Refused, a healthy source goes on at once, and a sick one after a wait.
    for (before, wait) in [
        (0, Duration::ZERO),
        (2, Duration::ZERO),
        (3, WAIT),
        (9, WAIT),
    ] {
        let mut lane = lane();
        let evidence = suspects_in_row(before);
        let (state, _) = fails(
            &mut lane,
            single(1),
            &answer(400, None),
            begun(1, 0),
            evidence,
        );
        assert_eq!(waits_of(&mut lane, state), (wait, WAIT), "{before}");
    }
}

#[test]
fn a_sick_source_is_tried_more_and_more_slowly_and_one_that_refuses_still_more_so() {
    // The longest waits are 60 s and 300 s.
    for (status, longest) in [(500, 60), (404, 60), (400, 300), (401, 300)] {
        let mut lane = lane();
        let mut last = Duration::ZERO;
        for sequence in 0..20 {
            let evidence = suspects_in_row(4);
            let answer = answer(status, None);
            let failed = fails(&mut lane, single(sequence), &answer, begun(1, 0), evidence);
            let (wait, told) = waits_of(&mut lane, failed.0);
            assert!(wait >= last && told >= wait, "{status} {wait:?} {told:?}");
            last = wait;
        }
        assert_eq!(last, Duration::from_secs(longest), "{status}");
    }
}

#[test]
fn the_wait_that_an_answer_asks_for_is_kept_for_the_event_and_for_all_of_a_sick_source() {
    let asked = Duration::from_secs(120);
    let answer = answer(503, Some(120));
    for (evidence, expected) in [
        (Evidence::default(), WAIT),
        (suspects_in_row(4), asked),
        // No place is free, so no other user can pass it.
        (
            Evidence {
                set_aside: MAX_SUSPECTS,
                ..Evidence::default()
            },
            asked,
        ),
    ] {
        let mut lane = lane();
        let (state, _) = fails(&mut lane, single(1), &answer, begun(1, 0), evidence);
        assert_eq!(waits_of(&mut lane, state), (expected, asked));
        // The event itself is not tried before, whatever the lane does.
        let before = NOW.plus(asked - Duration::from_millis(1));
        let plan = lane.plan(before, &evidence);
        let alone = matches!(plan, Plan::Send(_, LeaseScope::Only(_)));
        assert!(!alone, "{plan:?}");
    }
}

#[test]
fn a_replayed_event_needs_a_new_control() {
    let mut lane = lane();
    let refusal = answer(400, None);
    let evidence = Evidence::default();
    // Refused with another event, which is taken by itself: that is the control.
    let sent = vec![single(1), single(2)];
    let (settled, _) = lane.settle(sent, ended(1, &refusal), &evidence);
    let [mut bad, mut good] = [single(1), single(2)];
    bad.record = Arc::clone(&settled.captures[0].record);
    good.record = Arc::clone(&settled.captures[1].record);
    let delivered = Answer {
        started: NOW.plus(WAIT),
        ..answer(200, None)
    };
    let _ = lane.settle(vec![good], ended(2, &delivered), &evidence);
    let alone = |lane: &mut Lane, capture: &LeasedCapture| {
        let later = Answer {
            started: NOW.plus(2 * WAIT),
            ..refusal.clone()
        };
        fails(lane, capture.clone(), &later, begun(3, 2), evidence)
    };
    let (state, finding) = alone(&mut lane, &bad);
    assert!(is_dead(state));
    assert_eq!(finding, Finding::GivenUp);
    // It comes again, with the attempts that it had.
    assert!(!is_dead(alone(&mut lane, &bad).0));
}

#[test]
fn an_event_that_expires_with_its_source_says_that_the_source_is_still_sick() {
    let mut old = single(1);
    Arc::make_mut(&mut old.record).queue_time = UnixMillis(0);
    for (sick_since, suspects, is_given_up) in [
        (Some(UnixMillis(0)), 4, true),
        (Some(NOW), 4, false),
        (None, 4, false),
        (Some(UnixMillis(0)), 0, false),
    ] {
        let evidence = Evidence {
            sick_since,
            suspects_in_row: suspects,
            ..Evidence::default()
        };
        let answer = answer(500, None);
        let (state, finding) = fails(&mut lane(), old.clone(), &answer, begun(1, 0), evidence);
        assert_eq!(is_dead(state), is_given_up);
        assert!(matches!(finding, Finding::Alone { .. }), "{finding:?}");
    }
    // The source is sick for long, and the event is young.
    let evidence = Evidence {
        sick_since: Some(UnixMillis(0)),
        ..suspects_in_row(4)
    };
    let answer = answer(500, None);
    let (state, _) = fails(&mut lane(), single(1), &answer, begun(1, 0), evidence);
    assert!(!is_dead(state));
}

#[test]
fn a_suspect_that_is_given_up_leaves_no_wait_and_no_user_behind() {
    let mut lane = lane();
    let evidence = Evidence::default();
    let fail = |lane: &mut Lane, sequence, status, request, taken| {
        let answer = answer(status, None);
        let begun = begun(request, taken);
        fails(lane, single(sequence), &answer, begun, evidence).0
    };
    fail(&mut lane, 2, 500, 1, 0);
    assert!(!is_dead(fail(&mut lane, 1, 400, 2, 0)));
    assert!(!lane.found_nothing());
    assert!(matches!(lane.plan(NOW, &evidence), Plan::RestUntil(_)));
    // The other suspect is tried, and Segment asks for fewer requests.
    for request in 3..6 {
        fail(&mut lane, 2, 429, request, 0);
    }
    assert!(is_dead(fail(&mut lane, 1, 400, 9, 8)));
    // Its user may have more.
    let plan = lane.plan(NOW, &evidence);
    assert!(
        matches!(plan, Plan::Send(_, LeaseScope::Except(_))),
        "{plan:?}"
    );
    fail(&mut lane, 3, 429, 10, 8);
    assert_eq!(waits(&mut lane, NOW), WAIT);
}

#[test]
fn where_a_refusal_was_shown_to_be_wrong_none_is_proof_for_ten_minutes() {
    for (seconds, is_given_up) in [(0, false), (599, false), (600, true)] {
        let mut lane = lane();
        let answer = answer(400, None);
        let evidence = Evidence {
            disproved: Some(UnixMillis(NOW.0 - seconds * 1_000)),
            ..Evidence::default()
        };
        fails(&mut lane, single(1), &answer, begun(1, 0), evidence);
        let (state, _) = fails(&mut lane, single(1), &answer, begun(3, 2), evidence);
        assert_eq!(is_dead(state), is_given_up, "{seconds} s");
    }
}

#[test]
fn a_refusal_is_wrong_where_all_of_its_events_are_taken_later() {
    let evidence = Evidence::default();
    let taken = Answer {
        started: NOW.plus(WAIT),
        ..answer(200, None)
    };
    for (status, wrong) in [(400, Some(1)), (402, Some(1)), (413, None), (500, None)] {
        let mut lane = lane();
        let refusal = answer(status, None);
        let sent = vec![single(1), single(2)];
        let (settled, _) = lane.settle(sent, ended(1, &refusal), &evidence);
        let again = |place: usize| LeasedCapture {
            record: Arc::clone(&settled.captures[place].record),
            ..single(if place == 0 { 1 } else { 2 })
        };
        let (_, first) = lane.settle(vec![again(0)], ended(2, &taken), &evidence);
        assert_eq!(first, Finding::Taken);
        let (_, second) = lane.settle(vec![again(1)], ended(3, &taken), &evidence);
        let expected = wrong.map_or(Finding::Taken, Finding::TakenAfterAll);
        assert_eq!(second, expected, "{status}");
    }
    // The same of one that was refused alone.
    let mut lane = lane();
    fails(
        &mut lane,
        single(1),
        &answer(400, None),
        begun(7, 0),
        evidence,
    );
    let plan = lane.plan(NOW.plus(WAIT), &evidence);
    assert!(matches!(plan, Plan::Send(_, LeaseScope::Only(_))));
    let (_, finding) = lane.settle(vec![single(1)], ended(8, &taken), &evidence);
    assert_eq!(finding, Finding::TakenAfterAll(7));
}

#[test]
fn a_suspect_waits_longer_each_time_and_its_lane_does_not() {
    let mut lane = lane();
    let evidence = Evidence::default();
    for request in 1..4 {
        fails(
            &mut lane,
            single(9),
            &answer(429, None),
            begun(request, 0),
            evidence,
        );
    }
    for seconds in [0.5, 1.0, 2.0, 4.0] {
        let answer = answer(500, None);
        let (state, _) = fails(&mut lane, single(1), &answer, begun(9, 0), evidence);
        let own = Duration::from_secs_f64(seconds);
        assert_eq!(waits_of(&mut lane, state), (WAIT, own));
    }
    // What failed before the suspect did is forgotten.
    fails(
        &mut lane,
        single(9),
        &answer(429, None),
        begun(10, 0),
        evidence,
    );
    assert_eq!(waits(&mut lane, NOW), WAIT);
}
