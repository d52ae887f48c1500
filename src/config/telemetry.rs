//! The sections that tell people what the relay does: traces, metrics and logs.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::{
    endpoint::Endpoint,
    reader::Reader,
    value::{
        OtlpHeaders, boolean, filter, millis, number, one_of, optional_address, optional_path,
        otlp_headers, plain_url, ratio,
    },
};

const HOUR_MS: u64 = 3_600_000;

/// `[otlp]`: the collector that gets traces and metrics.
#[derive(Clone, Debug)]
pub struct Otlp {
    /// Its URL; for [`OtlpProtocol::Http`] the base to which `/v1/traces` and
    /// `/v1/metrics` are added.
    pub endpoint: Endpoint,
    /// How it is spoken to.
    pub protocol: OtlpProtocol,
    /// Sent with each request. They may hold a token.
    pub headers: OtlpHeaders,
    /// CAs that sign its certificate, PEM; the machine's by default.
    pub ca_file: Option<PathBuf>,
    /// Longest time for one export, 100 ms to 1 min.
    pub timeout: Duration,
}

/// The two transports of OTLP (OpenTelemetry Protocol Specification 1.x).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// OTLP/gRPC.
    Grpc,
    /// OTLP/HTTP with binary protobuf.
    Http,
}

impl Otlp {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Option<Self>> {
        const PROTOCOLS: &[(&str, OtlpProtocol)] =
            &[("grpc", OtlpProtocol::Grpc), ("http", OtlpProtocol::Http)];
        const ENDPOINT: &str = "otlp.endpoint";
        const HEADERS: &str = "otlp.headers";
        let endpoint = from.take(ENDPOINT, plain_url)?;
        let protocol = from.take("otlp.protocol", one_of(PROTOCOLS))?;
        let headers = from.take(HEADERS, otlp_headers)?;
        let ca_file = from.take("otlp.ca_file", optional_path)?;
        let timeout = from.take("otlp.timeout_ms", millis(100..=60_000))?;
        from.check(
            endpoint
                .as_ref()
                .is_none_or(|url| headers.is_empty() || url.is_tls() || url.is_loopback()),
            [ENDPOINT, HEADERS],
            "headers may hold a token, and plain http would show it to the network: use an https URL",
        );
        Some(endpoint.map(|endpoint| Self {
            endpoint,
            protocol,
            headers,
            ca_file,
            timeout,
        }))
    }
}

/// `[traces]`: which calls and deliveries are traced, where there is a collector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traces {
    /// Share of the calls without a caller's decision that are traced, 0 to 1.
    pub sample_ratio: f64,
    /// Whether calls and requests that fail are exported although they were not
    /// chosen.
    pub keep_errors: bool,
    /// Spans that wait for the collector, 128 to 1,000,000; more are dropped.
    pub max_queued_spans: usize,
}

impl Traces {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            sample_ratio: from.take("traces.sample_ratio", ratio)?,
            keep_errors: from.take("traces.keep_errors", boolean)?,
            max_queued_spans: from
                .take("traces.max_queued_spans", number("spans", 128..=1_000_000))?,
        })
    }
}

/// `[metrics]`: who reads what the relay counts and times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Where Prometheus scrapes; nobody does without it.
    pub listen: Option<SocketAddr>,
    /// Integrations with labels of their own, 0 to 10,000.
    pub max_integrations: usize,
    /// How often the collector of `[otlp]` gets them, 1 s to 1 h.
    pub export_interval: Duration,
}

impl Metrics {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            listen: from.take("metrics.listen", optional_address)?,
            max_integrations: from.take(
                "metrics.max_integrations",
                number("integrations", 0..=10_000),
            )?,
            export_interval: from.take("metrics.export_interval_ms", millis(1_000..=HOUR_MS))?,
        })
    }
}

/// `[log]`: the relay's own log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The form of a line.
    pub format: LogFormat,
    /// Directives that `tracing_subscriber::EnvFilter` has parsed.
    pub filter: String,
    /// Lines of one kind in a second, on average, 1 to 1,000,000.
    pub max_lines_per_second: u32,
    /// Where the audit log goes beside the log.
    pub audit_file: Option<PathBuf>,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Log {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        const FORMATS: &[(&str, LogFormat)] = &[
            ("auto", LogFormat::Auto),
            ("text", LogFormat::Text),
            ("json", LogFormat::Json),
        ];
        Some(Self {
            format: from.take("log.format", one_of(FORMATS))?,
            filter: from.take("log.filter", filter)?,
            max_lines_per_second: from
                .take("log.max_lines_per_second", number("lines", 1..=1_000_000))?,
            audit_file: from.take("log.audit_file", optional_path)?,
        })
    }
}
