//! What was given up: kept, listed, replayed and discarded.

use super::*;

pub(crate) async fn dead_letters_keep_their_payload_and_delivered_events_do_not(rig: &impl Rig) {
    let outbox = rig.open().await;
    let outbox = outbox.as_ref();
    submit_one(outbox, "acme", "a").await;
    let leased = lease(outbox, "acme", 10).await;
    settle(outbox, leased.clone(), |_, event| match event {
        EventType::Identify => Outcome::Delivered,
        EventType::Track => Outcome::DeadLetter {
            reason: DeliveryReason::PayloadRejected,
        },
    })
    .await;
    // A late answer to the same lease changes nothing.
    settle(outbox, leased, |_, _| Outcome::Delivered).await;
    let found = outbox
        .find(&id("acme"), "a")
        .await
        .expect("read")
        .expect("remembered");
    assert!(matches!(found.track.state, State::DeadLettered { .. }));
    assert_eq!(found.identify.attempt_count, 1);
    assert_eq!(outbox.backlog(&id("acme")).await, Ok(Backlog::default()));
    outbox.close().await;
}

pub(crate) async fn dead_letters_are_listed_replayed_behind_live_captures_and_discarded(
    rig: &impl Rig,
) {
    let outbox = rig.open().await;
    let outbox = outbox.as_ref();
    let all = || Selection::Filter(DeadLetterFilter::default());
    submit_one(outbox, "acme", "a").await;
    submit_one(outbox, "acme", "b").await;
    let reason = DeliveryReason::RequestRejected;
    let leased = lease(outbox, "acme", 10).await;
    settle(outbox, leased, |_, _| Outcome::DeadLetter { reason }).await;
    let letters = outbox
        .dead_letters(DeadLetterFilter::default(), 0, 10)
        .await
        .expect("listed");
    let names: Vec<_> = letters
        .iter()
        .map(|l| (l.record.capture_id.as_str(), l.event.name()))
        .collect();
    assert_eq!(
        names,
        [
            ("a", "identify"),
            ("a", "track"),
            ("b", "identify"),
            ("b", "track")
        ]
    );
    let after = outbox
        .dead_letters(DeadLetterFilter::default(), letters[1].id, 1)
        .await;
    assert_eq!(after.expect("listed"), letters[2..3]);
    let other = DeadLetterFilter {
        reason: Some(DeliveryReason::Expired),
        ..Default::default()
    };
    assert_eq!(outbox.dead_letters(other, 0, 10).await, Ok(Vec::new()));
    let count = outbox
        .count_dead_letters(all(), UnixMillis(NOW.0 + 1))
        .await
        .expect("counted");
    assert_eq!((count.events, count.older), (4, 4));

    submit_one(outbox, "acme", "live").await;
    let first = Selection::Ids {
        ids: vec![letters[0].id, letters[1].id],
        integrations: None,
    };
    let replayed = outbox
        .replay(first, NOW)
        .await
        .expect("done")
        .expect("room");
    assert_eq!(replayed.each().collect::<Vec<_>>(), [("acme", 2)]);
    let leased = lease(outbox, "acme", 10).await;
    assert_eq!(ids(&leased), ["live", "a"]);
    assert_eq!(leased[1].record.identify.state, State::Queued);
    assert_eq!(
        leased[1].identify.as_deref(),
        Some(&b"{\"identify\":\"a\"}"[..])
    );
    let discarded = outbox.discard(all()).await.expect("done");
    assert_eq!(discarded.each().collect::<Vec<_>>(), [("acme", 2)]);
    assert_eq!(outbox.discard(all()).await, Ok(Taken::default()));
    assert_eq!(
        outbox
            .dead_letters(DeadLetterFilter::default(), 0, 10)
            .await,
        Ok(Vec::new())
    );
    outbox.close().await;
}

pub(crate) async fn ids_of_dead_letters_never_come_again(rig: &impl Rig) {
    let mut seen = Vec::new();
    for round in ["a", "b", "c"] {
        // Each time after all others have been discarded and the outbox was opened again.
        let outbox = rig.open().await;
        let outbox = outbox.as_ref();
        submit_one(outbox, "acme", round).await;
        let reason = DeliveryReason::PayloadRejected;
        let leased = lease(outbox, "acme", 10).await;
        settle(outbox, leased, |_, _| Outcome::DeadLetter { reason }).await;
        let listed = outbox.dead_letters(DeadLetterFilter::default(), 0, 10);
        let ids: Vec<i64> = listed.await.expect("listed").iter().map(|l| l.id).collect();
        assert_eq!(ids.len(), 2);
        let fresh = ids.iter().all(|id| seen.iter().all(|seen| id > seen));
        assert!(fresh, "{ids:?} after {seen:?}");
        // What was discarded and is discarded again finds no other.
        let again = |ids: &[i64]| Selection::Ids {
            ids: ids.to_vec(),
            integrations: None,
        };
        assert_eq!(outbox.discard(again(&seen)).await, Ok(Taken::default()));
        let discarded = outbox.discard(again(&ids)).await.expect("done");
        assert_eq!(discarded.events(), 2);
        seen.extend(ids);
        outbox.close().await;
    }
}
