//! What callers, integrations and all requests together may use.

use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use http_body_util::StreamBody;
use segment_relay::proto::{
    CaptureBatchRequest, CaptureStreamRequest, Integration, ListIntegrationsRequest, WaitFor,
    WatchDeliveriesRequest,
};
use segment_relay::sandbox::Rule;
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::{
    auth::{by, callers},
    connections::works,
    harness::{PATIENCE, World, acme, numbered, reason, text},
};

fn batch(first: usize, count: usize) -> CaptureBatchRequest {
    CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: (first..first + count).map(numbered).collect(),
        ..Default::default()
    }
}

/// How long a refusal asks to wait.
fn wait(status: &Status) -> Duration {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let details = status.get_error_details();
    assert!(details.quota_failure().is_some(), "{status:?}");
    let retry = details.retry_info().expect("RetryInfo");
    retry.retry_delay.expect("a time")
}

async fn with_acme(world: &World) {
    let request = segment_relay::proto::CreateIntegrationRequest {
        integration: Some(acme()),
    };
    world
        .integrations()
        .create_integration(by("all", request))
        .await
        .expect("created");
}

#[tokio::test]
async fn a_callers_rate_is_its_own_and_a_refusal_says_how_long_to_wait() {
    let limits = "[limits]\ncaller_captures_per_second = 10\ncaller_burst_captures = 1000\n";
    let world = World::with(&format!("{limits}{}", callers())).await;
    with_acme(&world).await;
    let mut relay = world.relay();
    relay
        .capture_batch(by("capture", batch(0, 1_000)))
        .await
        .expect("the burst");
    let refused = relay.capture_batch(by("capture", batch(1_000, 20))).await;
    let refused = refused.expect_err("beyond it");
    assert_eq!(reason(&refused), "CALLER_LIMIT");
    let wait = wait(&refused);
    assert!(
        wait > Duration::from_millis(500) && wait <= Duration::from_secs(2),
        "{wait:?}"
    );
    // Nothing of it was stored.
    let request = segment_relay::proto::GetCaptureRequest {
        integration_id: "acme".into(),
        capture_id: "capture-1000".into(),
    };
    let missing = relay
        .get_capture(by("read", request))
        .await
        .expect_err("not stored");
    assert_eq!(missing.code(), Code::NotFound);
    relay
        .capture_batch(by("all", batch(2_000, 500)))
        .await
        .expect("another caller");
    // A stream's captures count as well, and are refused one by one.
    let request = CaptureStreamRequest {
        correlation_id: "1".into(),
        integration_id: "acme".into(),
        capture: Some(numbered(5_000)),
    };
    let requests = (0..30).map(move |_| request.clone()).collect::<Vec<_>>();
    let stream = by("capture", tokio_stream::iter(requests));
    let mut results = relay
        .capture_stream(stream)
        .await
        .expect("begun")
        .into_inner();
    let mut refused = 0;
    while let Some(result) = results.message().await.expect("no error") {
        let error = result.result.and_then(|result| result.error);
        refused += usize::from(error.is_some_and(|error| error.reason == "CALLER_LIMIT"));
    }
    assert!(refused > 0);
    world.stop().await;
}

#[tokio::test]
async fn an_integrations_rate_is_shared_by_its_callers_and_leaves_others_alone() {
    let world = World::with(
        "[limits]\nintegration_captures_per_second = 1\nintegration_burst_captures = 1000\n",
    )
    .await;
    world.create(acme()).await;
    let other = Integration {
        integration_id: "other".into(),
        ..acme()
    };
    world.create(other).await;
    let mut relay = world.relay();
    relay
        .capture_batch(batch(0, 1_000))
        .await
        .expect("the burst");
    let refused = relay
        .capture_batch(batch(1_000, 10))
        .await
        .expect_err("beyond it");
    assert_eq!(reason(&refused), "INTEGRATION_LIMIT");
    assert!(wait(&refused) > Duration::from_secs(1));
    let elsewhere = CaptureBatchRequest {
        integration_id: "other".into(),
        ..batch(0, 1_000)
    };
    relay
        .capture_batch(elsewhere)
        .await
        .expect("another integration");
    world.stop().await;
}

#[tokio::test]
async fn a_callers_calls_at_once_are_bounded_until_their_answers_have_left() {
    let limits = "[limits]\ncaller_calls_in_flight = 2\n";
    let world = World::with(&format!("{limits}{}", callers())).await;
    let watch = async |name: &str| {
        let request = by(name, WatchDeliveriesRequest::default());
        world.relay().watch_deliveries(request).await
    };
    let first = watch("read").await.expect("watches");
    let second = watch("read").await.expect("watches");
    let refused = watch("read").await.expect_err("the third");
    assert_eq!(reason(&refused), "CALLER_LIMIT");
    wait(&refused);
    watch("all").await.expect("another caller");
    drop((first, second));
    let freed = async {
        while watch("read").await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, freed).await.expect("freed");
    world.stop().await;
}

#[tokio::test]
async fn calls_beyond_the_bound_are_refused_without_harm_to_their_connection() {
    // The call that has the only place keeps it however long the others take.
    let world = World::with(
        "[server]\nmax_calls_in_flight = 1\nrequest_timeout_ms = 600000\nmax_wait_ms = 600000\n",
    )
    .await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    let waiting = CaptureBatchRequest {
        wait_for: WaitFor::Delivered.into(),
        ..batch(0, 1)
    };
    let mut relay = world.relay();
    let mut first = relay.clone();
    let held = tokio::spawn(async move { first.capture_batch(waiting).await });
    let tried = world
        .sandbox
        .wait_for(|stats| stats.requests > 0, PATIENCE)
        .await;
    tried.expect("the first holds the only place");
    // Their streams are reset while their bodies come, more often than h2 lets a connection
    // reset streams for faults of its peer (1,024).
    let request = batch(1, 500);
    for _ in 0..16 {
        let calls = (0..80).map(|_| {
            let (mut relay, request) = (relay.clone(), request.clone());
            async move { relay.capture_batch(request).await }
        });
        for refused in futures_util::future::join_all(calls).await {
            let refused = refused.map(drop).expect_err("no place");
            assert_eq!(reason(&refused), "TOO_MANY_CALLS", "{refused:?}");
            wait(&refused);
        }
    }
    world.behave();
    held.await.expect("no panic").expect("delivered");
    relay.capture_batch(batch(1, 500)).await.expect("accepted");
    world.stop().await;
}

#[tokio::test]
async fn all_requests_together_take_no_more_memory_than_they_may() {
    let world = World::with(
        "[server]\nmax_message_bytes = 1048576\n[limits]\nrequest_bytes_in_flight = 1048576\n",
    )
    .await;
    world.create(acme()).await;
    world.misbehave(Rule {
        delay_ms: Some(500),
        ..Rule::default()
    });
    let mut large = batch(20_000, 1_000);
    for capture in &mut large.captures {
        capture
            .attributes
            .insert("essay".into(), text(&"x".repeat(500)));
    }
    large.wait_for = WaitFor::Delivered.into();
    let mut relay = world.relay();
    let held = tokio::spawn({
        let (mut relay, large) = (relay.clone(), large.clone());
        async move { relay.capture_batch(large).await }
    });
    let begun = world
        .sandbox
        .wait_for(|stats| stats.requests > 0, PATIENCE)
        .await;
    begun.expect("the first is waiting for its delivery");
    let refused = relay.capture_batch(large).await.expect_err("no room");
    assert_eq!(reason(&refused), "RELAY_LIMIT");
    wait(&refused);
    world.behave();
    held.await.expect("no panic").expect("delivered");
    // What it held is free again, many times over; and a stream of more than the
    // bound is taken piece by piece.
    for number in 0..8 {
        world
            .relay()
            .capture_batch(batch(number * 500, 500))
            .await
            .expect("accepted");
    }
    let captures = (10_000..14_000).map(|number| CaptureStreamRequest {
        correlation_id: number.to_string(),
        integration_id: "acme".into(),
        capture: Some(numbered(number)),
    });
    let stream = tokio_stream::iter(captures.collect::<Vec<_>>());
    let mut results = world
        .relay()
        .capture_stream(stream)
        .await
        .expect("begun")
        .into_inner();
    let mut accepted = 0;
    while let Some(result) = results.message().await.expect("no error") {
        let error = result.result.and_then(|result| result.error);
        assert_eq!(error, None);
        accepted += 1;
    }
    assert_eq!(accepted, 4_000);
    world.stop().await;
}

#[tokio::test]
async fn what_anybody_may_ask_is_small_and_rare() {
    let world = World::with(&callers()).await;
    let watched = HealthCheckRequest::default();
    let mut health = HealthClient::new(world.channel.clone());
    let mut watches = Vec::new();
    for _ in 0..16 {
        watches.push(health.watch(watched.clone()).await.expect("watches"));
    }
    let refused = health.watch(watched.clone()).await.expect_err("one more");
    assert_eq!(reason(&refused), "CONNECTION_LIMIT");
    wait(&refused);
    // Who is known is not kept waiting by them.
    world
        .integrations()
        .list_integrations(by("read", ListIntegrationsRequest::default()))
        .await
        .expect("listed");
    watches.pop();
    let freed = async {
        while health.check(watched.clone()).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, freed).await.expect("freed");
    let long = HealthCheckRequest {
        service: "x".repeat(2_000),
    };
    let refused = health.check(long).await.expect_err("too long");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::ResourceExhausted, "MESSAGE_TOO_LARGE")
    );
    world.stop().await;
}

#[tokio::test]
async fn a_call_whose_message_does_not_come_ends_in_time() {
    let world = World::with("[server]\nrequest_timeout_ms = 200\n").await;
    let mut grpc = tonic::client::Grpc::new(world.channel.clone());
    grpc.ready().await.expect("connected");
    let path = "/jebbit.segmentrelay.v1.SegmentRelay/Capture";
    let path = path.parse().expect("a path");
    let codec = tonic_prost::ProstCodec::<CaptureBatchRequest, CaptureBatchRequest>::default();
    let never = tonic::Request::new(tokio_stream::pending());
    let call = grpc.streaming(never, path, codec);
    let ended = tokio::time::timeout(PATIENCE, call).await;
    let refused = ended.expect("ended in time").expect_err("no answer");
    assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused:?}");
    assert_eq!(reason(&refused), "DEADLINE_EXCEEDED");
    works(&world).await;
    world.stop().await;
}

#[tokio::test]
async fn a_call_ends_when_its_callers_time_is_over() {
    let world = World::start().await;
    // Not by tonic's client, which would end it by itself.
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .expect("a client");
    let path = "/jebbit.segmentrelay.v1.SegmentRelay/Capture";
    let never = tokio_stream::pending::<Result<Frame<Bytes>, Status>>();
    let call = client
        .post(format!("http://{}{path}", world.address))
        .header("content-type", "application/grpc")
        .header("grpc-timeout", "100m")
        .body(reqwest::Body::wrap(StreamBody::new(never)))
        .send();
    let answer = tokio::time::timeout(PATIENCE, call).await;
    let answer = answer.expect("ended in time").expect("an answer");
    let status = Status::from_header_map(answer.headers()).expect("a status");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(status.message().contains("its own deadline"), "{status:?}");
    world.stop().await;
}
