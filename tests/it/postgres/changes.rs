//! Changes of integrations at one relay, and calls at another right after the answer.

use prost_types::FieldMask;
use segment_relay::proto::{
    CaptureRequest, DeliveryState, GetIntegrationRequest, Integration, UpdateIntegrationRequest,
    WaitFor, integration_service_client::IntegrationServiceClient,
    segment_relay_client::SegmentRelayClient,
};
use tonic::{Code, Request, Status};

use super::{Fleet, capture_of};
use crate::{
    harness::{PATIENCE, acme, states},
    postgres_server,
};

const ROUNDS: usize = 20;

impl Fleet {
    async fn update(
        &self,
        relay: usize,
        path: &str,
        integration: Integration,
    ) -> Result<Integration, Status> {
        let request = UpdateIntegrationRequest {
            integration: Some(integration),
            update_mask: Some(FieldMask {
                paths: vec![path.to_owned()],
            }),
        };
        let mut client = IntegrationServiceClient::new(self.channel(relay));
        let answer = client.update_integration(request).await?.into_inner();
        Ok(answer.integration.expect("an integration"))
    }

    async fn get(&self, relay: usize, id: &str) -> Result<Integration, Status> {
        let request = GetIntegrationRequest {
            integration_id: id.into(),
        };
        let mut client = IntegrationServiceClient::new(self.channel(relay));
        let answer = client.get_integration(request).await?.into_inner();
        Ok(answer.integration.expect("an integration"))
    }
}

fn named(display_name: &str, etag: &str) -> Integration {
    Integration {
        integration_id: "acme".into(),
        display_name: display_name.into(),
        etag: etag.into(),
        ..Integration::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_holds_for_the_next_capture_at_the_other_relay() {
    let Some(database) = postgres_server::database() else {
        return;
    };
    let fleet = Fleet::start(database.url(), 2).await;
    fleet.create(0, acme()).await.expect("created");
    for round in 0..ROUNDS {
        let (one, other, enabled) = (round / 2 % 2, (round / 2 + 1) % 2, round % 2 == 1);
        let switched = Integration {
            integration_id: "acme".into(),
            enabled: Some(enabled),
            ..Integration::default()
        };
        let switched = fleet.update(one, "enabled", switched).await;
        switched.expect("updated");
        let capture = capture_of(round, &format!("c-{round}"));
        let result = fleet.capture(other, capture, WaitFor::Delivered).await;
        let wanted = match enabled {
            true => DeliveryState::Delivered,
            false => DeliveryState::Skipped,
        };
        let result = result.expect("accepted");
        assert_eq!(states(&result.events), [wanted; 2], "round {round}");
    }
    fleet.arrived(ROUNDS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_is_known_at_the_other_relay_at_once() {
    let Some(database) = postgres_server::database() else {
        return;
    };
    let fleet = Fleet::start(database.url(), 2).await;
    for round in 0..ROUNDS {
        let (one, other) = (round % 2, (round + 1) % 2);
        let id = format!("new-{round}");
        let integration = Integration {
            integration_id: id.clone(),
            ..acme()
        };
        let created = fleet.create(one, integration).await.expect("created");
        let found = fleet.get(other, &id).await.expect("known");
        assert_eq!(found.etag, created.etag);
        // Delivered by whichever relay the integration prefers.
        let mut request = Request::new(CaptureRequest {
            integration_id: id,
            capture: Some(capture_of(round, "first")),
            wait_for: WaitFor::Delivered.into(),
        });
        request.set_timeout(PATIENCE);
        let mut client = SegmentRelayClient::new(fleet.channel(other));
        let answer = client.capture(request).await.expect("accepted");
        let events = answer.into_inner().result.expect("a result").events;
        assert_eq!(states(&events), [DeliveryState::Delivered; 2], "{round}");
    }
    fleet.arrived(2 * ROUNDS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_without_an_etag_are_applied_and_a_stale_etag_is_refused() {
    let Some(database) = postgres_server::database() else {
        return;
    };
    let fleet = Fleet::start(database.url(), 2).await;
    let created = fleet.create(0, acme()).await.expect("created");
    for round in 0..ROUNDS {
        // In turns, and at once.
        let name = format!("round {round}");
        let updated = fleet.update(round % 2, "display_name", named(&name, ""));
        updated.await.expect("updated");
        let seen = fleet.get((round + 1) % 2, "acme").await.expect("there");
        assert_eq!(seen.display_name, name);
        let (one, other) = tokio::join!(
            fleet.update(0, "display_name", named("one", "")),
            fleet.update(1, "display_name", named("other", ""))
        );
        let (one, other) = (one.expect("updated"), other.expect("updated"));
        assert_ne!(one.etag, other.etag);
    }
    for relay in [0, 1] {
        let stale = named("stale", &created.etag);
        let refused = fleet.update(relay, "display_name", stale).await;
        assert_eq!(refused.expect_err("stale").code(), Code::Aborted);
    }
}
