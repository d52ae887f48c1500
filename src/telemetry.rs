//! What the relay tells of itself while it runs: its log on standard error, since
//! standard output belongs to answers, and spans for a collector.

mod keep_errors;
mod lines;
pub mod otlp;
mod sampler;
mod storm;

use std::{io::IsTerminal, sync::Arc, time::Duration};

use opentelemetry::{InstrumentationScope, Key, KeyValue, trace::TracerProvider};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkError,
    trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider},
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};
use tracing::{Metadata, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{FilterExt, FilterFn, filter_fn},
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

use crate::{
    config::{Config, Log, LogFormat},
    trace::{TARGET, Traces},
};

pub use keep_errors::KeepErrors;
use lines::Lines;
pub use otlp::OtlpError;
pub use sampler::RelaySampler;
use storm::{Storm, StormFilter};

/// Links of one span: as many as captures fit into a request to Segment.
const MAX_LINKS: u32 = 2_500;
/// Spans of one export.
const MAX_EXPORTED_SPANS: usize = 512;
/// Longest time for the last spans to leave.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);
/// Name of the service where the environment gives none.
const SERVICE: &str = "segment-relay";

/// What has to be ended with the process, and can be changed while it runs.
pub struct Telemetry {
    tracers: SdkTracerProvider,
    filter: reload::Handle<EnvFilter, Registry>,
    storm: Arc<Storm>,
}

/// Starts the log and the export of spans. To be called once, on a runtime; a
/// second call changes nothing.
///
/// # Errors
/// The way to the collector can't be set up.
pub fn start(config: &Config) -> Result<Telemetry, OtlpError> {
    let tracers = tracers(config)?;
    let (filter, filter_handle) = reload::Layer::new(directives(&config.log.filter));
    let storm = Arc::new(Storm::new(config.log.max_lines_per_second));
    let lines = tracing_subscriber::fmt::layer()
        .event_format(format(&config.log))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_filter(
            filter
                .and(filter_fn(|metadata| metadata.target() != TARGET))
                .and(StormFilter(Arc::clone(&storm))),
        );
    let subscriber = tracing_subscriber::registry().with(lines);
    // An error says that logging is started already.
    let _ = subscriber.with(spans(&tracers)).try_init();
    Ok(Telemetry {
        tracers,
        filter: filter_handle,
        storm,
    })
}

/// Whether somebody gets the spans of a relay with this configuration.
#[must_use]
pub fn traces(config: &Config) -> Traces {
    match config.otlp {
        None => Traces::Off,
        Some(_) => Traces::On {
            sample_ratio: config.traces.sample_ratio,
        },
    }
}

/// The layer that makes spans of the relay's, and nobody else's.
pub fn spans<S>(tracers: &SdkTracerProvider) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let is_ours: FilterFn<fn(&Metadata<'_>) -> bool> = filter_fn(|metadata| {
        // What the log says within a span is told with it, but for details.
        metadata.target() == TARGET
            || (metadata.is_event()
                && metadata.target().starts_with("segment_relay")
                && *metadata.level() <= LevelFilter::INFO)
    });
    tracing_opentelemetry::layer()
        .with_tracer(tracers.tracer_with_scope(scope()))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_target(false)
        .with_filter(is_ours)
}

/// What makes spans and metrics: this program, of this version.
#[must_use]
pub fn scope() -> InstrumentationScope {
    InstrumentationScope::builder(SERVICE)
        .with_version(env!("CARGO_PKG_VERSION"))
        .build()
}

/// What is known of this process as a source of spans and metrics.
#[must_use]
pub fn resource() -> Resource {
    // The SDK reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES; what they say wins.
    let told = Resource::builder().build();
    let is_named = told
        .get(&Key::from_static_str("service.name"))
        .is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let ours = [
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("process.pid", i64::from(std::process::id())),
    ];
    let name = (!is_named).then(|| KeyValue::new("service.name", SERVICE));
    let told = told
        .iter()
        .filter(|(key, _)| is_named || key.as_str() != "service.name")
        .map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    Resource::builder_empty()
        .with_attributes(ours.into_iter().chain(name).chain(told))
        .build()
}

fn tracers(config: &Config) -> Result<SdkTracerProvider, OtlpError> {
    let builder = SdkTracerProvider::builder()
        .with_resource(resource())
        .with_max_links_per_span(MAX_LINKS);
    let Some(otlp) = &config.otlp else {
        return Ok(builder.with_sampler(RelaySampler::nothing()).build());
    };
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(config.traces.max_queued_spans)
        .with_max_export_batch_size(MAX_EXPORTED_SPANS.min(config.traces.max_queued_spans))
        .build();
    let exporter = BatchSpanProcessor::builder(otlp::span_exporter(otlp)?)
        .with_batch_config(batches)
        .build();
    Ok(builder
        .with_sampler(RelaySampler::new(config.traces))
        .with_span_processor(KeepErrors(exporter))
        .build())
}

fn directives(filter: &str) -> EnvFilter {
    // The configuration has parsed the filter already.
    EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"))
}

fn format(log: &Log) -> Lines {
    let terminal = std::io::stderr().is_terminal();
    match log.format {
        LogFormat::Text => Lines::text(terminal),
        LogFormat::Auto if terminal => Lines::text(true),
        LogFormat::Auto | LogFormat::Json => Lines::json(),
    }
}

impl Telemetry {
    /// Lets other lines through from now on.
    pub fn set_filter(&self, filter: &str) {
        if let Err(error) = self.filter.reload(directives(filter)) {
            tracing::error!(%error, "the log's filter could not be changed");
        }
    }

    /// Tells now and then which lines were left out. Never ends.
    pub async fn tell_of_storms(&self) {
        storm::report(&self.storm).await;
    }

    /// Gives the last spans to the collector, until `deadline`. Later calls do nothing.
    pub async fn flush(&self, deadline: Instant) {
        storm::tell(&self.storm);
        let tracers = self.tracers.clone();
        let work = move || match tracers.shutdown_with_timeout(FLUSH_TIMEOUT) {
            Ok(()) | Err(OTelSdkError::AlreadyShutdown) => {}
            Err(error) => tracing::warn!(%error, "the last spans may not have been exported"),
        };
        if !until(deadline, work).await {
            tracing::warn!("the last spans may not have been exported: the collector is silent");
        }
    }
}

/// Does work that may block longer than it is told to, and waits for it until `deadline`: on a
/// thread that the end of the process does not wait for.
pub async fn until(deadline: Instant, work: impl FnOnce() + Send + 'static) -> bool {
    let (tell, told) = oneshot::channel();
    let thread = std::thread::Builder::new().name("last-export".to_owned());
    let begun = thread.spawn(move || {
        work();
        // An error says that it took too long.
        let _ = tell.send(());
    });
    begun.is_ok() && matches!(timeout_at(deadline, told).await, Ok(Ok(())))
}
