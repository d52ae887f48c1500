//! Two relays, of which one has heard nothing of what the other changes.

use tokio_stream::StreamExt;

use super::*;
use crate::{
    grpc::{integrations::Integrations, relay::Relay},
    outbox::{LeaseBudget, LeaseScope},
    proto::{
        CaptureBatchRequest, CaptureRequest, CaptureResult, CaptureStreamRequest,
        CaptureStreamResponse, CreateIntegrationRequest, DeleteIntegrationRequest, DeliveryState,
        UpdateIntegrationRequest,
        segment_relay_client::SegmentRelayClient,
        server::{
            integration_service_server::IntegrationService,
            segment_relay_server::SegmentRelayServer,
        },
    },
};

pub(super) type Client = SegmentRelayClient<SegmentRelayServer<Relay>>;

/// Two relays, of which the second one knows of `acme` as the first one has made it.
pub(super) struct World {
    pub(super) outbox: Arc<SharedDouble>,
    pub(super) one: Integrations,
    pub(super) other: Services,
}

impl World {
    pub(super) async fn new() -> Self {
        let outbox = SharedDouble::new();
        let one = Integrations(relay(&outbox, Audit::new()).await);
        let other = relay(&outbox, Audit::new()).await;
        let message = CreateIntegrationRequest {
            integration: Some(acme()),
        };
        let created = one.create_integration(request(message)).await;
        created.expect("created");
        other.registry.refresh().await.expect("read");
        Self { outbox, one, other }
    }

    pub(super) fn client(&self) -> Client {
        SegmentRelayClient::new(SegmentRelayServer::new(Relay(self.other.clone())))
    }

    /// The first relay disables it; the second one does not hear of that.
    pub(super) async fn disable(&self) {
        let message = UpdateIntegrationRequest {
            integration: Some(Integration {
                integration_id: "acme".into(),
                enabled: Some(false),
                ..Integration::default()
            }),
            update_mask: None,
        };
        let updated = self.one.update_integration(request(message)).await;
        updated.expect("updated");
    }

    /// The first relay changes what forms the events.
    pub(super) async fn rename_event(&self) {
        let message = UpdateIntegrationRequest {
            integration: Some(Integration {
                integration_id: "acme".into(),
                event_name: "Quiz Completed".into(),
                ..Integration::default()
            }),
            update_mask: None,
        };
        let updated = self.one.update_integration(request(message)).await;
        updated.expect("updated");
    }

    pub(super) async fn delete(&self) {
        let message = DeleteIntegrationRequest {
            integration_id: "acme".into(),
            force: true,
            ..DeleteIntegrationRequest::default()
        };
        let deleted = self.one.delete_integration(request(message)).await;
        deleted.expect("deleted");
    }

    /// Other relays change it before each of the next submissions.
    pub(super) fn keep_changing(&self, times: u64) {
        for version in 0..times {
            self.outbox
                .meanwhile(stored(&format!("etag-{version}"), version));
        }
    }

    pub(super) async fn capture(&self, id: &str) -> Result<CaptureResult, Status> {
        let message = CaptureRequest {
            integration_id: "acme".into(),
            capture: Some(capture(id)),
            ..CaptureRequest::default()
        };
        let answer = self.client().capture(request(message)).await?;
        Ok(answer.into_inner().result.expect("a result"))
    }

    pub(super) async fn batch(
        &self,
        captures: Vec<proto::Capture>,
    ) -> Result<Vec<CaptureResult>, Status> {
        let message = CaptureBatchRequest {
            integration_id: "acme".into(),
            captures,
            ..CaptureBatchRequest::default()
        };
        let answer = self.client().capture_batch(request(message)).await?;
        Ok(answer.into_inner().results)
    }

    pub(super) async fn stream(&self, captures: Vec<proto::Capture>) -> Vec<CaptureStreamResponse> {
        let messages = captures.into_iter().map(message);
        let messages = tokio_stream::iter(messages.collect::<Vec<_>>());
        let answers = self.client().capture_stream(request(messages)).await;
        let answers = answers.expect("a stream").into_inner();
        answers
            .map(|answer| answer.expect("an answer"))
            .collect()
            .await
    }

    /// The reason for which a capture is refused in one of the three ways.
    pub(super) async fn capture_in(&self, way: usize, capture: proto::Capture) -> String {
        match way {
            0 => {
                let message = CaptureRequest {
                    integration_id: "acme".into(),
                    capture: Some(capture),
                    ..CaptureRequest::default()
                };
                let answer = self.client().capture(request(message)).await;
                answer.err().map_or(String::new(), |status| reason(&status))
            }
            1 => word(&self.batch(vec![capture]).await.expect("answered")[0]).to_owned(),
            _ => {
                let answers = self.stream(vec![capture]).await;
                word(answers[0].result.as_ref().expect("a result")).to_owned()
            }
        }
    }

    /// The first relay adds the other region.
    pub(super) async fn add_region(&self) {
        let mut both = acme();
        both.credentials.push(Credential {
            data_region: DataRegion::Eu.into(),
            write_key: "a-write-key-of-the-eu".into(),
            ..Credential::default()
        });
        let message = UpdateIntegrationRequest {
            integration: Some(both),
            update_mask: None,
        };
        let updated = self.one.update_integration(request(message)).await;
        updated.expect("updated");
    }

    /// The captures that wait, in the order of acceptance, with their mapping versions.
    pub(super) async fn waiting(&self) -> Vec<(String, u64)> {
        let lanes = self.outbox.waiting_lanes().await.expect("read");
        assert_eq!(lanes.len(), 1, "all captures are of one person");
        let budget = LeaseBudget {
            max_events: 1_000,
            max_bytes: 1_000_000,
        };
        let leased = self
            .outbox
            .lease(&lanes[0], budget, LeaseScope::All)
            .await
            .expect("leased");
        let records = leased.iter().map(|capture| &capture.record);
        let both = |record: &Arc<crate::status::CaptureRecord>| {
            (record.capture_id.clone(), record.mapping_version)
        };
        records.map(both).collect()
    }
}

pub(super) fn message(capture: proto::Capture) -> CaptureStreamRequest {
    CaptureStreamRequest {
        correlation_id: capture.capture_id.clone(),
        integration_id: "acme".into(),
        capture: Some(capture),
    }
}

pub(super) fn states(result: &CaptureResult) -> Vec<DeliveryState> {
    result.events.iter().map(|event| event.state()).collect()
}

pub(super) fn word(result: &CaptureResult) -> &str {
    result.error.as_ref().map_or("", |error| &error.reason)
}

pub(super) fn skipped() -> Vec<DeliveryState> {
    vec![DeliveryState::Skipped; 2]
}
