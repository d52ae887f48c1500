//! The relay's parts from its configuration.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::RunError;
use crate::{
    audit::Audit,
    auth::{Authenticator, Jwks, JwtVerifier},
    config::{self, Config},
    delivery::{Backoff, DeliveryParts, LaneOptions, RateLimits, Sources, Turns},
    grpc::{Gate, Services, Usage},
    metrics::{BacklogBoard, Export, Metrics},
    notify::Notices,
    outbox::{Limits, Outbox, SqliteOptions},
    registry::Registry,
    segment::{REQUEST_OVERHEAD_BYTES, SegmentClient},
    telemetry,
};

/// When an integration is called broken in the log, where nobody else is told.
const BROKEN_AFTER: Duration = Duration::from_secs(300);

pub(super) fn services(
    config: &Config,
    outbox: Arc<dyn Outbox>,
    registry: Arc<Registry>,
    notices: Notices,
    audit: Audit,
    metrics: Metrics,
    draining: &CancellationToken,
) -> Result<Services, RunError> {
    let limits = Arc::new(config.server.clone());
    let broken_after = config.notify.as_ref().map(|notify| notify.broken_after);
    Ok(Services {
        gate: Arc::new(Gate::new(
            limits.max_calls_in_flight,
            limits.max_watchers,
            draining.clone(),
        )),
        registry,
        segment: Arc::new(SegmentClient::new(&config.segment)?),
        vitals: Arc::default(),
        sources: Arc::new(Sources::new(broken_after.unwrap_or(BROKEN_AFTER))),
        holds: Arc::default(),
        turns: Arc::new(Turns::new(config.delivery.max_requests_in_flight)),
        notices,
        outbox,
        limits,
        usage: Arc::new(Usage::new(config)),
        audit,
        metrics,
        traces: telemetry::traces(config),
    })
}

/// What counts and times, for whoever reads it.
pub(super) fn metrics(config: &Config, board: &Arc<BacklogBoard>) -> Result<Metrics, RunError> {
    let export = match &config.otlp {
        None if config.metrics.listen.is_none() => return Ok(Metrics::off()),
        None => None,
        Some(otlp) => Some(Export {
            exporter: telemetry::otlp::metric_exporter(otlp)?,
            interval: config.metrics.export_interval,
            resource: telemetry::resource(),
        }),
    };
    let most = config.metrics.max_integrations;
    Ok(Metrics::new(most, Arc::clone(board), export)?)
}

pub(super) fn delivery_parts(config: &Config, services: &Services) -> DeliveryParts {
    DeliveryParts {
        outbox: Arc::clone(&services.outbox),
        segment: Arc::clone(&services.segment),
        registry: Arc::clone(&services.registry),
        vitals: Arc::clone(&services.vitals),
        sources: Arc::clone(&services.sources),
        metrics: services.metrics.clone(),
        traces: services.traces,
        notices: services.notices.clone(),
        holds: Arc::clone(&services.holds),
        rates: Arc::new(rate_limits(&config.delivery)),
        lanes: lane_options(&config.delivery),
        turns: Arc::clone(&services.turns),
    }
}

pub(super) async fn authenticator(config: &Config) -> Result<Authenticator, RunError> {
    let jwt = match &config.jwt {
        None => None,
        Some(options) => {
            let jwks = Jwks::open(options.jwks.clone()).await?;
            Some(JwtVerifier::new(options.clone(), jwks))
        }
    };
    Ok(Authenticator::new(&config.callers, jwt))
}

pub(super) fn outbox_options(outbox: &config::Outbox, metrics: &Metrics) -> SqliteOptions {
    SqliteOptions {
        directory: outbox.path.clone(),
        limits: limits(outbox),
        group_commit_max: outbox.group_commit_max,
        remember: outbox.idempotency,
        encrypt_payloads: outbox.encryption,
        metrics: metrics.clone(),
    }
}

pub(super) fn limits(outbox: &config::Outbox) -> Limits {
    Limits {
        max_events: outbox.max_events,
        max_bytes: outbox.max_bytes,
        max_integration_events: outbox.max_integration_events,
        max_integration_bytes: outbox.max_integration_bytes,
    }
}

pub(super) fn rate_limits(delivery: &config::Delivery) -> RateLimits {
    // The configuration's bounds leave no room for 0.
    let number = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
    RateLimits::new(
        number(delivery.max_events_per_second),
        number(delivery.burst_events),
    )
}

pub(super) fn lane_options(delivery: &config::Delivery) -> LaneOptions {
    LaneOptions {
        // A batch beyond the burst could never be paid for.
        max_batch_events: delivery
            .max_batch_events
            .min(delivery.burst_events as usize),
        max_batch_bytes: delivery.max_batch_bytes - REQUEST_OVERHEAD_BYTES,
        backoff: Backoff {
            base: delivery.retry_base,
            max: delivery.retry_max,
        },
        unauthorized_retry: delivery.unauthorized_retry,
        max_age: delivery.max_age,
    }
}
