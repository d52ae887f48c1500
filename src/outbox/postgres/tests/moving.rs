//! Several databases: integrations are spread, moved, and stopped one by one.

use super::PostgresRig;
use crate::{
    integration::IntegrationId,
    outbox::{
        DeadLetterFilter, Outbox, OutboxError, PostgresOutbox, Submitted,
        conformance::{id, ids, lease, new_capture, settle, submit, submit_one},
        move_integration,
    },
    proto::{DeliveryReason, Integration},
    status::Outcome,
};

async fn home(outbox: &PostgresOutbox, id: &IntegrationId) -> usize {
    outbox.home(id).expect("known").place
}

#[tokio::test]
async fn an_integration_moves_with_all_it_has_while_relays_run() {
    let Some(rig) = PostgresRig::new(2) else {
        return;
    };
    let outbox = rig.relay().await;
    let acme = id("acme");
    let spec = Integration {
        integration_id: "acme".into(),
        ..Integration::default()
    };
    outbox
        .put_integration(spec.clone(), None)
        .await
        .expect("stored");
    for capture in ["dead", "delivered", "a", "b"] {
        submit_one(&outbox, "acme", capture).await;
    }
    let leased = lease(&outbox, "acme", 4).await;
    settle(&outbox, leased, |capture, _| match capture {
        "dead" => Outcome::DeadLetter {
            reason: DeliveryReason::Expired,
        },
        _ => Outcome::Delivered,
    })
    .await;
    let from = home(&outbox, &acme).await;
    let letters = outbox
        .dead_letters(DeadLetterFilter::default(), 0, 10)
        .await;
    // An empty row of its name, as a stray capture leaves one, is neither source nor obstacle.
    let target = &outbox.databases[1 - from];
    let call = target.call().await.expect("connected");
    call.make_keys(&[&acme]).await.expect("made");
    let connection = rig.connection();
    let mut seen = (0, 0);
    let moved = move_integration(&connection, &rig.vault, &acme, 1 - from, |done, all| {
        seen = (done, all);
    });
    assert_eq!(moved.await.expect("moved"), 4);
    assert_eq!(seen, (8, 8));
    // A capture with the old home is refused until the relay has looked.
    let stale = submit_one(&outbox, "acme", "c").await;
    assert_eq!(stale, Submitted::Stale);
    assert_eq!(Outbox::integration(&outbox, &acme).await, Ok(Some(spec)));
    assert_eq!(home(&outbox, &acme).await, 1 - from);
    assert!(matches!(
        submit_one(&outbox, "acme", "c").await,
        Submitted::Accepted(_)
    ));
    let again = submit(&outbox, vec![new_capture("acme", "delivered", 0)]).await;
    assert!(matches!(&again[0], Submitted::Duplicate(record) if record.is_final()));
    assert_eq!(
        outbox
            .dead_letters(DeadLetterFilter::default(), 0, 10)
            .await,
        letters
    );
    assert_eq!(outbox.backlog(&acme).await.expect("read").events, 6);
    // In the order of acceptance, over the move.
    let leased = lease(&outbox, "acme", 10).await;
    assert_eq!(ids(&leased), ["a", "b", "c"]);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    // And back, into the database that it has left.
    let back = move_integration(&connection, &rig.vault, &acme, from, |_, _| {});
    assert_eq!(back.await.expect("moved"), 5);
    let repeated = move_integration(&connection, &rig.vault, &acme, from, |_, _| {});
    assert_eq!(repeated.await.expect("there already"), 0);
    let other = id("other");
    let missing = move_integration(&connection, &rig.vault, &other, 0, |_, _| {});
    let missing = missing.await.expect_err("unknown").to_string();
    assert!(missing.contains("no integration other"), "{missing}");
}

#[tokio::test]
async fn integrations_are_spread_and_a_database_that_is_away_stops_its_own_alone() {
    let Some(rig) = PostgresRig::new(3) else {
        return;
    };
    let outbox = rig.relay().await;
    let names: Vec<String> = (0..30).map(|number| format!("acme-{number}")).collect();
    let mut homes = [0; 3];
    for name in &names {
        submit_one(&outbox, name, "a").await;
        homes[home(&outbox, &id(name)).await] += 1;
    }
    assert!(homes.iter().all(|count| *count > 0), "{homes:?}");
    outbox.databases[1].set_available(false);
    for name in &names {
        let receipt = Outbox::submit(&outbox, vec![new_capture(name, "b", 0)]).await;
        let is_away = home(&outbox, &id(name)).await == 1;
        assert_eq!(
            matches!(receipt, Err(OutboxError::Unavailable(_))),
            is_away,
            "{name}"
        );
    }
    assert!(*outbox.signals().writable().borrow());
}
