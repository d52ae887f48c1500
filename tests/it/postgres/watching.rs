//! What one relay does is told to callers and watchers of another.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use segment_relay::proto::{
    DeliveryState, WaitFor, WatchDeliveriesRequest, WatchDeliveriesResponse,
    segment_relay_client::SegmentRelayClient,
};
use tokio_stream::StreamExt;
use tonic::Streaming;

use super::{Fleet, capture_of};
use crate::{
    harness::{PATIENCE, acme, states},
    postgres_server,
};

/// Without an update for so long there is none on its way.
const QUIET: Duration = Duration::from_millis(300);
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
    let early = until_told(&fleet, &mut updates).await;
    for number in 0..CAPTURES {
        let capture = capture_of(number, &format!("c-{number}"));
        let result = fleet.capture(0, capture, WaitFor::Delivered).await;
        let result = result.expect("accepted");
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
    // A change is told as a number, and shown with the state that is stored when it is heard:
    // an acceptance that is delivered within milliseconds may be heard as that alone.
    let mut delivered = BTreeSet::new();
    while delivered.len() < CAPTURES * 2 {
        let update = tokio::time::timeout(PATIENCE, updates.next()).await;
        let update = update.unwrap_or_else(|_| panic!("no more after {delivered:?}"));
        let update = update.expect("open").expect("no error");
        let event = update.event.expect("an event");
        match event.state() {
            _ if update.capture_id.starts_with("early") => {}
            DeliveryState::Delivered => {
                delivered.insert((update.capture_id, event.r#type));
            }
            state => assert_eq!(state, DeliveryState::Queued),
        }
    }
    fleet.arrived((early + CAPTURES) * 2).await;
}

/// Until the first relay knows, from a heartbeat, that the second one is watched. Returns how
/// many captures that took.
async fn until_told(fleet: &Fleet, updates: &mut Streaming<WatchDeliveriesResponse>) -> usize {
    let deadline = Instant::now() + PATIENCE;
    let mut sent = 0;
    let mut heard = 0;
    while heard < 2 {
        assert!(Instant::now() < deadline, "not told of {sent} captures");
        let capture = capture_of(sent, &format!("early-{sent}"));
        let result = fleet.capture(0, capture, WaitFor::Delivered).await;
        result.expect("accepted");
        sent += 1;
        heard = 0;
        while let Ok(update) = tokio::time::timeout(QUIET, updates.next()).await {
            let update = update.expect("open").expect("no error");
            let event = update.event.expect("an event");
            heard += usize::from(event.state() == DeliveryState::Delivered);
        }
    }
    sent
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
