//! IntegrationService.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::{RelayError, Services};
use crate::{
    event::{self, EventType, message_id},
    integration::{Integration, IntegrationId},
    mapping,
    outbox::OutboxError,
    proto::{
        self, CreateIntegrationRequest, CreateIntegrationResponse, DeleteIntegrationRequest,
        DeleteIntegrationResponse, GetIntegrationRequest, GetIntegrationResponse,
        IntegrationHealth, IntegrationTestResult, ListIntegrationsRequest,
        ListIntegrationsResponse, TestIntegrationRequest, TestIntegrationResponse,
        UpdateIntegrationRequest, UpdateIntegrationResponse,
        integration_service_server::IntegrationService,
    },
    region::Region,
    time::UnixMillis,
};

/// Whose events a test sends. `example.com` belongs to nobody (RFC 2606).
const TEST_EMAIL: &str = "segment-relay-test@example.com";

pub(super) struct Integrations(pub(super) Services);

#[tonic::async_trait]
impl IntegrationService for Integrations {
    async fn create_integration(
        &self,
        request: Request<CreateIntegrationRequest>,
    ) -> Result<Response<CreateIntegrationResponse>, Status> {
        let _permit = self.0.gate.enter()?;
        let spec = required(request.into_inner().integration)?;
        let created = self.0.registry.create(&spec, UnixMillis::now()).await;
        let created = created.map_err(RelayError::from)?;
        tracing::info!(integration = %created.id(), "integration created");
        let integration = Some(created.to_public());
        Ok(Response::new(CreateIntegrationResponse { integration }))
    }

    async fn get_integration(
        &self,
        request: Request<GetIntegrationRequest>,
    ) -> Result<Response<GetIntegrationResponse>, Status> {
        let _permit = self.0.gate.enter()?;
        let found = self.0.integration(&request.into_inner().integration_id)?;
        let mut public = found.to_public();
        public.health = Some(self.health(&found).await.map_err(RelayError::from)?);
        Ok(Response::new(GetIntegrationResponse {
            integration: Some(public),
        }))
    }

    async fn list_integrations(
        &self,
        request: Request<ListIntegrationsRequest>,
    ) -> Result<Response<ListIntegrationsResponse>, Status> {
        let _permit = self.0.gate.enter()?;
        let request = request.into_inner();
        let size = super::page_size(request.page_size)?;
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(IntegrationId::new(token).ok_or_else(|| {
                let rule = "not a token of this service; start again without one";
                RelayError::invalid("page_token", "INVALID_FORMAT", rule)
            })?),
        };
        let mut page = self.0.registry.list(after.as_ref(), size + 1);
        let more = page.len() > size;
        page.truncate(size);
        let last = page
            .last()
            .filter(|_| more)
            .map(|last| last.id().as_str().to_owned());
        Ok(Response::new(ListIntegrationsResponse {
            integrations: page.iter().map(|one| one.to_public()).collect(),
            next_page_token: last.unwrap_or_default(),
        }))
    }

    async fn update_integration(
        &self,
        request: Request<UpdateIntegrationRequest>,
    ) -> Result<Response<UpdateIntegrationResponse>, Status> {
        let _permit = self.0.gate.enter()?;
        let request = request.into_inner();
        let change = required(request.integration)?;
        let mask = request.update_mask.unwrap_or_default().paths;
        let updated = self
            .0
            .registry
            .update(change, &mask, UnixMillis::now())
            .await;
        let updated = updated.map_err(RelayError::from)?;
        tracing::info!(integration = %updated.id(), "integration updated");
        let integration = Some(updated.to_public());
        Ok(Response::new(UpdateIntegrationResponse { integration }))
    }

    async fn delete_integration(
        &self,
        request: Request<DeleteIntegrationRequest>,
    ) -> Result<Response<DeleteIntegrationResponse>, Status> {
        let _permit = self.0.gate.enter()?;
        let request = request.into_inner();
        let found = self.0.integration(&request.integration_id)?;
        let deleted = self
            .0
            .registry
            .delete(&request.integration_id, &request.etag, request.force)
            .await
            .map_err(RelayError::from)?;
        self.0.vitals.forget(found.id());
        tracing::info!(integration = %found.id(), waiting = deleted, "integration deleted");
        Ok(Response::new(DeleteIntegrationResponse {
            dead_lettered_events: deleted,
        }))
    }

    async fn test_integration(
        &self,
        request: Request<TestIntegrationRequest>,
    ) -> Result<Response<TestIntegrationResponse>, Status> {
        let _permit = self.0.gate.enter()?;
        let integration = self.0.integration(&request.into_inner().integration_id)?;
        let tests = integration
            .regions()
            .map(|region| self.test(&integration, region));
        let results = futures_util::future::try_join_all(tests).await?;
        Ok(Response::new(TestIntegrationResponse { results }))
    }
}

impl Integrations {
    async fn health(&self, integration: &Integration) -> Result<IntegrationHealth, OutboxError> {
        let backlog = self.0.outbox.backlog(integration.id()).await?;
        let vitals = self.0.vitals.get(integration.id());
        let (last_error_time, last_error) = vitals.last_error.unzip();
        Ok(IntegrationHealth {
            lanes: backlog.lanes,
            waiting_events: backlog.events,
            oldest_waiting_time: backlog.oldest.map(UnixMillis::to_proto),
            last_success_time: vitals.last_success.map(UnixMillis::to_proto),
            last_error_time: last_error_time.map(UnixMillis::to_proto),
            last_error: last_error.unwrap_or_default(),
        })
    }

    /// Sends a pair that is formed like any other, but for its mark.
    async fn test(
        &self,
        integration: &Arc<Integration>,
        region: Region,
    ) -> Result<IntegrationTestResult, RelayError> {
        let capture = test_capture(region, UnixMillis::now());
        let marked = marked_copy(integration)?;
        let mapped = mapping::map(&marked, &capture, UnixMillis::now())?;
        let events = event::build(marked.id(), &mapped)
            .map_err(|found| RelayError::Capture(mapping::CaptureFault::Invalid(found)))?;
        let (Some(events), Some(write_key)) = (events, integration.write_key(region)) else {
            return Err(mapping::CaptureFault::RegionNotConfigured(region).into());
        };
        let pair = EventType::ALL.map(|event| events.get(event));
        let answer = self.0.segment.send(region, write_key, &pair, 0).await;
        let id = |event| message_id(marked.id(), &mapped.capture_id, event);
        Ok(IntegrationTestResult {
            data_region: region.to_proto().into(),
            http_status: answer.http_status().into(),
            latency: prost_types::Duration::try_from(answer.latency).ok(),
            error: answer.error(),
            message_ids: EventType::ALL.map(id).into(),
        })
    }
}

/// The same integration without mappings: a test has no answers to map, only
/// its mark, which is forwarded.
fn marked_copy(integration: &Integration) -> Result<Integration, RelayError> {
    let spec = proto::Integration {
        mappings: Vec::new(),
        unmapped_attributes: proto::UnmappedAttributes::Forward.into(),
        ..integration.to_spec_with_secrets()
    };
    Integration::new(&spec, integration.revision.clone()).map_err(RelayError::InvalidRequest)
}

fn test_capture(region: Region, now: UnixMillis) -> proto::Capture {
    let mark = proto::AttributeValue {
        kind: Some(proto::attribute_value::Kind::BoolValue(true)),
    };
    proto::Capture {
        // Each test is to be seen, so each has message ids of its own.
        capture_id: format!("test-{}-{:016x}", now.0, fastrand::u64(..)),
        email: TEST_EMAIL.to_owned(),
        campaign_id: "segment-relay-test".to_owned(),
        campaign_name: "Test of the integration".to_owned(),
        session_id: format!("test-{}", now.0),
        traffic_source: "segment-relay".to_owned(),
        data_region: region.to_proto().into(),
        attributes: [("test".to_owned(), mark)].into(),
        ..proto::Capture::default()
    }
}

fn required(integration: Option<proto::Integration>) -> Result<proto::Integration, RelayError> {
    integration
        .ok_or_else(|| RelayError::invalid("integration", "REQUIRED", "give the integration"))
}
