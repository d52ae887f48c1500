//! Several relays on one database: one holder for each lane, exact counts, no lost update.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::{join, join_all};

use super::{PostgresRig, open, options};
use crate::{
    event::EventType,
    outbox::{
        DeadLetterFilter, Erasure, Outbox, OutboxError, PostgresOutbox, Selection, SubjectQuery,
        Submitted,
        conformance::{
            self, NOW, id, lane, lease, new_capture, settle, skipped, submit, submit_one, taken,
            user_of,
        },
    },
    proto::{DeliveryReason, ErasureReceipt, Integration},
    status::{Outcome, State},
};

const EXPIRED: Outcome = Outcome::DeadLetter {
    reason: DeliveryReason::Expired,
};

/// Of two relays the one that delivers an integration, and the other.
async fn two(rig: &PostgresRig, name: &str) -> (PostgresOutbox, PostgresOutbox) {
    let (one, other) = (rig.relay().await, rig.relay().await);
    // Both know of each other after a heartbeat.
    loop {
        let prefers = |relay: &PostgresOutbox| {
            let session = relay.databases[0].session().expect("registered");
            let live = session.relays().live.len();
            (live == 2).then(|| session.prefers(name))
        };
        match (prefers(&one), prefers(&other)) {
            (Some(true), Some(false)) => return (one, other),
            (Some(false), Some(true)) => return (other, one),
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Leases as soon as the lane is this relay's.
async fn lease_soon(outbox: &PostgresOutbox, name: &str) -> Vec<crate::outbox::LeasedCapture> {
    for _ in 0..400 {
        let leased = lease(outbox, name, 100).await;
        if !leased.is_empty() {
            return leased;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the lane was never leased");
}

#[tokio::test]
async fn a_pair_that_is_replayed_event_by_event_at_two_relays_is_delivered_and_so_is_the_rest() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let (holder, other) = two(&rig, "acme").await;
    submit_one(&holder, "acme", "a").await;
    let leased = lease_soon(&holder, "acme").await;
    settle(&holder, leased, |_, _| EXPIRED).await;
    let letters = other.dead_letters(DeadLetterFilter::default(), 0, 10).await;
    let letters = letters.expect("listed");
    assert_eq!(letters.len(), 2);
    let replay = async |relay: &PostgresOutbox, letter: usize| {
        let ids = vec![letters[letter].id];
        let selection = Selection::Ids {
            ids,
            integrations: None,
        };
        relay.replay(selection, NOW).await
    };
    assert_eq!(taken(replay(&holder, 0).await), 1);
    // On its way while the other event is replayed.
    let identify = lease_soon(&holder, "acme").await;
    assert!(identify[0].identify.is_some() && identify[0].track.is_none());
    assert_eq!(taken(replay(&other, 1).await), 1);
    assert_eq!(taken(replay(&other, 1).await), 0);
    settle(&holder, identify, |_, _| Outcome::Delivered).await;
    let found = holder.find(&id("acme"), "a").await.expect("read");
    let found = found.expect("there");
    assert!(matches!(found.identify.state, State::Delivered { .. }));
    // Not what the lane had known of it.
    assert_eq!(found.track.state, State::Queued);
    submit_one(&other, "acme", "b").await;
    let rest = lease_soon(&holder, "acme").await;
    // Live captures before replayed ones.
    assert_eq!(conformance::ids(&rest), ["b", "a"]);
    assert!(rest[1].identify.is_none() && rest[1].track.is_some());
    settle(&holder, rest, |_, _| Outcome::Delivered).await;
    for relay in [&holder, &other] {
        assert_eq!(relay.waiting_lanes().await, Ok(Vec::new()));
        assert_eq!(relay.backlog(&id("acme")).await.expect("read").events, 0);
    }
}

#[tokio::test]
async fn of_two_relays_that_take_a_skipped_capture_anew_one_has_it_sent() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let (holder, other) = two(&rig, "acme").await;
    for round in 0..20 {
        let capture_id = &format!("c-{round}");
        submit(&holder, vec![skipped(capture_id, 9)]).await;
        let send = async |relay: &PostgresOutbox, content| {
            let capture = new_capture("acme", capture_id, content);
            submit(relay, vec![skipped(capture_id, content), capture]).await
        };
        let (one, two) = join(send(&holder, round % 2), send(&other, 0)).await;
        let queued = [&one[1], &two[1]].map(|answer| match answer {
            Submitted::Accepted(record) => !record.is_final(),
            _ => false,
        });
        assert_eq!(queued.iter().filter(|queued| **queued).count(), 1);
    }
    let backlog = holder.backlog(&id("acme")).await.expect("read");
    assert_eq!(backlog.events, 40);
    assert_eq!(lease_soon(&holder, "acme").await.len(), 20);
}

#[tokio::test]
async fn replays_and_discards_at_two_relays_at_once_count_each_dead_letter_once() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let (holder, other) = two(&rig, "acme").await;
    let captures = (0..40).map(|number| new_capture("acme", &format!("c-{number}"), 0));
    submit(&holder, captures.collect()).await;
    let leased = lease_soon(&holder, "acme").await;
    assert_eq!(leased.len(), 40);
    settle(&holder, leased, |_, _| EXPIRED).await;
    let all = || Selection::Filter(DeadLetterFilter::default());
    let (replayed, discarded) = join(holder.replay(all(), NOW), other.discard(all())).await;
    let replayed = taken(replayed);
    let discarded = discarded.expect("done").events();
    assert_eq!(replayed + discarded, 80);
    let backlog = holder.backlog(&id("acme")).await.expect("read");
    assert_eq!(backlog.events, replayed);
    if replayed > 0 {
        let leased = lease_soon(&holder, "acme").await;
        let events: u32 = leased
            .iter()
            .map(crate::outbox::LeasedCapture::event_count)
            .sum();
        assert_eq!(u64::from(events), replayed);
        settle(&holder, leased, |_, _| Outcome::Delivered).await;
    }
    assert_eq!(holder.waiting_lanes().await, Ok(Vec::new()));
}

#[tokio::test]
async fn an_erasure_at_one_relay_waits_for_the_request_of_another_and_nothing_is_sent_later() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let (holder, other) = two(&rig, "acme").await;
    submit_one(&holder, "acme", "ann-1").await;
    let in_flight = lease_soon(&holder, "acme").await;
    submit_one(&holder, "acme", "ann-2").await;
    let subject = SubjectQuery {
        user_ids: vec![user_of("ann")],
        integration_id: None,
    };
    let found = other.find_subject(subject.clone()).await.expect("found");
    assert_eq!((found.captures.len(), found.lanes), (2, vec![lane("acme")]));
    let erasure = Erasure {
        subject,
        captures: found.captures,
        receipt: ErasureReceipt::default(),
    };
    let erased = async {
        let receipt = Outbox::erase(&other, erasure).await.expect("erased");
        (receipt, Instant::now())
    };
    let request = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        // No new request begins meanwhile.
        assert!(lease(&holder, "acme", 10).await.is_empty());
        let ended = Instant::now();
        settle(&holder, in_flight, |_, _| Outcome::Delivered).await;
        ended
    };
    let ((receipt, erased), ended) = join(erased, request).await;
    assert!(erased > ended, "erased while a request was under way");
    assert_eq!((receipt.waiting_event_count, receipt.attempt_count), (2, 1));
    assert!(lease(&holder, "acme", 10).await.is_empty());
    assert_eq!(holder.waiting_lanes().await, Ok(Vec::new()));
}

#[tokio::test]
async fn a_lease_keeps_its_own_length_and_whoever_lost_it_settles_nothing() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let slow = crate::outbox::PostgresOptions {
        request_timeout: Duration::from_secs(3),
        ..options()
    };
    let paused = open(&rig.connection(), slow, &rig.vault).await;
    submit_one(&paused, "acme", "a").await;
    let leased = lease_soon(&paused, "acme").await;
    let begun = Instant::now();
    // It stands still: its heartbeats end, and another relay prefers its lanes.
    let database = &paused.databases[0];
    let relay = database.session().expect("registered").relay;
    let connection = database.call().await.expect("connected");
    let gone = format!("UPDATE relays SET expires = now() - interval '1 s' WHERE relay = {relay}");
    let next = rig.relay().await;
    let taken = loop {
        connection.batch_execute(&gone).await.expect("done");
        let taken = lease(&next, "acme", 10).await;
        if !taken.is_empty() {
            break taken;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    // The lease of the first one: its request's time-out and three seconds, although the
    // other has a shorter one.
    assert!(
        begun.elapsed() > Duration::from_millis(5_500),
        "{:?}",
        begun.elapsed()
    );
    assert!(!paused.may_send(&lane("acme")));
    assert!(next.may_send(&lane("acme")));
    settle(&paused, leased, |_, _| EXPIRED).await;
    assert_eq!(
        next.dead_letters(DeadLetterFilter::default(), 0, 10).await,
        Ok(Vec::new())
    );
    settle(&next, taken, |_, _| Outcome::Delivered).await;
    let found = paused
        .find(&id("acme"), "a")
        .await
        .expect("read")
        .expect("there");
    assert_eq!(found.attempts.len(), 1);
    assert!(matches!(found.track.state, State::Delivered { .. }));
}

#[tokio::test]
async fn the_same_captures_at_three_relays_at_once_are_stored_once() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let relays = [rig.relay().await, rig.relay().await, rig.relay().await];
    let calls = (0..30).map(|call| {
        let relay = &relays[call % 3];
        // In other orders, which must not block each other.
        let mut numbers: Vec<usize> = (0..10).collect();
        numbers.rotate_left(call % 10);
        let captures = numbers.into_iter();
        let captures = captures.map(|number| new_capture("acme", &format!("c-{number}"), 0));
        submit(relay, captures.collect())
    });
    let answers: Vec<Submitted> = join_all(calls).await.into_iter().flatten().collect();
    let accepted = answers.iter().filter_map(|answer| match answer {
        Submitted::Accepted(record) => Some(record.capture_id.clone()),
        Submitted::Duplicate(_) => None,
        other => panic!("{other:?}"),
    });
    let accepted: Vec<String> = accepted.collect();
    assert_eq!(accepted.len(), 10);
    assert_eq!(accepted.iter().collect::<HashSet<_>>().len(), 10);
    assert_eq!(
        relays[0].backlog(&id("acme")).await.expect("read").events,
        20
    );
}

#[tokio::test]
async fn a_change_of_an_integration_holds_for_what_other_relays_accept_from_then_on() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let (one, other) = (rig.relay().await, rig.relay().await);
    let spec = |etag: &str| Integration {
        integration_id: "acme".into(),
        etag: etag.into(),
        ..Integration::default()
    };
    one.put_integration(spec("1"), None).await.expect("stored");
    // Right after its creation, at another relay.
    let found = Outbox::integration(&other, &id("acme")).await;
    assert_eq!(found, Ok(Some(spec("1"))));
    let formed = |etag: &str, capture: &str| crate::outbox::NewCapture {
        revision: crate::integration::revision_number(etag),
        ..new_capture("acme", capture, 0)
    };
    let answers = submit(&other, vec![formed("1", "a")]).await;
    assert!(matches!(answers[0], Submitted::Accepted(_)));
    let changed = one.put_integration(spec("2"), Some("1".into())).await;
    changed.expect("stored");
    let old = vec![formed("1", "b"), formed("2", "c"), formed("1", "a")];
    let answers = submit(&other, old).await;
    assert_eq!(answers[0], Submitted::Stale);
    assert!(matches!(answers[1], Submitted::Accepted(_)));
    // A repetition forms no events.
    assert!(matches!(answers[2], Submitted::Duplicate(_)));
    assert_eq!(other.find(&id("acme"), "b").await, Ok(None));
    let late = other.put_integration(spec("3"), Some("1".into())).await;
    assert_eq!(late, Err(OutboxError::Changed(id("acme"))));
    one.delete_integration(&id("acme"), "2".into())
        .await
        .expect("deleted");
    let answers = submit(&other, vec![formed("2", "d")]).await;
    assert_eq!(answers[0], Submitted::Stale);
    assert_eq!(Outbox::integration(&other, &id("acme")).await, Ok(None));
    // What waits of it still does, to be given up.
    assert_eq!(other.backlog(&id("acme")).await.expect("read").events, 4);
}

#[tokio::test]
async fn what_is_older_than_ids_are_remembered_goes_and_what_waits_or_is_dead_stays() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    for capture in ["delivered", "dead", "waits"] {
        submit_one(&outbox, "acme", capture).await;
    }
    let leased = lease(&outbox, "acme", 4).await;
    settle(&outbox, leased, |capture, _| match capture {
        "dead" => EXPIRED,
        _ => Outcome::Delivered,
    })
    .await;
    let database = Arc::clone(&outbox.databases[0]);
    let connection = database.call().await.expect("connected");
    let aged = "UPDATE captures SET stored_at = now() - interval '2 hours'";
    connection.batch_execute(aged).await.expect("done");
    submit_one(&outbox, "acme", "new").await;
    let mut after = 0;
    while database.forget_piece(&mut after).await.expect("done") {}
    let known = async |capture: &str| {
        let found = outbox.find(&id("acme"), capture).await;
        found.expect("read").is_some()
    };
    assert!(!known("delivered").await);
    for capture in ["dead", "waits", "new"] {
        assert!(known(capture).await, "{capture}");
    }
    let letters = outbox
        .dead_letters(DeadLetterFilter::default(), 0, 10)
        .await;
    let events: Vec<EventType> = letters
        .expect("listed")
        .iter()
        .map(|one| one.event)
        .collect();
    assert_eq!(events, EventType::ALL);
}

#[tokio::test]
async fn dead_rows_of_the_queue_are_vacuumed_before_leases_have_to_pass_over_many() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    let database = Arc::clone(&outbox.databases[0]);
    let connection = database.call().await.expect("connected");
    let come_and_go = "
        ALTER TABLE queue SET (autovacuum_enabled = false);
        INSERT INTO queue (lane, replayed, seq, identify_bytes, track_bytes)
            SELECT 8, false, n, 0, 0 FROM generate_series(1, 60000) AS n;
        DELETE FROM queue";
    connection.batch_execute(come_and_go).await.expect("done");
    // The statistics are told a moment later; the relay's own maintenance may be faster.
    let vacuumed = async {
        const COUNT: &str = "SELECT pg_stat_get_vacuum_count('queue'::regclass)";
        let mut kept = 0;
        loop {
            database.vacuum_queue(&mut kept).await.expect("done");
            let count: i64 = connection.row(COUNT, &[]).await.expect("read").get(0);
            if count > 0 {
                return kept;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let vacuumed = tokio::time::timeout(Duration::from_secs(30), vacuumed).await;
    let kept = vacuumed.expect("vacuumed");
    assert!(kept < 60_000, "{kept} dead rows are kept");
}
