//! What one relay does is known to the other.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use segment_relay::proto::{
    CaptureRequest, CreateIntegrationRequest, DeliveryState, EraseSubjectRequest,
    UpdateIntegrationRequest, WaitFor, WatchDeliveriesRequest, erase_subject_request::Subject,
    integration_service_client::IntegrationServiceClient,
    privacy_service_client::PrivacyServiceClient, segment_relay_client::SegmentRelayClient,
};
use tokio_stream::StreamExt;

use super::{
    outage::{capture, create},
    relays::{Watched, process},
};
use crate::{
    harness::{PATIENCE, acme, init_streams, numbered, states},
    nats_server::Server,
    process::Process,
};

/// More than the lanes, so that each relay holds some.
const CAPTURES: usize = 24;

struct Two {
    relays: [Process; 2],
    watched: Arc<Watched>,
    _server: Server,
    _directory: tempfile::TempDir,
}

async fn two() -> Option<Two> {
    let server = Server::start()?;
    init_streams(&[server.url()], 1).await;
    let watched = Arc::new(Watched::default());
    let endpoint = watched.listen().await;
    let directory = tempfile::tempdir().expect("a directory");
    let one = process(&server.url(), directory.path(), &endpoint, 1).await;
    let other = process(&server.url(), directory.path(), &endpoint, 1).await;
    create(&one.channel).await;
    // Known at the other, and each knows of the other's session.
    let deadline = Instant::now() + PATIENCE;
    while capture(&other.channel, 999, WaitFor::Delivered)
        .await
        .is_err()
    {
        assert!(Instant::now() < deadline, "the integration does not arrive");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Some(Two {
        relays: [one, other],
        watched,
        _server: server,
        _directory: directory,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_and_watchers_hear_of_what_the_other_relay_does() {
    let Some(two) = two().await else { return };
    let [one, other] = &two.relays;
    let watch = WatchDeliveriesRequest::default();
    let mut client = SegmentRelayClient::new(other.channel.clone());
    let mut updates = client
        .watch_deliveries(watch)
        .await
        .expect("watches")
        .into_inner();
    // The other relay's next sign of life says that somebody watches there.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    for number in 0..CAPTURES {
        let result = capture(&one.channel, number, WaitFor::Delivered)
            .await
            .expect("accepted");
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
    let mut seen = std::collections::HashMap::new();
    while seen.values().sum::<usize>() < CAPTURES * 4 {
        let update = tokio::time::timeout(PATIENCE, updates.next())
            .await
            .expect("more updates");
        let update = update.expect("open").expect("no error");
        let state = update.event.expect("an event").state();
        *seen.entry(state).or_insert(0) += 1;
    }
    assert_eq!(seen[&DeliveryState::Queued], CAPTURES * 2);
    assert_eq!(seen[&DeliveryState::Delivered], CAPTURES * 2);
    assert_eq!(two.watched.collisions.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_at_one_relay_takes_what_waits_in_the_lanes_of_the_other() {
    let Some(two) = two().await else { return };
    let [one, other] = &two.relays;
    two.watched.is_down.store(true, Ordering::Relaxed);
    for number in 0..CAPTURES {
        capture(&one.channel, number, WaitFor::Accepted)
            .await
            .expect("accepted");
    }
    let before = two.watched.count();
    for (number, relay) in (0..8).zip([one, other].into_iter().cycle()) {
        let mut client = PrivacyServiceClient::new(relay.channel.clone());
        let mut request = tonic::Request::new(EraseSubjectRequest {
            subject: Some(Subject::Email(format!("person-{number}@example.com"))),
            ..EraseSubjectRequest::default()
        });
        request.set_timeout(PATIENCE);
        let erased = client
            .erase_subject(request)
            .await
            .expect("erased")
            .into_inner();
        let receipt = erased.receipt.expect("a receipt");
        assert_eq!(receipt.waiting_event_count, 2, "{number}");
    }
    two.watched.is_down.store(false, Ordering::Relaxed);
    for number in 8..CAPTURES {
        let result = capture(&other.channel, number, WaitFor::Delivered)
            .await
            .expect("accepted");
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
    for number in 0..8 {
        let result = capture(&other.channel, number, WaitFor::Delivered)
            .await
            .expect("known");
        assert_eq!(states(&result.events), [DeliveryState::Skipped; 2]);
    }
    assert_eq!(two.watched.count() - before, (CAPTURES - 8) * 2);
    assert_eq!(two.watched.collisions.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_an_integration_reaches_the_other_relay_within_a_second() {
    let Some(two) = two().await else { return };
    let [one, other] = &two.relays;
    let mut here = IntegrationServiceClient::new(one.channel.clone());
    let mut there = IntegrationServiceClient::new(other.channel.clone());
    for name in ["first", "second", "third"] {
        let integration = segment_relay::proto::Integration {
            integration_id: "acme".into(),
            display_name: name.into(),
            ..Default::default()
        };
        let request = UpdateIntegrationRequest {
            integration: Some(integration),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["display_name".into()],
            }),
        };
        here.update_integration(request).await.expect("updated");
        let changed = Instant::now();
        loop {
            let request = segment_relay::proto::GetIntegrationRequest {
                integration_id: "acme".into(),
            };
            let found = there
                .get_integration(request)
                .await
                .expect("there")
                .into_inner();
            if found.integration.expect("one").display_name == name {
                break;
            }
            assert!(
                changed.elapsed() < Duration::from_secs(1),
                "not known after a second"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_captured_right_after_its_integration_was_made_is_delivered_by_either_relay() {
    let Some(two) = two().await else { return };
    let [one, _] = &two.relays;
    let mut integrations = IntegrationServiceClient::new(one.channel.clone());
    for number in 0..12 {
        let id = format!("new-{number}");
        let integration = segment_relay::proto::Integration {
            integration_id: id.clone(),
            ..acme()
        };
        let request = CreateIntegrationRequest {
            integration: Some(integration),
        };
        integrations
            .create_integration(request)
            .await
            .expect("created");
        // Half of them are delivered by the other relay, which hears of them a moment later.
        let mut request = tonic::Request::new(CaptureRequest {
            integration_id: id,
            capture: Some(numbered(number)),
            wait_for: WaitFor::Delivered.into(),
        });
        request.set_timeout(PATIENCE);
        let mut client = SegmentRelayClient::new(one.channel.clone());
        let answer = client
            .capture(request)
            .await
            .expect("accepted")
            .into_inner();
        let events = answer.result.expect("a result").events;
        assert_eq!(states(&events), [DeliveryState::Delivered; 2], "{number}");
    }
}
