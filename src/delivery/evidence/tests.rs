use super::*;

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

fn lane(shard: u16) -> LaneKey {
    LaneKey {
        integration_id: IntegrationId::new("acme").expect("valid"),
        region: Region::Eu,
        shard,
    }
}

fn suspect(kind: FaultKind) -> Finding {
    Finding::Alone {
        kind,
        is_new: true,
        is_passed: false,
    }
}

#[test]
fn suspects_in_a_row_make_the_source_sick_and_one_success_cures_it() {
    let sources = Sources::new(Duration::from_secs(300));
    for shard in 0..4 {
        assert!(!sources.evidence(&lane(0)).is_sick());
        let request = sources.begin(&lane(shard), "one").request;
        let finding = suspect(FaultKind::Final);
        sources.note(&lane(shard), request, finding, 1, NOW);
    }
    let evidence = sources.evidence(&lane(0));
    assert!(evidence.is_sick());
    assert_eq!((evidence.set_aside, evidence.refused), (3, Some(4)));
    assert_eq!(evidence.sick_since, Some(NOW));
    assert_eq!(
        sources.condition(&lane(0).integration_id),
        Condition::Suspended
    );
    let request = sources.begin(&lane(1), "one").request;
    let change = sources.note(&lane(1), request, Finding::Taken, 0, NOW);
    assert!(change.recovered);
    let evidence = sources.evidence(&lane(0));
    assert!(!evidence.is_sick());
    assert_eq!((evidence.taken, evidence.sick_since), (Some(5), None));
}

#[test]
fn evidence_holds_for_one_key_and_one_source() {
    let sources = Sources::new(Duration::from_secs(300));
    let request = sources.begin(&lane(0), "one").request;
    sources.note(&lane(0), request, Finding::Taken, 0, NOW);
    assert_eq!(sources.evidence(&lane(2)).taken, Some(1));
    let mut elsewhere = lane(0);
    elsewhere.region = Region::NonEu;
    assert_eq!(sources.evidence(&elsewhere).taken, None);
    let begun = sources.begin(&lane(2), "two");
    assert_eq!((begun.request, begun.taken), (2, None));
    assert_eq!(sources.evidence(&lane(0)).taken, None);
}

/// A request of a lane that ends with a finding and so many suspects of the lane.
fn found(sources: &Sources, shard: u16, finding: Finding, set_aside: usize) -> Change {
    let request = sources.begin(&lane(shard), "one").request;
    sources.note(&lane(shard), request, finding, set_aside, NOW)
}

#[test]
fn a_request_knows_what_was_taken_before_it_began() {
    let sources = Sources::new(Duration::from_secs(300));
    let early = sources.begin(&lane(0), "one");
    let late = sources.begin(&lane(1), "one");
    assert_eq!((early.request, late.request), (1, 2));
    sources.note(&lane(1), late.request, Finding::Taken, 0, NOW);
    // The one that began first ends last.
    sources.note(&lane(0), early.request, Finding::Taken, 0, NOW);
    let next = sources.begin(&lane(0), "one");
    assert_eq!((next.request, next.taken), (3, Some(2)));
    assert_eq!((late.taken, early.taken), (None, None));
}

#[test]
fn refusals_count_for_all_lanes_but_those_of_several_events_for_others_alone() {
    for (finding, own, others) in [
        (suspect(FaultKind::Final), Some(1), Some(1)),
        (suspect(FaultKind::Key), Some(1), Some(1)),
        (Finding::Together(FaultKind::Final), None, Some(1)),
        (Finding::Together(FaultKind::Key), None, Some(1)),
        (suspect(FaultKind::Transient), None, None),
        (suspect(FaultKind::Misrouted), None, None),
        (Finding::Together(FaultKind::TimedOut), None, None),
        (Finding::GivenUp, None, None),
        (Finding::Held, None, None),
        (Finding::Nothing, None, None),
        (Finding::Taken, None, None),
    ] {
        let sources = Sources::new(Duration::from_secs(300));
        found(&sources, 0, finding, 0);
        let refused = |shard| sources.evidence(&lane(shard)).refused;
        assert_eq!((refused(0), refused(1)), (own, others), "{finding:?}");
    }
}

#[test]
fn suspects_of_other_lanes_are_counted_until_they_are_gone() {
    let sources = Sources::new(Duration::from_secs(300));
    found(&sources, 0, suspect(FaultKind::Transient), 3);
    found(&sources, 1, Finding::Taken, 2);
    let others = |shard| sources.evidence(&lane(shard)).set_aside;
    assert_eq!([0, 1, 2].map(others), [2, 3, 5]);
    found(&sources, 0, Finding::Taken, 1);
    assert_eq!(others(2), 3);
    let _ = sources.emptied(&lane(1));
    assert_eq!(others(2), 1);
}

#[test]
fn a_recovery_is_the_first_success_of_a_sick_source() {
    let sources = Sources::new(Duration::from_secs(300));
    let recoveries = || sources.evidence(&lane(3)).recoveries;
    for expected in 0..3 {
        assert_eq!(recoveries(), expected);
        for _ in 0..4 {
            found(&sources, 0, suspect(FaultKind::Transient), 1);
            // Known suspects make nothing worse.
            let known = Finding::Alone {
                kind: FaultKind::Transient,
                is_new: false,
                is_passed: false,
            };
            assert!(!found(&sources, 0, known, 1).recovered);
        }
        assert!(found(&sources, 1, Finding::Taken, 0).recovered);
        assert!(!found(&sources, 2, Finding::Taken, 0).recovered);
        // Three suspects are not enough, however often they fail.
        for shard in 0..3 {
            found(&sources, shard, suspect(FaultKind::Final), 1);
        }
        found(&sources, 0, Finding::GivenUp, 0);
        assert!(!sources.evidence(&lane(0)).is_sick());
        assert!(!found(&sources, 2, Finding::Taken, 0).recovered);
    }
}

#[test]
fn a_source_is_sick_from_its_first_failure_that_is_no_events_fault() {
    let sources = Sources::new(Duration::from_secs(300));
    let sick_since = || sources.evidence(&lane(0)).sick_since;
    let later = |seconds| NOW.plus(Duration::from_secs(seconds));
    let note = |finding, seconds| {
        let request = sources.begin(&lane(0), "one").request;
        sources.note(&lane(0), request, finding, 0, later(seconds));
        sick_since()
    };
    assert_eq!(note(Finding::Together(FaultKind::Transient), 0), None);
    assert_eq!(note(Finding::Held, 1), Some(later(1)));
    assert_eq!(note(Finding::Held, 2), Some(later(1)));
    assert_eq!(note(Finding::Taken, 3), None);
    assert_eq!(note(Finding::Held, 4), Some(later(4)));
    // It answers again, and what failed may be an event's fault.
    assert_eq!(note(suspect(FaultKind::Transient), 5), None);
    for seconds in 6..8 {
        assert_eq!(note(suspect(FaultKind::Transient), seconds), None);
    }
    assert_eq!(note(suspect(FaultKind::Transient), 8), Some(later(8)));
    assert_eq!(note(suspect(FaultKind::Transient), 9), Some(later(8)));
}

#[test]
fn a_wrong_refusal_is_remembered_until_the_integration_changes() {
    let sources = Sources::new(Duration::from_secs(300));
    let disproved = || sources.evidence(&lane(3)).disproved;
    found(&sources, 0, Finding::Taken, 0);
    assert_eq!(disproved(), None);
    found(&sources, 0, Finding::TakenAfterAll(1), 0);
    assert_eq!(disproved(), Some(NOW));
    let request = sources.begin(&lane(0), "two").request;
    assert_eq!(disproved(), None);
    // It was refused with another key.
    sources.note(&lane(0), request, Finding::TakenAfterAll(2), 0, NOW);
    assert_eq!(disproved(), None);
    sources.note(&lane(0), request, Finding::TakenAfterAll(request), 0, NOW);
    assert_eq!(disproved(), Some(NOW));
}
