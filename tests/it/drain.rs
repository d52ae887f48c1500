use segment_relay::{
    proto::{DeliveryState, WaitFor, WatchDeliveriesRequest},
    sandbox::Rule,
};
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::harness::{PATIENCE, World, acme, numbered, states, worked_example};

#[tokio::test]
async fn health_turns_before_calls_are_refused() {
    let world = World::with("[server]\ndrain_delay_ms = 300\n").await;
    world.create(acme()).await;
    let request = HealthCheckRequest {
        service: String::new(),
    };
    let mut watch = HealthClient::new(world.channel.clone())
        .watch(request)
        .await
        .expect("watches")
        .into_inner();
    let first = watch.next().await.expect("a status").expect("no error");
    assert_eq!(first.status(), ServingStatus::Serving);
    world.begin_drain();
    let next = watch.next().await.expect("a status").expect("no error");
    assert_eq!(next.status(), ServingStatus::NotServing);
    // Load balancers have been told; what is on its way still gets an answer.
    world.accept(worked_example()).await;
    drop(watch);
    world.stop().await;
}

#[tokio::test]
async fn a_call_that_waits_is_answered_with_the_state_so_far() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    let watch = WatchDeliveriesRequest {
        states: vec![DeliveryState::Retrying.into()],
        ..WatchDeliveriesRequest::default()
    };
    let updates = world.relay().watch_deliveries(watch).await;
    let mut updates = updates.expect("watches").into_inner();
    let waiting = world.capture(numbered(1), WaitFor::Delivered);
    let drain = async {
        updates.next().await.expect("an update").expect("no error");
        world.begin_drain();
    };
    let (answer, ()) = tokio::join!(waiting, drain);
    let events = answer.expect("an answer, not an error").events;
    assert_eq!(states(&events), [DeliveryState::Retrying; 2]);
    let refused = world
        .capture(numbered(2), WaitFor::Accepted)
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::Unavailable);
    world.stop().await;
}

#[tokio::test]
async fn a_request_in_flight_is_settled_before_the_relay_ends() {
    let mut world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        delay_ms: Some(300),
        process: Some(true),
        ..Rule::default()
    });
    world.accept(worked_example()).await;
    world
        .sandbox
        .wait_for(|stats| stats.requests > 0, PATIENCE)
        .await
        .expect("an attempt");
    world.restart().await;
    let status = world.settled(worked_example()).await;
    assert_eq!(states(&status.events), [DeliveryState::Delivered; 2]);
    assert_eq!(status.events[0].attempt_count, 1);
    assert_eq!(world.sandbox.stats().events_duplicate, 0);
    world.stop().await;
}
