//! Calls that end in the middle: an answer is lost, a removal fails. The next call goes on.

use super::{
    chunks::{NAME, count, has_payload, submit_together, try_erase, waiting},
    *,
};
use crate::{
    outbox::{
        LeaseBudget,
        conformance::{id, ids, lease, settle, settlement},
        jetstream::wire::{ToStore, faults::Fault},
    },
    status::{Outcome, State},
    time::UnixMillis,
};

fn later() -> Outcome {
    Outcome::Retry {
        reason: DeliveryReason::Timeout,
        next_attempt: UnixMillis(0),
    }
}

#[tokio::test]
async fn an_erasure_that_failed_anywhere_sends_nothing_and_is_finished_by_the_next_call() {
    let mut failed = Vec::new();
    for fault in [Fault::LostAnswer, Fault::Delete, Fault::Purge] {
        for after in 0..3 {
            let Some(rig) = JetStreamRig::new(1) else {
                return;
            };
            let outbox = rig.relay().await;
            submit_together(&outbox, &["ann-1", "bob-1", "cid-1"]).await;
            // An earlier erasure has changed the same message.
            try_erase(&outbox, "cid").await.expect("erased");
            outbox.0.wire.faults.plant(fault, after);
            let erased = try_erase(&outbox, "ann").await;
            outbox.0.wire.faults.clear();
            if erased.is_err() {
                failed.push(fault);
            }
            // Nothing of hers is sent after the answer, whatever it was, if anything was erased.
            let leased = lease(&outbox, NAME, 10).await;
            let found = outbox.find(&id(NAME), "ann-1").await.expect("read");
            if found.expect("known").is_final() {
                assert_eq!(
                    ids(&leased),
                    ["bob-1"],
                    "{fault:?} after {after}: {erased:?}"
                );
            }
            settle(&outbox, leased, |_, _| later()).await;
            try_erase(&outbox, "ann").await.expect("erased");
            assert!(
                !has_payload(&outbox, "ann-1").await,
                "{fault:?} after {after}"
            );
            assert!(has_payload(&outbox, "bob-1").await);
            assert_eq!(count(&outbox, 'q').await, 1, "{fault:?} after {after}");
            assert_eq!(waiting(&outbox).await, 2, "{fault:?} after {after}");
            let subject = SubjectQuery {
                user_ids: vec![conformance::user_of("ann")],
                integration_id: None,
            };
            let left = outbox.find_subject(subject).await.expect("found");
            assert_eq!(left.captures, [0; 0], "{fault:?} after {after}");
            let leased = lease(&outbox, NAME, 10).await;
            assert_eq!(ids(&leased), ["bob-1"]);
            settle(&outbox, leased, |_, _| Outcome::Delivered).await;
            assert!(lease(&outbox, NAME, 10).await.is_empty());
            assert_eq!((waiting(&outbox).await, count(&outbox, 'q').await), (0, 0));
        }
    }
    for fault in [Fault::LostAnswer, Fault::Delete, Fault::Purge] {
        assert!(failed.contains(&fault), "{fault:?} never struck an erasure");
    }
}

#[tokio::test]
async fn a_settlement_whose_answer_was_lost_is_settled_again_and_counted_once() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    submit_together(&outbox, &["a", "b", "c", "dan", "e"]).await;
    // Behind what is settled now, so that counts go on beyond the cursor.
    try_erase(&outbox, "dan").await.expect("erased");
    assert_eq!(waiting(&outbox).await, 8);
    let leased = lease(&outbox, NAME, 4).await;
    assert_eq!(ids(&leased), ["a", "b"]);
    let settlement = settlement(leased, |_, _| Outcome::Delivered);
    outbox.0.wire.faults.plant(Fault::LostAnswer, 0);
    let lost = outbox.settle(Arc::clone(&settlement)).await;
    assert!(lost.is_err(), "{lost:?}");
    outbox.settle(settlement).await.expect("settled");
    assert_eq!(waiting(&outbox).await, 4);
    for capture in ["a", "b"] {
        let found = outbox.find(&id(NAME), capture).await.expect("read");
        let found = found.expect("known");
        assert!(matches!(found.track.state, State::Delivered { .. }));
        assert_eq!(found.attempts.len(), 1);
    }
    let leased = lease(&outbox, NAME, 10).await;
    assert_eq!(ids(&leased), ["c", "e"]);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert!(lease(&outbox, NAME, 10).await.is_empty());
    assert_eq!((waiting(&outbox).await, count(&outbox, 'q').await), (0, 0));
}

#[tokio::test]
async fn many_messages_that_stand_in_the_place_of_others_keep_their_order() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    let mut wanted = Vec::new();
    for number in 0..20 {
        let (ann, bob) = (format!("ann-{number}"), format!("bob-{number}"));
        submit_together(&outbox, &[&ann, &bob]).await;
        wanted.push(bob);
    }
    submit_together(&outbox, &["cid"]).await;
    wanted.push("cid".to_owned());
    let receipt = try_erase(&outbox, "ann").await.expect("erased");
    assert_eq!(receipt.waiting_event_count, 40);
    let leased = lease(&outbox, NAME, 100).await;
    assert_eq!(ids(&leased), wanted);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert!(lease(&outbox, NAME, 10).await.is_empty());
    assert_eq!((waiting(&outbox).await, count(&outbox, 'q').await), (0, 0));
}

#[tokio::test]
async fn a_replica_that_is_behind_does_not_hide_what_comes_before_an_erasure() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    submit_together(&outbox, &["a", "b"]).await;
    submit_together(&outbox, &["dan", "e"]).await;
    try_erase(&outbox, "dan").await.expect("erased");
    outbox.0.wire.faults.plant(Fault::Behind, 0);
    let leased = lease(&outbox, NAME, 10).await;
    assert_eq!(ids(&leased), ["a", "b", "e"]);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert!(lease(&outbox, NAME, 10).await.is_empty());
    assert_eq!((waiting(&outbox).await, count(&outbox, 'q').await), (0, 0));
}

#[tokio::test]
async fn a_message_that_cannot_be_read_stays_and_only_its_lane_waits() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    submit_together(&outbox, &["a"]).await;
    let shared = &outbox.0;
    let lane = conformance::lane(NAME);
    let unreadable = ToStore {
        subject: shared.layout.chunk(&lane, 0, 1),
        payload: bytes::Bytes::from_static(b"\xff\xff\xff"),
        expected: None,
        keep: None,
    };
    shared.wire.store(vec![unreadable]).await.expect("stored");
    submit_together(&outbox, &["b"]).await;
    conformance::submit_one(&outbox, "other", "c").await;
    let budget = LeaseBudget {
        max_events: 10,
        max_bytes: 10_000,
    };
    let leased = Outbox::lease(&outbox, &lane, budget).await;
    let error = leased.expect_err("it is in the middle").to_string();
    assert!(error.contains("a damaged chunk in JetStream"), "{error}");
    assert_eq!(count(&outbox, 'q').await, 4);
    assert_eq!(ids(&lease(&outbox, "other", 10).await), ["c"]);
}

#[tokio::test]
async fn two_relays_that_erase_in_the_same_lanes_do_not_wait_for_each_other_for_good() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let (one, other) = (rig.relay().await, rig.relay().await);
    for number in 0..4 {
        let name = format!("acme-{number}");
        for capture in ["ann-1", "bob-1"] {
            conformance::submit_one(&one, &name, capture).await;
        }
    }
    let (ann, bob) = tokio::join!(try_erase(&one, "ann"), try_erase(&other, "bob"));
    assert_eq!(ann.expect("erased").waiting_event_count, 8);
    assert_eq!(bob.expect("erased").waiting_event_count, 8);
}
