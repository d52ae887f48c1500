//! What one relay does is told to callers and watchers of another.

use std::{collections::HashMap, time::Duration};

use segment_relay::proto::{
    DeliveryState, WaitFor, WatchDeliveriesRequest, segment_relay_client::SegmentRelayClient,
};
use tokio_stream::StreamExt;

use super::{Fleet, capture_of};
use crate::{
    harness::{PATIENCE, acme, states},
    postgres_server,
};

/// More than the lanes of an integration.
const CAPTURES: usize = 24;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_hear_of_what_the_other_relay_does() {
    let Some(database) = postgres_server::database() else {
        return;
    };
    let fleet = Fleet::start(database.url(), 2).await;
    fleet.create(0, acme()).await.expect("created");
    let mut client = SegmentRelayClient::new(fleet.channel(1));
    let updates = client.watch_deliveries(WatchDeliveriesRequest::default());
    let mut updates = updates.await.expect("watches").into_inner();
    // The next heartbeat says that somebody watches there.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    for number in 0..CAPTURES {
        let capture = capture_of(number, &format!("c-{number}"));
        let result = fleet.capture(0, capture, WaitFor::Delivered).await;
        let result = result.expect("accepted");
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
    let mut seen = HashMap::new();
    while seen.values().sum::<usize>() < CAPTURES * 4 {
        let update = tokio::time::timeout(PATIENCE, updates.next()).await;
        let update = update.unwrap_or_else(|_| panic!("no more after {seen:?}"));
        let update = update.expect("open").expect("no error");
        let state = update.event.expect("an event").state();
        *seen.entry(state).or_insert(0) += 1;
    }
    // A change is told as a number, and shown with the state that is stored when it is heard.
    let delivered = seen.remove(&DeliveryState::Delivered);
    assert!(delivered.is_some_and(|count| count >= CAPTURES * 2));
    assert!(
        seen.keys().all(|state| *state == DeliveryState::Queued),
        "{seen:?}"
    );
    fleet.arrived(CAPTURES * 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_takes_what_waits_whichever_relay_holds_the_lane() {
    const ERASED: usize = 8;
    let Some(database) = postgres_server::database() else {
        return;
    };
    let fleet = Fleet::start(database.url(), 2).await;
    fleet.create(0, acme()).await.expect("created");
    fleet.refuse(503);
    let captures = || (0..CAPTURES).map(|number| capture_of(number, &format!("c-{number}")));
    fleet
        .batch(0, captures().collect(), WaitFor::Accepted)
        .await;
    for person in 0..ERASED {
        let receipt = fleet.erase(person % 2, person).await;
        assert!(receipt.completed);
        assert_eq!(receipt.waiting_event_count, 2, "{person}");
    }
    fleet.behave();
    let results = fleet
        .batch(1, captures().collect(), WaitFor::Delivered)
        .await;
    for (person, result) in results.iter().enumerate() {
        let wanted = match person < ERASED {
            true => DeliveryState::Skipped,
            false => DeliveryState::Delivered,
        };
        assert!(result.duplicate);
        assert_eq!(states(&result.events), [wanted; 2], "{person}");
    }
    fleet.arrived((CAPTURES - ERASED) * 2).await;
}
