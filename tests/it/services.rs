//! What stands beside the relay's own services.

use segment_relay::proto::{
    CaptureBatchRequest, CaptureRequest, WaitFor, WatchDeliveriesRequest,
    segment_relay_client::SegmentRelayClient,
};
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::harness::{World, acme, numbered, reason, text, worked_example};

#[tokio::test]
async fn health_answers_for_the_relay_as_a_whole_and_for_its_service() {
    let world = World::start().await;
    let mut health = HealthClient::new(world.channel.clone());
    for service in ["", "jebbit.segmentrelay.v1.SegmentRelay"] {
        let request = HealthCheckRequest {
            service: service.into(),
        };
        let answer = health.check(request).await.expect("answered").into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
    }
    let unknown = health
        .check(HealthCheckRequest {
            service: "nobody".into(),
        })
        .await;
    let unknown = unknown.expect_err("unknown");
    assert_eq!(
        (unknown.code(), reason(&unknown).as_str()),
        (Code::NotFound, "SERVICE_UNKNOWN")
    );
    // A watch of it stays (grpc.health.v1): it says so, and nothing else until the drain.
    let request = HealthCheckRequest {
        service: "nobody".into(),
    };
    let watch = health.watch(request).await.expect("watches");
    let mut watch = watch.into_inner();
    let first = watch.next().await.expect("a report").expect("no error");
    assert_eq!(first.status(), ServingStatus::ServiceUnknown);
    world.begin_drain();
    let end = watch.next().await.expect("an end").expect_err("a status");
    assert_eq!(end.code(), Code::Unavailable);
    world.stop().await;
}

macro_rules! reflected_services {
    ($world:expr, $version:ident) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut answers = ServerReflectionClient::new($world.channel.clone())
            .server_reflection_info(tokio_stream::iter([request]))
            .await
            .expect("answered")
            .into_inner();
        let answer = answers.next().await.expect("an answer").expect("no error");
        match answer.message_response {
            Some(MessageResponse::ListServicesResponse(list)) => list
                .service
                .into_iter()
                .map(|service| service.name)
                .collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        }
    }};
}

#[tokio::test]
async fn reflection_lists_the_services_in_both_versions() {
    let world = World::start().await;
    for services in [
        reflected_services!(world, v1),
        reflected_services!(world, v1alpha),
    ] {
        for name in [
            "SegmentRelay",
            "IntegrationService",
            "DeadLetterService",
            "PrivacyService",
        ] {
            let full = format!("jebbit.segmentrelay.v1.{name}");
            assert!(
                services.contains(&full),
                "{full} is missing in {services:?}"
            );
        }
        assert!(services.contains(&"grpc.health.v1.Health".to_owned()));
    }
    world.stop().await;
    let hidden = World::with("[server]\nreflection = false\n").await;
    let mut client =
        tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(
            hidden.channel.clone(),
        );
    let refused = client
        .server_reflection_info(tokio_stream::empty())
        .await
        .expect_err("hidden");
    assert_eq!(refused.code(), Code::Unimplemented);
    hidden.stop().await;
}

#[tokio::test]
async fn reflection_says_what_it_does_not_know_and_goes_on() {
    use tonic_reflection::pb::v1alpha::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let world = World::start().await;
    let symbol = |name: &str| MessageRequest::FileContainingSymbol(name.into());
    let questions = [
        symbol("no.such.Symbol"),
        MessageRequest::FileByFilename("no/such.proto".into()),
        MessageRequest::AllExtensionNumbersOfType("no.such.Message".into()),
        symbol("jebbit.segmentrelay.v1.DELIVERY_STATE_QUEUED"),
    ];
    let requests = questions.map(|question| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    });
    let answers = ServerReflectionClient::new(world.channel.clone())
        .server_reflection_info(tokio_stream::iter(requests))
        .await;
    let mut answers = answers.expect("answered").into_inner();
    for _ in 0..3 {
        let answer = answers.next().await.expect("an answer").expect("no error");
        match answer.message_response {
            Some(MessageResponse::ErrorResponse(error)) => assert_eq!(error.error_code, 5),
            other => panic!("{other:?}"),
        }
    }
    let last = answers.next().await.expect("an answer").expect("no error");
    let found = last.message_response.expect("a response");
    assert!(matches!(found, MessageResponse::FileDescriptorResponse(_)));
    assert!(answers.next().await.is_none());
    world.stop().await;
}

#[tokio::test]
async fn a_watcher_sees_every_change_and_no_address() {
    let world = World::start().await;
    world.create(acme()).await;
    let watch = WatchDeliveriesRequest {
        integration_id: "acme".into(),
        ..Default::default()
    };
    let mut updates = world
        .relay()
        .watch_deliveries(watch)
        .await
        .expect("watches")
        .into_inner();
    world.deliver(worked_example()).await;
    let mut seen = Vec::new();
    for _ in 0..4 {
        let update = updates.next().await.expect("an update").expect("no error");
        assert!(!format!("{update:?}").contains("aol"));
        assert_eq!(update.missed_count, 0);
        let event = update.event.expect("an event");
        seen.push((event.r#type().as_str_name(), event.state().as_str_name()));
    }
    assert_eq!(
        seen,
        [
            ("EVENT_TYPE_IDENTIFY", "DELIVERY_STATE_QUEUED"),
            ("EVENT_TYPE_TRACK", "DELIVERY_STATE_QUEUED"),
            ("EVENT_TYPE_IDENTIFY", "DELIVERY_STATE_DELIVERED"),
            ("EVENT_TYPE_TRACK", "DELIVERY_STATE_DELIVERED"),
        ]
    );
    let bad = WatchDeliveriesRequest {
        states: vec![0],
        ..Default::default()
    };
    let refused = world
        .relay()
        .watch_deliveries(bad)
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::InvalidArgument);
    drop(updates);
    world.stop().await;
}

#[tokio::test]
async fn messages_beyond_the_bound_and_too_many_watchers_are_refused() {
    let world = World::with("[server]\nmax_message_bytes = 65536\nmax_watchers = 1\n").await;
    world.create(acme()).await;
    let mut large = numbered(1);
    large
        .attributes
        .insert("essay".into(), text(&"x".repeat(70_000)));
    let request = CaptureRequest {
        integration_id: "acme".into(),
        capture: Some(large),
        ..Default::default()
    };
    let refused = world.relay().capture(request).await.expect_err("refused");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::ResourceExhausted, "MESSAGE_TOO_LARGE")
    );
    let watch = || async {
        world
            .relay()
            .watch_deliveries(WatchDeliveriesRequest::default())
            .await
    };
    let first = watch().await.expect("watches");
    assert_eq!(
        watch().await.expect_err("refused").code(),
        Code::ResourceExhausted
    );
    // A bad request is told what is wrong with it, and not to come back later.
    let bad = WatchDeliveriesRequest {
        states: vec![99],
        ..WatchDeliveriesRequest::default()
    };
    let refused = world.relay().watch_deliveries(bad).await;
    assert_eq!(refused.expect_err("refused").code(), Code::InvalidArgument);
    drop(first);
    world.stop().await;
}

#[tokio::test]
async fn a_slow_watcher_slows_nobody_and_is_told_how_many_updates_it_missed() {
    let fast = "[delivery]\nmax_events_per_second = 1000000\nburst_events = 1000000\n";
    let world = World::with(fast).await;
    world.create(acme()).await;
    // A client that takes little before it reads.
    let narrow = tonic::transport::Endpoint::from_shared(format!("http://{}", world.address))
        .expect("a URL")
        .initial_stream_window_size(16 * 1024)
        .connect()
        .await
        .expect("connects");
    let watch = WatchDeliveriesRequest::default();
    let mut updates = SegmentRelayClient::new(narrow)
        .watch_deliveries(watch)
        .await
        .expect("watches")
        .into_inner();
    // Four changes for each capture: more than the feed and all windows can hold.
    for turn in 0..5 {
        let captures = (turn * 1_000..(turn + 1) * 1_000).map(numbered).collect();
        let request = CaptureBatchRequest {
            integration_id: "acme".into(),
            captures,
            wait_for: WaitFor::Delivered.into(),
        };
        world
            .relay()
            .capture_batch(request)
            .await
            .expect("nobody waits for the watcher");
    }
    let (mut seen, mut missed) = (0, 0);
    while seen + missed < 20_000 {
        let update = updates.next().await.expect("an update").expect("no error");
        missed += update.missed_count;
        seen += u64::from(update.event.is_some());
    }
    assert_eq!(seen + missed, 20_000);
    assert!(missed > 0 && seen > 0, "{missed} missed, {seen} seen");
    world.stop().await;
}
