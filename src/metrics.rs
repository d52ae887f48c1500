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
use opentelemetry_sdk::metrics::SdkMeterProvider;

use crate::{integration::IntegrationId, region::Region};

pub use backlog::{BacklogBoard, BacklogOf, DiskSpace};
pub use endpoint::serve;
use instruments::Instruments;

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

    /// Prometheus reads them.
    ///
    /// # Errors
    /// The exporter can't be set up.
    pub fn new(max_integrations: usize, board: Arc<BacklogBoard>) -> Result<Self, MetricsError> {
        let registry = prometheus::Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .without_target_info()
            .build()
            .map_err(|error| MetricsError(error.to_string()))?;
        let provider = SdkMeterProvider::builder().with_reader(exporter).build();
        let meter = provider.meter("segment-relay");
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

    /// Ends the reading.
    pub fn close(&self) {
        if let Some(inner) = &self.0
            && let Err(error) = inner.provider.shutdown()
        {
            tracing::debug!(%error, "metrics did not end cleanly");
        }
    }

    /// An rpc has ended.
    pub fn rpc(&self, method: &'static str, code: &'static str, took: Duration) {
        let Some(inner) = &self.0 else { return };
        let labels = [
            KeyValue::new("rpc_method", method),
            KeyValue::new("rpc_response_status_code", code),
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

    /// A request to Segment has ended. The status is 0 where no answer came.
    pub fn attempt(&self, region: Region, status: u16, took: Duration, events: u64, bytes: u64) {
        let Some(inner) = &self.0 else { return };
        let region = KeyValue::new("region", region.name());
        let labels = [
            region.clone(),
            KeyValue::new("http_status", i64::from(status)),
        ];
        let instruments = &inner.instruments;
        instruments
            .attempt_duration
            .record(took.as_secs_f64(), &labels);
        instruments
            .batch_events
            .record(events, std::slice::from_ref(&region));
        instruments.batch_bytes.record(bytes, &[region]);
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
        let has_one = known.contains(id) || (known.len() < self.most && known.insert(id.clone()));
        let label = if has_one { id.as_str() } else { OTHER };
        KeyValue::new("integration", label.to_owned())
    }
}

#[cfg(test)]
mod tests;
