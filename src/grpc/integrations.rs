//! IntegrationService.

use std::sync::Arc;

use prost::Message;
use serde_json::Value;
use tonic::{Request, Response, Status};

use super::{
    RelayError, Services,
    accept::{check_access, pass},
};
use crate::{
    audit::Entry,
    event::{self, EventType, message_id},
    integration::{Integration, IntegrationId, changed_fields},
    mapping,
    notice::{Happening, Notice},
    outbox::OutboxError,
    permission::Caller,
    proto::{
        self, CreateIntegrationRequest, CreateIntegrationResponse, DeleteIntegrationRequest,
        DeleteIntegrationResponse, GetIntegrationRequest, GetIntegrationResponse,
        IntegrationHealth, IntegrationTestResult, ListIntegrationsRequest,
        ListIntegrationsResponse, TestIntegrationRequest, TestIntegrationResponse,
        UpdateIntegrationRequest, UpdateIntegrationResponse,
        server::integration_service_server::IntegrationService,
    },
    region::Region,
    time::UnixMillis,
};

/// Whose events a test sends. `example.com` belongs to nobody (RFC 2606).
const TEST_EMAIL: &str = "segment-relay-test@example.com";

#[derive(Clone)]
pub(super) struct Integrations(pub(super) Services);

#[tonic::async_trait]
impl IntegrationService for Integrations {
    async fn create_integration(
        &self,
        request: Request<CreateIntegrationRequest>,
    ) -> Result<Response<CreateIntegrationResponse>, Status> {
        let (caller, permit) = self.0.enter(&request)?;
        let spec = required(request.into_inner().integration)?;
        if !caller.may_touch(&spec.integration_id) {
            return Err(RelayError::OutOfScope.into());
        }
        let this = self.clone();
        let change = async move {
            let created = this.0.registry.create(&spec, UnixMillis::now()).await?;
            this.tell(&caller, Happening::Created, &created, &[]).await;
            Ok(created)
        };
        let created = self.0.carry_out(permit, change).await?;
        let integration = Some(created.to_public());
        Ok(Response::new(CreateIntegrationResponse { integration }))
    }

    async fn get_integration(
        &self,
        request: Request<GetIntegrationRequest>,
    ) -> Result<Response<GetIntegrationResponse>, Status> {
        let (caller, _permit) = self.0.enter(&request)?;
        let held = Arc::clone(&pass(&request)?.bytes);
        let id = request.into_inner().integration_id;
        check_access(&caller, &id)?;
        let registry = &self.0.registry;
        let found = registry.find_stored(&id).await.map_err(RelayError::from)?;
        let mut public = found.to_public();
        public.health = Some(self.health(&found).await.map_err(RelayError::from)?);
        self.0.usage.hold_answer(&held, public.encoded_len())?;
        Ok(Response::new(GetIntegrationResponse {
            integration: Some(public),
        }))
    }

    async fn list_integrations(
        &self,
        request: Request<ListIntegrationsRequest>,
    ) -> Result<Response<ListIntegrationsResponse>, Status> {
        let (caller, _permit) = self.0.enter(&request)?;
        let held = Arc::clone(&pass(&request)?.bytes);
        let request = request.into_inner();
        let size = super::page_size(request.page_size)?;
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(IntegrationId::new(token).ok_or_else(|| {
                let rule = "not a token of this service; start again without one";
                RelayError::invalid("page_token", "INVALID_FORMAT", rule)
            })?),
        };
        self.0.registry.refresh().await.map_err(RelayError::from)?;
        let scope = &caller.scope;
        let listed = self.0.registry.list(after.as_ref(), scope, size + 1);
        let public = listed.iter().map(|one| one.to_public());
        let (integrations, bytes, more) = super::page_of(public, size);
        self.0.usage.hold_answer(&held, bytes)?;
        let last = integrations
            .last()
            .filter(|_| more)
            .map(|last| last.integration_id.clone());
        Ok(Response::new(ListIntegrationsResponse {
            integrations,
            next_page_token: last.unwrap_or_default(),
        }))
    }

    async fn update_integration(
        &self,
        request: Request<UpdateIntegrationRequest>,
    ) -> Result<Response<UpdateIntegrationResponse>, Status> {
        let (caller, permit) = self.0.enter(&request)?;
        let request = request.into_inner();
        let change = required(request.integration)?;
        check_access(&caller, &change.integration_id)?;
        let mask = request.update_mask.unwrap_or_default().paths;
        let this = self.clone();
        let change = async move {
            let registry = &this.0.registry;
            let updated = registry.update(&change, &mask, UnixMillis::now()).await?;
            let changed = changed_fields(&updated.before, &updated.now);
            let facts = [("changed", changed.join(" ").into())];
            this.tell(&caller, Happening::Updated, &updated.now, &facts)
                .await;
            if let Some(happening) = Happening::of_pause(&updated.before, &updated.now) {
                this.tell(&caller, happening, &updated.now, &[]).await;
            }
            Ok(updated.now)
        };
        let updated = self.0.carry_out(permit, change).await?;
        let integration = Some(updated.to_public());
        Ok(Response::new(UpdateIntegrationResponse { integration }))
    }

    async fn delete_integration(
        &self,
        request: Request<DeleteIntegrationRequest>,
    ) -> Result<Response<DeleteIntegrationResponse>, Status> {
        let (caller, permit) = self.0.enter(&request)?;
        let request = request.into_inner();
        let found = self.0.integration(&caller, &request.integration_id).await?;
        let this = self.clone();
        let change = async move {
            let (id, etag) = (&request.integration_id, &request.etag);
            let deleted = this.0.registry.delete(id, etag, request.force).await?;
            this.0.vitals.forget(found.id());
            this.0.sources.forget(found.id());
            let facts = [("waiting_events", deleted.into())];
            this.tell(&caller, Happening::Deleted, &found, &facts).await;
            Ok(deleted)
        };
        let deleted = self.0.carry_out(permit, change).await?;
        Ok(Response::new(DeleteIntegrationResponse {
            dead_lettered_events: deleted,
        }))
    }

    async fn test_integration(
        &self,
        request: Request<TestIntegrationRequest>,
    ) -> Result<Response<TestIntegrationResponse>, Status> {
        let (caller, permit) = self.0.enter(&request)?;
        let id = request.into_inner().integration_id;
        check_access(&caller, &id)?;
        let found = self.0.registry.find_stored_open(&id).await;
        let integration = found.map_err(RelayError::from)?;
        // Among the requests of deliveries, and given up where the caller goes meanwhile.
        let turn = self.0.turns.take(integration.id()).await;
        let this = self.clone();
        let test = async move {
            let mut results = Vec::new();
            for region in integration.regions() {
                results.push(this.test(&integration, region).await?);
            }
            drop(turn);
            let facts = results.iter().map(outcome).collect::<Vec<_>>();
            let facts = [("results", facts.join(", ").into())];
            this.tell(&caller, Happening::Tested, &integration, &facts)
                .await;
            Ok(results)
        };
        let results = self.0.carry_out(permit, test).await?;
        Ok(Response::new(TestIntegrationResponse { results }))
    }
}

impl Integrations {
    /// Notes a change for the audit, and tells people.
    async fn tell(
        &self,
        caller: &Caller,
        happening: Happening,
        integration: &Integration,
        facts: &[(&str, Value)],
    ) {
        let detail: Vec<_> = facts
            .iter()
            .map(|(name, fact)| format!("{name}: {fact}"))
            .collect();
        self.0.audit.note(&Entry {
            caller: &caller.name,
            action: happening.as_str(),
            integration: integration.id().name(),
            detail: detail.join("; "),
        });
        let mut all = vec![
            ("display_name", integration.display_name.as_str().into()),
            ("caller", caller.name.as_str().into()),
        ];
        all.extend_from_slice(facts);
        let notice = Notice::new(happening, integration.id(), &all, UnixMillis::now());
        self.0.notices.tell(notice).await;
    }

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
            condition: self.0.sources.condition(integration.id()).to_proto().into(),
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
        let mapped = mapping::map(&marked, (&capture).into(), UnixMillis::now())?;
        let events = event::build(marked.id(), &mapped)
            .map_err(|found| RelayError::Capture(mapping::CaptureFault::Invalid(found)))?;
        let (Some(events), Some(write_key)) = (events, integration.write_key(region)) else {
            return Err(mapping::CaptureFault::RegionNotConfigured(region).into());
        };
        let pair = EventType::ALL.map(|event| events.get(event).to_vec().into());
        let sent = self.0.segment.send(region, write_key, pair.into(), 0);
        let answer = sent.await;
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

/// A test's result in a word.
fn outcome(result: &IntegrationTestResult) -> String {
    let region = result.data_region().as_str_name();
    format!("{region} HTTP {}", result.http_status)
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
