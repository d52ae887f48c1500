//! What a lease takes.

use super::*;

pub(crate) async fn a_pair_is_split_only_where_one_event_is_asked_for(rig: &impl Rig) {
    let outbox = rig.open().await;
    let outbox = outbox.as_ref();
    submit(
        outbox,
        vec![new_capture("acme", "a", 0), new_capture("acme", "b", 0)],
    )
    .await;
    assert_eq!(ids(&lease(outbox, "acme", 3).await), ["a"]);
    let single = lease(outbox, "acme", 1).await;
    assert!(single[0].identify.is_some() && single[0].track.is_none());
    settle(outbox, single, |_, _| Outcome::Delivered).await;
    let rest = lease(outbox, "acme", 1).await;
    assert_eq!(ids(&rest), ["a"]);
    assert!(rest[0].identify.is_none() && rest[0].track.is_some());
    outbox.close().await;
}

pub(crate) async fn a_lease_keeps_to_its_bytes_but_always_makes_progress(rig: &impl Rig) {
    let outbox = rig.open().await;
    let outbox = outbox.as_ref();
    submit(
        outbox,
        vec![new_capture("acme", "a", 0), new_capture("acme", "b", 0)],
    )
    .await;
    for (max_bytes, expected) in [(1, 1), (62, 2), (61, 1)] {
        let budget = LeaseBudget {
            max_events: 100,
            max_bytes,
        };
        // {"identify":"a"} and {"track":"a"} with their commas have 31 bytes.
        let leased = outbox
            .lease(&lane("acme"), budget, LeaseScope::All)
            .await
            .expect("leased");
        assert_eq!(leased.len(), expected, "{max_bytes}");
    }
    outbox.close().await;
}

pub(crate) async fn a_lease_keeps_to_its_users(rig: &impl Rig) {
    let outbox = rig.open().await;
    let new = ["a-1", "b-1", "a-2", "c-1"].map(|capture| {
        let mut new = new_capture("acme", capture, 0);
        if let Content::Send { events, .. } = &mut new.content {
            let event = format!(r#"{{"userId":"{}"}}"#, user_of(capture)).into_bytes();
            events.identify.clone_from(&event);
            events.track = event;
        }
        new
    });
    submit(outbox.as_ref(), new.into()).await;
    let all = async |outbox: &dyn Outbox| {
        for (scope, max_events, expected) in [
            (LeaseScope::Only(user_of("a")), 10, vec!["a-1", "a-2"]),
            (LeaseScope::Only(user_of("a")), 1, vec!["a-1"]),
            (LeaseScope::Only(user_of("d")), 10, vec![]),
            (LeaseScope::Except(vec![user_of("a")]), 2, vec!["b-1"]),
            (
                LeaseScope::Except(vec![user_of("a")]),
                10,
                vec!["b-1", "c-1"],
            ),
            (
                LeaseScope::Except(vec![user_of("b"), user_of("a")]),
                10,
                vec!["c-1"],
            ),
            (LeaseScope::Except(Vec::new()), 4, vec!["a-1", "b-1"]),
        ] {
            let leased = lease_of(outbox, "acme", max_events, scope.clone()).await;
            assert_eq!(ids(&leased), expected, "{scope:?}");
        }
        let retry = |_: &str, _| Outcome::Retry {
            reason: DeliveryReason::ServerError,
            next_attempt: NOW,
        };
        settle(outbox, lease(outbox, "acme", 10).await, retry).await;
    };
    all(outbox.as_ref()).await;
    outbox.close().await;
    let outbox = rig.open().await;
    assert_eq!(outbox.waiting_lanes().await, Ok(vec![lane("acme")]));
    all(outbox.as_ref()).await;
    // What is replayed is its user's still.
    let b = lease_of(outbox.as_ref(), "acme", 10, LeaseScope::Only(user_of("b"))).await;
    let reason = DeliveryReason::PayloadRejected;
    settle(outbox.as_ref(), b, |_, _| Outcome::DeadLetter { reason }).await;
    let replayed = outbox.replay(Selection::Filter(DeadLetterFilter::default()), NOW);
    assert_eq!(taken(replayed.await), 2);
    let except = LeaseScope::Except(vec![user_of("a")]);
    let leased = lease_of(outbox.as_ref(), "acme", 10, except).await;
    let mut both = ids(&leased);
    both.sort_unstable();
    assert_eq!(both, ["b-1", "c-1"]);
    let leased = lease_of(outbox.as_ref(), "acme", 1, LeaseScope::Only(user_of("b"))).await;
    assert_eq!(ids(&leased), ["b-1"]);
    outbox.close().await;
}
