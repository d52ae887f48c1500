use std::time::Duration;

use segment_relay::{
    proto::{
        DeliveryState, Integration, ListIntegrationsRequest, WaitFor, WatchDeliveriesRequest,
        integration_service_client::IntegrationServiceClient,
    },
    sandbox::Rule,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    connections::by_hand,
    harness::{PATIENCE, World, acme, mapping, numbered, states, worked_example},
    process::{Process, lasting_sandbox},
    wire::{Wire, call, framed, within},
};

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

/// Far below what the time-outs of a handshake, of keepalive and of the drain would take.
const SHORT: Duration = Duration::from_secs(8);

/// Streams without an end and silent peers hold no drain.
#[tokio::test]
async fn open_streams_and_silent_peers_do_not_hold_a_drain() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    let world = World::start().await;
    let request = HealthCheckRequest {
        service: String::new(),
    };
    let mut health = HealthClient::new(world.channel.clone());
    let mut watch = health.watch(request).await.expect("watches").into_inner();
    let first = watch.next().await.expect("a status").expect("no error");
    assert_eq!(first.status(), ServingStatus::Serving);
    let reflection = ServerReflectionClient::new(world.channel.clone())
        .server_reflection_info(tokio_stream::pending())
        .await;
    let mut reflection = reflection.expect("opened").into_inner();
    // Without a preface, and with one and nothing behind it.
    let _dumb = TcpStream::connect(world.address).await.expect("connects");
    let _silent = by_hand(&world).await;
    world.begin_drain();
    let last = watch.next().await.expect("a status").expect("no error");
    assert_eq!(last.status(), ServingStatus::NotServing);
    for end in [
        watch.next().await.expect("an end").map(drop),
        reflection.next().await.expect("an end").map(drop),
    ] {
        assert_eq!(end.expect_err("an end").code(), Code::Unavailable);
    }
    let stopped = tokio::time::timeout(SHORT, world.stop());
    stopped.await.expect("the drain is short");
}

/// The answer to a call that ended is sent before its connection is closed, however slowly
/// its caller reads.
#[tokio::test]
async fn an_answer_on_its_way_is_sent_before_the_end() {
    let world = World::start().await;
    let wire = Wire::connect(world.address).await;
    let list = call("/jebbit.segmentrelay.v1.IntegrationService/ListIntegrations");
    for number in 0..40 {
        let integration_id = format!("integration-{number:02}");
        let display_name = "n".repeat(100);
        let integration = Integration {
            integration_id,
            display_name,
            mappings: (0..40)
                .map(|n| mapping(&format!("attribute-{n:030}")))
                .collect(),
            ..acme()
        };
        world.create(integration).await;
    }
    let message = framed(&ListIntegrationsRequest::default());
    let (answer, mut stream) = wire.open(list, false).await.expect("opened");
    stream.send_data(message, true).expect("sent");
    let (head, mut body) = within(answer).await.expect("answered").into_parts();
    assert_eq!(head.status, 200);
    // The whole window is full of it, and more is to come.
    let first = within(body.data()).await.expect("data").expect("no error");
    world.begin_drain();
    // Its connection is asked to end, and no new call is taken by then.
    let refused = async {
        while TcpStream::connect(world.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    within(refused).await;
    let mut bytes = first.len();
    body.flow_control().release_capacity(bytes).expect("read");
    while let Some(data) = within(body.data()).await {
        let data = data.expect("not cut off");
        bytes += data.len();
        body.flow_control()
            .release_capacity(data.len())
            .expect("read");
    }
    assert!(bytes > 65_535, "more than a window: {bytes}");
    let trailers = body.trailers().await.expect("ended").expect("trailers");
    assert_eq!(trailers["grpc-status"], "0");
    world.stop().await;
}

/// A collector that takes connections and never answers.
#[tokio::test]
async fn a_silent_collector_does_not_hold_a_drain() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = silent.local_addr().expect("an address");
    let (_sandbox, urls) = lasting_sandbox().await;
    let directory = tempfile::tempdir().expect("a directory");
    for protocol in ["grpc", "http"] {
        let file = directory.path().join("relay.toml");
        let settings = format!(
            "[log]\nfilter = \"info\"\n[otlp]\nprotocol = \"{protocol}\"\n\
             [server]\ndrain_timeout_ms = 8000\n"
        );
        std::fs::write(&file, settings).expect("written");
        let outbox = directory.path().join(protocol);
        let mut relay = Process::start_against(&outbox, &urls, &file, address).await;
        let mut integrations = IntegrationServiceClient::new(relay.channel.clone());
        let request = ListIntegrationsRequest::default();
        integrations
            .list_integrations(request)
            .await
            .expect("works");
        let ended = tokio::time::timeout(SHORT, relay.terminate());
        ended
            .await
            .unwrap_or_else(|_| panic!("{protocol}: the drain is long"));
    }
}
