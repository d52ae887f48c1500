//! What the relay counts and times. One set of instruments, whoever reads them;
//! where nobody does, each call is one look at an empty option.
//!
//! Cardinality is bounded: integrations beyond a number share the label `other`,
//! and every other label comes from a closed list.

mod backlog;
mod endpoint;
mod instruments;
mod process;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use opentelemetry::{KeyValue, metrics::MeterProvider};
use opentelemetry_otlp::MetricExporter;
use opentelemetry_sdk::{
    Resource,
    metrics::{PeriodicReader, SdkMeterProvider},
};

use crate::{
    config::Endpoint, integration::IntegrationId, region::Region, segment::Answer, telemetry,
};

pub use backlog::{BacklogBoard, BacklogOf, DiskSpace};
pub use endpoint::serve;
use instruments::Instruments;

/// Longest time for the last metrics to leave.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Label of the integrations that are too many to have one each.
const OTHER: &str = "other";

/// Counts and times. Cheap to clone.
#[derive(Clone, Default)]
pub struct Metrics(Option<Arc<Inner>>);

struct Inner {
    instruments: Instruments,
    labels: Labels,
    provider: SdkMeterProvider,
    registry: prometheus::Registry,
}

/// A request to Segment that has ended.
pub struct AttemptFacts<'a> {
    /// Whose endpoint it went to.
    pub region: Region,
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// What came of it.
    pub answer: &'a Answer,
    /// The events in it.
    pub events: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// How a collector gets them.
pub struct Export {
    /// What sends them.
    pub exporter: MetricExporter,
    /// How often.
    pub interval: Duration,
    /// What is known of this process.
    pub resource: Resource,
}

/// Why metrics can't be set up.
#[derive(Debug, thiserror::Error)]
#[error("[metrics]: {0}")]
pub struct MetricsError(String);

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Metrics").field(&self.0.is_some()).finish()
    }
}

impl Metrics {
    /// Nobody reads them.
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Prometheus reads them, and a collector gets them.
    ///
    /// # Errors
    /// The exporter can't be set up.
    pub fn new(
        max_integrations: usize,
        board: Arc<BacklogBoard>,
        export: Option<Export>,
    ) -> Result<Self, MetricsError> {
        let registry = prometheus::Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .without_target_info()
            .build()
            .map_err(|error| MetricsError(error.to_string()))?;
        let mut provider = SdkMeterProvider::builder().with_reader(exporter);
        if let Some(export) = export {
            let reader = PeriodicReader::builder(export.exporter)
                .with_interval(export.interval)
                .build();
            provider = provider.with_reader(reader).with_resource(export.resource);
        }
        let provider = provider.build();
        let meter = provider.meter_with_scope(telemetry::scope());
        let instruments = Instruments::new(&meter);
        instruments::observe(&meter, &board, max_integrations);
        process::observe(&meter);
        Ok(Self(Some(Arc::new(Inner {
            instruments,
            labels: Labels::new(max_integrations),
            provider,
            registry,
        }))))
    }

    /// Whether somebody reads them.
    #[must_use]
    pub fn are_read(&self) -> bool {
        self.0.is_some()
    }

    /// All of them in Prometheus's text format; empty where nobody reads them.
    #[must_use]
    pub fn text(&self) -> String {
        let Some(inner) = &self.0 else {
            return String::new();
        };
        // Names and labels are ours: they can be encoded.
        prometheus::TextEncoder::new()
            .encode_to_string(&inner.registry.gather())
            .unwrap_or_default()
    }

    /// Ends the reading; a collector gets the last ones, for which it has two
    /// seconds.
    pub fn close(&self) {
        if let Some(inner) = &self.0
            && let Err(error) = inner.provider.shutdown_with_timeout(CLOSE_TIMEOUT)
        {
            tracing::debug!(%error, "metrics did not end cleanly");
        }
    }

    /// An rpc has ended.
    pub fn rpc(&self, method: &'static str, code: &'static str, took: Duration) {
        let Some(inner) = &self.0 else { return };
        let labels = [
            KeyValue::new("rpc.system.name", "grpc"),
            KeyValue::new("rpc.method", method),
            KeyValue::new("rpc.response.status_code", code),
        ];
        let seconds = took.as_secs_f64();
        inner.instruments.rpc_duration.record(seconds, &labels);
    }

    /// Captures were answered: `accepted`, `duplicate`, or the reason of a refusal.
    pub fn captures(&self, integration: &IntegrationId, outcome: &'static str, count: u64) {
        let Some(inner) = &self.0 else { return };
        let labels = [
            inner.labels.integration(integration),
            KeyValue::new("outcome", outcome),
        ];
        inner.instruments.captures.add(count, &labels);
    }

    /// Events have reached a state.
    pub fn events(
        &self,
        integration: &IntegrationId,
        event: &'static str,
        state: &'static str,
        reason: &'static str,
        count: u64,
    ) {
        let Some(inner) = &self.0 else { return };
        let labels = [
            inner.labels.integration(integration),
            KeyValue::new("type", event),
            KeyValue::new("state", state),
            KeyValue::new("reason", reason),
        ];
        inner.instruments.events.add(count, &labels);
    }

    /// An event was delivered so long after it was accepted.
    pub fn delivered_after(&self, region: Region, took: Duration) {
        let Some(inner) = &self.0 else { return };
        let labels = [KeyValue::new("region", region.name())];
        let seconds = took.as_secs_f64();
        inner.instruments.delivery_latency.record(seconds, &labels);
    }

    /// A request to Segment has ended.
    pub fn attempt(&self, attempt: &AttemptFacts<'_>) {
        let Some(inner) = &self.0 else { return };
        let region = KeyValue::new("region", attempt.region.name());
        let mut labels = vec![
            region.clone(),
            KeyValue::new("http.request.method", "POST"),
            KeyValue::new("server.address", attempt.endpoint.host().to_owned()),
            KeyValue::new("server.port", i64::from(attempt.endpoint.port())),
        ];
        let (status, error) = (attempt.answer.http_status(), attempt.answer.error_type());
        if status != 0 {
            labels.push(KeyValue::new(
                "http.response.status_code",
                i64::from(status),
            ));
        }
        if !error.is_empty() {
            labels.push(KeyValue::new("error.type", error));
        }
        let instruments = &inner.instruments;
        instruments
            .attempt_duration
            .record(attempt.answer.latency.as_secs_f64(), &labels);
        instruments
            .batch_events
            .record(attempt.events, std::slice::from_ref(&region));
        instruments.batch_bytes.record(attempt.bytes, &[region]);
    }

    /// A commit of the outbox has ended.
    pub fn commit(&self, captures: u64, took: Duration, succeeded: bool) {
        let Some(inner) = &self.0 else { return };
        let result = if succeeded { "ok" } else { "failed" };
        let labels = [KeyValue::new("result", result)];
        let instruments = &inner.instruments;
        instruments
            .commit_duration
            .record(took.as_secs_f64(), &labels);
        instruments.commit_captures.record(captures, &[]);
    }

    /// An endpoint's breaker has opened or closed.
    pub fn breaker(&self, region: Region, is_open: bool) {
        let Some(inner) = &self.0 else { return };
        let labels = [KeyValue::new("region", region.name())];
        inner
            .instruments
            .breaker_open
            .record(u64::from(is_open), &labels);
    }

    /// A database of `[postgres] urls`, named by its place, answers or is away.
    pub fn database(&self, place: usize, is_available: bool) {
        let Some(inner) = &self.0 else { return };
        let labels = [KeyValue::new("database", place.to_string())];
        inner
            .instruments
            .database_available
            .record(u64::from(is_available), &labels);
    }
}

/// Gives integrations a label, as long as there are few.
struct Labels {
    most: usize,
    known: Mutex<HashSet<IntegrationId>>,
}

impl Labels {
    fn new(most: usize) -> Self {
        Self {
            most,
            known: Mutex::default(),
        }
    }

    fn integration(&self, id: &IntegrationId) -> KeyValue {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let has_one = known.contains(id.name())
            || (known.len() < self.most && known.insert(id.of_incarnation(1)));
        let label = if has_one { id.name() } else { OTHER };
        KeyValue::new("integration", label.to_owned())
    }
}

#[cfg(test)]
mod tests;
