//! A person's data: found and erased.

use super::*;

/// Looks for a person's captures and erases them.
pub(super) async fn erase(outbox: &dyn Outbox, subject: SubjectQuery) -> ErasureReceipt {
    let found = outbox.find_subject(subject.clone()).await.expect("found");
    let erasure = Erasure {
        subject,
        captures: found.captures,
        receipt: ErasureReceipt::default(),
    };
    outbox.erase(erasure).await.expect("erased")
}

pub(crate) async fn a_persons_data_is_erased_and_nobody_elses(rig: &impl Rig) {
    let outbox = rig.open().await;
    for capture in ["delivered", "dead", "ann-1", "ann-2", "bob-1"] {
        let person = NewCapture {
            user_id: Some(user_of(if capture == "bob-1" { "bob" } else { "ann" })),
            ..new_capture("acme", capture, 0)
        };
        submit(&*outbox, vec![person]).await;
    }
    submit(&*outbox, vec![new_capture("other", "ann-1", 0)]).await;
    let leased = lease(&*outbox, "acme", 4).await;
    settle(&*outbox, leased, |capture, _| match capture {
        "dead" => Outcome::DeadLetter {
            reason: DeliveryReason::Expired,
        },
        _ => Outcome::Delivered,
    })
    .await;
    let ann = SubjectQuery {
        user_ids: ["nobody", "none", "neither", "ann"].map(user_of).to_vec(),
        integration_id: Some(id("acme")),
    };
    let found = outbox.find_subject(ann.clone()).await.expect("found");
    assert_eq!((found.captures.len(), found.lanes), (4, vec![lane("acme")]));
    // Leased before, settled after: the request was on its way.
    let in_flight = lease(&*outbox, "acme", 2).await;
    assert_eq!(ids(&in_flight), ["ann-1"]);
    let receipt = erase(&*outbox, ann.clone()).await;
    assert_eq!(receipt.waiting_event_count, 4);
    assert_eq!(receipt.dead_letter_count, 2);
    assert_eq!(receipt.payload_count, 6);
    assert_eq!(receipt.attempt_count, 2);
    settle(&*outbox, in_flight, |_, _| Outcome::Delivered).await;

    let outbox = {
        outbox.close().await;
        rig.open().await
    };
    let state = |record: &CaptureRecord| record.identify.state;
    let find = async |name: &str, capture: &str| {
        let found = outbox.find(&id(name), capture).await.expect("read");
        found.expect("its id is kept")
    };
    let erased = State::Skipped {
        reason: DeliveryReason::Erased,
    };
    for capture in ["dead", "ann-1", "ann-2"] {
        assert_eq!(state(&find("acme", capture).await), erased, "{capture}");
    }
    let delivered = find("acme", "delivered").await;
    assert!(matches!(state(&delivered), State::Delivered { .. }));
    assert_eq!(delivered.attempts, []);
    assert_eq!(state(&find("other", "ann-1").await), State::Queued);
    assert_eq!(ids(&lease(&*outbox, "acme", 10).await), ["bob-1"]);
    let backlog = outbox.backlog(&id("acme")).await.expect("counted");
    assert_eq!(backlog.events, 2);
    let letters = outbox.dead_letters(DeadLetterFilter::default(), 0, 10);
    assert_eq!(letters.await, Ok(Vec::new()));
    // A repetition does not bring the data back.
    let again = NewCapture {
        user_id: Some(user_of("ann")),
        ..new_capture("acme", "ann-2", 0)
    };
    let again = submit(&*outbox, vec![again]).await;
    assert!(matches!(&again[0], Submitted::Duplicate(record) if state(record) == erased));

    let second = erase(&*outbox, ann).await;
    assert_eq!((second.waiting_event_count, second.attempt_count), (0, 0));
    let receipts = outbox.erasure_receipts(None, 10).await.expect("read");
    assert_eq!(receipts, [second, receipt.clone()]);
    let before = receipts[0].receipt_id.parse().ok();
    let older = outbox.erasure_receipts(before, 10).await;
    assert_eq!(older, Ok(vec![receipt]));
    outbox.close().await;
}
