//! Connections of strangers leave the relay the descriptors that it needs.

use segment_relay::proto::{
    CaptureRequest, CreateIntegrationRequest, DeliveryState, WaitFor,
    integration_service_client::IntegrationServiceClient, segment_relay_client::SegmentRelayClient,
};
use tokio::net::TcpStream;

use crate::{
    harness::{acme, states, worked_example},
    process::{Process, lasting_sandbox},
};

const LIMIT: u32 = 300;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_idle_connections_than_descriptors_do_not_stop_deliveries() {
    let (_sandbox, urls) = lasting_sandbox().await;
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = directory.path().join("outbox");
    let mut relay = Process::start_limited(&outbox, &urls, LIMIT).await;
    relay
        .log
        .line(|line| line.contains("max_connections is lowered"))
        .await;
    let request = CreateIntegrationRequest {
        integration: Some(acme()),
    };
    IntegrationServiceClient::new(relay.channel.clone())
        .create_integration(request)
        .await
        .expect("created");
    let mut strangers = Vec::new();
    for _ in 0..LIMIT * 2 {
        // The system takes them; the relay does once it has room.
        strangers.push(TcpStream::connect(&relay.address).await.expect("connects"));
    }
    for number in 0..20 {
        let mut capture = worked_example();
        capture.capture_id = format!("c-{number}");
        let request = CaptureRequest {
            integration_id: "acme".into(),
            capture: Some(capture),
            wait_for: WaitFor::Delivered.into(),
        };
        let mut client = SegmentRelayClient::new(relay.channel.clone());
        let result = client
            .capture(request)
            .await
            .expect("accepted")
            .into_inner();
        let events = result.result.expect("a result").events;
        assert_eq!(states(&events), [DeliveryState::Delivered; 2]);
    }
    drop(strangers);
    relay.terminate().await;
}
