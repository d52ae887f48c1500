//! An integration that is created under the name of a deleted one inherits nothing.

use super::*;
use crate::proto::Integration;

fn spec(incarnation: u32) -> Integration {
    Integration {
        integration_id: "acme".into(),
        etag: format!("etag-{incarnation}"),
        incarnation,
        ..Integration::default()
    }
}

async fn dead_letters(outbox: &dyn Outbox) -> Vec<(String, String)> {
    let filter = DeadLetterFilter {
        integrations: Some(vec![id("acme")]),
        ..DeadLetterFilter::default()
    };
    let letters = outbox.dead_letters(filter, 0, 10).await.expect("listed");
    let letters = letters.into_iter().map(|letter| letter.record);
    let letters =
        letters.map(|record| (record.integration_id.as_str().to_owned(), record.capture_id));
    let mut letters: Vec<_> = letters.collect();
    letters.sort();
    letters
}

pub(crate) async fn a_later_integration_of_a_name_inherits_nothing(rig: &impl Rig) {
    let opened = rig.open().await;
    let outbox = opened.as_ref();
    let (first, second) = (id("acme"), id("acme@2"));
    assert_eq!(outbox.last_incarnation(&first).await, Ok(0));
    outbox.put_integration(spec(1), None).await.expect("stored");
    assert_eq!(outbox.last_incarnation(&first).await, Ok(1));
    submit_one(outbox, "acme", "ann-dead").await;
    let leased = lease(outbox, "acme", 10).await;
    let reason = DeliveryReason::RequestRejected;
    settle(outbox, leased, |_, _| Outcome::DeadLetter { reason }).await;
    submit_one(outbox, "acme", "ann-waits").await;
    let deleted = outbox.delete_integration(&first, "etag-1".into()).await;
    deleted.expect("deleted");
    outbox.close().await;

    // Remembered over a restart, and over the creation of the next one.
    let opened = rig.open().await;
    let outbox = opened.as_ref();
    assert_eq!(outbox.last_incarnation(&first).await, Ok(1));
    assert_eq!(outbox.integrations().await, Ok(Vec::new()));
    outbox.put_integration(spec(2), None).await.expect("stored");
    assert_eq!(outbox.last_incarnation(&first).await, Ok(2));
    assert_eq!(outbox.last_incarnation(&id("acm")).await, Ok(0));
    assert_eq!(outbox.integrations().await, Ok(vec![spec(2)]));
    assert_eq!(outbox.integration(&first).await, Ok(Some(spec(2))));

    // Neither ids nor statuses, neither the backlog nor the lanes.
    assert_eq!(outbox.find(&second, "ann-dead").await, Ok(None));
    for capture in ["ann-dead", "ann-waits"] {
        let stored = submit_one(outbox, "acme@2", capture).await;
        assert!(matches!(stored, Submitted::Accepted(_)), "{stored:?}");
    }
    assert_eq!(outbox.backlog(&second).await.expect("read").events, 4);
    assert_eq!(outbox.backlog(&first).await.expect("read").events, 2);
    let leased = lease(outbox, "acme@2", 10).await;
    assert_eq!(ids(&leased), ["ann-dead", "ann-waits"]);
    settle(outbox, leased, |capture, _| match capture {
        "ann-dead" => Outcome::DeadLetter { reason },
        _ => Outcome::Delivered,
    })
    .await;

    // Listed under the name; sent again of the present one alone.
    let of = |id: &str| (id.to_owned(), "ann-dead".to_owned());
    let both = [of("acme"), of("acme"), of("acme@2"), of("acme@2")];
    assert_eq!(dead_letters(outbox).await, both);
    let all = || Selection::Filter(DeadLetterFilter::default());
    let count = outbox.count_dead_letters(all(), UnixMillis(i64::MAX)).await;
    let count = count.expect("counted");
    assert_eq!((count.events, count.former, count.older), (4, 2, 2));
    assert_eq!(taken(outbox.replay(all(), NOW).await), 2);
    assert_eq!(taken(outbox.replay(all(), NOW).await), 0);
    assert_eq!(dead_letters(outbox).await, both[..2]);

    // Erased with the person under the name, waiting events and dead letters alike.
    let subject = SubjectQuery {
        user_ids: vec![user_of("ann")],
        integration_id: Some(first.clone()),
    };
    let found = outbox.find_subject(subject.clone()).await.expect("found");
    assert_eq!(found.captures.len(), 4);
    let erasure = Erasure {
        subject,
        captures: found.captures,
        receipt: ErasureReceipt::default(),
    };
    let receipt = outbox.erase(erasure).await.expect("erased");
    assert_eq!(
        (receipt.waiting_event_count, receipt.dead_letter_count),
        (4, 2)
    );
    assert_eq!(dead_letters(outbox).await, []);
    outbox.close().await;
}
