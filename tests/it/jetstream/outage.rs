//! NATS away: captures are refused, health follows, and all goes on by itself.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use segment_relay::proto::{
    CaptureRequest, CaptureResult, CreateIntegrationRequest, DeliveryState, WaitFor,
    integration_service_client::IntegrationServiceClient, segment_relay_client::SegmentRelayClient,
};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;

use super::relays::{Watched, process};
use crate::{
    harness::{PATIENCE, acme, init_streams, numbered, states},
    nats_server::Server,
};

pub(crate) async fn create(channel: &Channel) {
    let request = CreateIntegrationRequest {
        integration: Some(acme()),
    };
    let mut client = IntegrationServiceClient::new(channel.clone());
    client.create_integration(request).await.expect("created");
}

pub(crate) async fn capture(
    channel: &Channel,
    number: usize,
    wait_for: WaitFor,
) -> Result<CaptureResult, Status> {
    let mut request = Request::new(CaptureRequest {
        integration_id: "acme".into(),
        capture: Some(numbered(number)),
        wait_for: wait_for.into(),
    });
    request.set_timeout(PATIENCE);
    let answer = SegmentRelayClient::new(channel.clone())
        .capture(request)
        .await?;
    Ok(answer.into_inner().result.expect("a result"))
}

/// Waits until health says so.
async fn health(channel: &Channel, wanted: ServingStatus) {
    let deadline = Instant::now() + PATIENCE;
    let mut client = HealthClient::new(channel.clone());
    loop {
        let answer = client
            .check(HealthCheckRequest::default())
            .await
            .expect("answered");
        if answer.into_inner().status() == wanted {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "health does not become {wanted:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_nats_is_away_captures_are_refused_and_it_mends_itself() {
    let Some(mut server) = Server::start() else {
        return;
    };
    init_streams(&[server.url()], 1).await;
    let watched = Arc::new(Watched::default());
    let endpoint = watched.listen().await;
    let directory = tempfile::tempdir().expect("a directory");
    let relay = process(&server.url(), directory.path(), &endpoint, 1).await;
    create(&relay.channel).await;
    capture(&relay.channel, 1, WaitFor::Delivered)
        .await
        .expect("accepted");
    // Accepted before and sent after.
    watched.is_down.store(true, Ordering::Relaxed);
    capture(&relay.channel, 2, WaitFor::Accepted)
        .await
        .expect("accepted");

    server.kill();
    health(&relay.channel, ServingStatus::NotServing).await;
    let refused = capture(&relay.channel, 3, WaitFor::Accepted)
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(
        refused.get_error_details().retry_info().is_some(),
        "{refused}"
    );

    watched.is_down.store(false, Ordering::Relaxed);
    server.run();
    health(&relay.channel, ServingStatus::Serving).await;
    for number in [2, 3] {
        let result = capture(&relay.channel, number, WaitFor::Delivered)
            .await
            .expect("accepted");
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
        assert_eq!(result.duplicate, number == 2, "{number}");
    }
    assert_eq!(watched.count(), 6);
}
