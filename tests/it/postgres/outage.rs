//! A database that is away: captures are refused, health follows, all goes on by itself.

use segment_relay::proto::{DeliveryState, WaitFor};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;

use super::{Fleet, capture_of};
use crate::{
    harness::{PATIENCE, acme, states},
    postgres_server,
};

async fn health_becomes(fleet: &Fleet, wanted: ServingStatus) {
    let mut client = HealthClient::new(fleet.channel(0));
    let becomes = async {
        loop {
            let answer = client.check(HealthCheckRequest::default()).await;
            if answer.expect("answered").into_inner().status() == wanted {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let became = tokio::time::timeout(PATIENCE, becomes).await;
    became.unwrap_or_else(|_| panic!("health does not become {wanted:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn captures_are_refused_meanwhile_and_what_waits_is_delivered_afterwards() {
    let Some(mut server) = postgres_server::Server::start_own(&[]) else {
        return;
    };
    let fleet = Fleet::start(server.url(), 1).await;
    fleet.create(0, acme()).await.expect("created");
    fleet.refuse(503);
    let before = fleet.capture(0, capture_of(1, "before"), WaitFor::Accepted);
    before.await.expect("accepted");

    server.kill9();
    health_becomes(&fleet, ServingStatus::NotServing).await;
    let refused = fleet.capture(0, capture_of(2, "meanwhile"), WaitFor::Accepted);
    let refused = refused.await.expect_err("refused");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    let details = refused.get_error_details();
    assert!(details.retry_info().is_some(), "{refused}");

    fleet.behave();
    server.start_again();
    health_becomes(&fleet, ServingStatus::Serving).await;
    for (person, id) in [(1, "before"), (2, "meanwhile")] {
        let result = fleet.capture(0, capture_of(person, id), WaitFor::Delivered);
        let result = result.await.expect("accepted");
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
        assert_eq!(result.duplicate, id == "before");
    }
    fleet.arrived(4).await;
}
