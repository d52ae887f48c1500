//! The sections of settings, each with its bounds. What a setting is for stands
//! in `default.toml` at more length.

use std::{path::PathBuf, time::Duration};

use super::{
    endpoint::Endpoint,
    listen::{Listen, listen},
    reader::Reader,
    removed::DRAIN,
    value::{
        Expected, Parsed, Raw, automatic, boolean, endpoint, hours, millis, number, one_of,
        optional_path, path, text,
    },
};

const SECOND_MS: u64 = 1000;
const MINUTE_MS: u64 = 60 * SECOND_MS;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const DAY_MS: u64 = 24 * HOUR_MS;
const MIB: u64 = 1024 * 1024;
const YEAR_HOURS: u64 = 8760;

/// `[server]`: the gRPC server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Where it listens. Port 0 takes any free one.
    pub listen: Listen,
    /// Longest request message, in bytes, 64 KiB to 64 MiB.
    pub max_message_bytes: usize,
    /// Calls at once on one HTTP/2 connection, 1 to 1,000,000.
    pub max_concurrent_streams: u32,
    /// Calls at once on the whole server, 1 to 1,000,000.
    pub max_calls_in_flight: usize,
    /// Captures of one `CaptureStream` that are being stored, 1 to 65,536.
    pub max_stream_captures_in_flight: usize,
    /// `WatchDeliveries` calls at once, 0 to 10,000.
    pub max_watchers: usize,
    /// Longest call that is no stream, 10 ms to 1 h.
    pub request_timeout: Duration,
    /// Longest `WAIT_FOR_DELIVERED`.
    pub max_wait: Duration,
    /// Quiet time before a connection is asked for a sign of life, 100 ms to 1 h.
    pub keepalive_interval: Duration,
    /// How long to wait for that sign, 100 ms to 10 min.
    pub keepalive_timeout: Duration,
    /// Age at which a connection is asked to end, 1 s to 7 days.
    pub max_connection_age: Duration,
    /// How long calls are still taken after health turned `NOT_SERVING`, 0 to
    /// 10 min.
    pub drain_delay: Duration,
    /// How long, after `drain_delay`, calls and sends in hand may take, 0 to 1 h.
    pub drain_timeout: Duration,
    /// Whether gRPC server reflection is offered.
    pub reflection: bool,
    /// Connections at once, 1 to 1,000,000.
    pub max_connections: usize,
    /// From the accepted connection to the first bytes of HTTP/2, 100 ms to 10 min.
    pub handshake_timeout: Duration,
    /// Age without a call at which a connection is asked to end, 100 ms to 7 days.
    pub max_connection_idle: Duration,
    /// How long calls may take once their connection was asked to end, 100 ms to
    /// 7 days.
    pub max_connection_age_grace: Duration,
}

impl Server {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        const STREAMS: u64 = 1_000_000;
        let server = Self {
            listen: from.take("server.listen", listen)?,
            max_message_bytes: from.take(
                "server.max_message_bytes",
                number("bytes", MIB / 16..=64 * MIB),
            )?,
            max_concurrent_streams: from.take(
                "server.max_concurrent_streams",
                number("calls", 1..=STREAMS),
            )?,
            max_calls_in_flight: from
                .take("server.max_calls_in_flight", number("calls", 1..=STREAMS))?,
            max_stream_captures_in_flight: from.take(
                "server.max_stream_captures_in_flight",
                number("captures", 1..=65_536),
            )?,
            max_watchers: from.take("server.max_watchers", number("calls", 0..=10_000))?,
            request_timeout: from.take("server.request_timeout_ms", millis(10..=HOUR_MS))?,
            max_wait: from.take("server.max_wait_ms", millis(10..=HOUR_MS))?,
            keepalive_interval: from.take("server.keepalive_interval_ms", millis(100..=HOUR_MS))?,
            keepalive_timeout: from
                .take("server.keepalive_timeout_ms", millis(100..=10 * MINUTE_MS))?,
            max_connection_age: from.take(
                "server.max_connection_age_ms",
                millis(SECOND_MS..=7 * DAY_MS),
            )?,
            drain_delay: from.take("server.drain_delay_ms", millis(0..=10 * MINUTE_MS))?,
            drain_timeout: from.take("server.drain_timeout_ms", millis(0..=HOUR_MS))?,
            reflection: from.take("server.reflection", boolean)?,
            max_connections: from
                .take("server.max_connections", number("connections", 1..=STREAMS))?,
            handshake_timeout: from
                .take("server.handshake_timeout_ms", millis(100..=10 * MINUTE_MS))?,
            max_connection_idle: from
                .take("server.max_connection_idle_ms", millis(100..=7 * DAY_MS))?,
            max_connection_age_grace: from.take(
                "server.max_connection_age_grace_ms",
                millis(100..=7 * DAY_MS),
            )?,
        };
        Some(server)
    }
}

/// `[segment]`: the HTTP client towards Segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// From the start of a request to the end of its answer, 10 ms to 10 min.
    pub request_timeout: Duration,
    /// From the look-up of the name to the end of the TLS handshake, 10 ms to
    /// 10 min.
    pub connect_timeout: Duration,
    /// How long an idle connection is kept, 0 to 1 h.
    pub pool_idle_timeout: Duration,
    /// Age at which a connection is replaced and its name looked up anew, 1 s
    /// to 24 h.
    pub max_connection_age: Duration,
    /// Whether request bodies are compressed.
    pub gzip: bool,
    /// CAs that sign the endpoints' certificates, PEM; the machine's by default.
    pub ca_file: Option<PathBuf>,
    /// Where each region's events go.
    pub endpoints: Endpoints,
}

/// `[segment.endpoints]`: where each region's events go. The hosts differ,
/// unless both are on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// Data outside the EU. Never `events.eu1.segmentapis.com`.
    pub non_eu: Endpoint,
    /// Data of the EU. Never `api.segment.io`.
    pub eu: Endpoint,
}

impl Segment {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        let segment = Self {
            request_timeout: from
                .take("segment.request_timeout_ms", millis(10..=10 * MINUTE_MS))?,
            connect_timeout: from
                .take("segment.connect_timeout_ms", millis(10..=10 * MINUTE_MS))?,
            pool_idle_timeout: from.take("segment.pool_idle_timeout_ms", millis(0..=HOUR_MS))?,
            max_connection_age: from
                .take("segment.max_connection_age_ms", millis(SECOND_MS..=DAY_MS))?,
            gzip: from.take("segment.gzip", boolean)?,
            ca_file: from.take("segment.ca_file", optional_path)?,
            endpoints: Endpoints::take(from)?,
        };
        Some(segment)
    }
}

impl Endpoints {
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        const NON_EU: (&str, &str) = ("segment.endpoints.non_eu", "api.segment.io");
        const EU: (&str, &str) = ("segment.endpoints.eu", "events.eu1.segmentapis.com");
        let endpoints = Self {
            non_eu: from.take(NON_EU.0, endpoint(EU.1))?,
            eu: from.take(EU.0, endpoint(NON_EU.1))?,
        };
        let (non_eu, eu) = (&endpoints.non_eu, &endpoints.eu);
        from.check(
            non_eu.host() != eu.host() || (non_eu.is_loopback() && eu.is_loopback()),
            [EU.0, NON_EU.0],
            "both regions have the same host, and data of one must never reach the other",
        );
        Some(endpoints)
    }
}

/// `[delivery]`: how waiting events are sent and tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Requests to Segment at once, of all integrations, 1 to 4,096.
    pub max_requests_in_flight: usize,
    /// Longest request body before compression, in bytes, 128 KiB to 480 KiB.
    pub max_batch_bytes: usize,
    /// Events in one request, 2 to 2,500.
    pub max_batch_events: usize,
    /// Events that each integration may send in a second on average, 1 to
    /// 10,000,000.
    pub max_events_per_second: u32,
    /// Events that each integration may send at once, 2 to 10,000,000.
    pub burst_events: u32,
    /// Wait after the first failure, 10 ms to 1 h; it doubles with each.
    pub retry_base: Duration,
    /// Longest wait between two tries, 10 ms to 1 h, at least `retry_base`.
    pub retry_max: Duration,
    /// Wait after Segment refused a write key, 10 ms to 24 h.
    pub unauthorized_retry: Duration,
    /// Age at which an event is given up, 1 h to 1 year.
    pub max_age: Duration,
}

impl Delivery {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        let delivery = Self {
            max_requests_in_flight: from.take(
                "delivery.max_requests_in_flight",
                number("requests", 1..=4096),
            )?,
            max_batch_bytes: from.take(
                "delivery.max_batch_bytes",
                number("bytes", 131_072..=491_520),
            )?,
            max_batch_events: from.take("delivery.max_batch_events", number("events", 2..=2500))?,
            max_events_per_second: from.take(
                "delivery.max_events_per_second",
                number("events", 1..=10_000_000),
            )?,
            burst_events: from.take("delivery.burst_events", number("events", 2..=10_000_000))?,
            retry_base: from.take("delivery.retry_base_ms", millis(10..=HOUR_MS))?,
            retry_max: from.take("delivery.retry_max_ms", millis(10..=HOUR_MS))?,
            unauthorized_retry: from.take("delivery.unauthorized_retry_ms", millis(10..=DAY_MS))?,
            max_age: from.take("delivery.max_age_hours", hours(1..=YEAR_HOURS))?,
        };
        from.at_most(
            ("delivery.retry_base_ms", delivery.retry_base.as_millis()),
            ("delivery.retry_max_ms", delivery.retry_max.as_millis()),
        );
        Some(delivery)
    }
}

/// Which store the outbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutboxKind {
    /// A directory of this relay alone.
    Embedded,
    /// PostgreSQL, shared by several relays.
    Postgres,
}

/// `[outbox]`: where and how much is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outbox {
    /// Which store it is.
    pub kind: OutboxKind,
    /// Directory of the store.
    pub path: PathBuf,
    /// Waiting events of all integrations, 2 to 1,000,000,000.
    pub max_events: u64,
    /// Bytes of the waiting events of all integrations, 1 MiB to 16 TiB.
    pub max_bytes: u64,
    /// Waiting events of one integration, 2 to 1,000,000,000.
    pub max_integration_events: u64,
    /// Bytes of the waiting events of one integration, 1 MiB to 16 TiB.
    pub max_integration_bytes: u64,
    /// Captures in one commit, 1 to 65,536.
    pub group_commit_max: usize,
    /// How long a `capture_id` and what became of its events are remembered, 1 h
    /// to 1 year; longer where its events still wait.
    pub idempotency: Duration,
    /// Whether the payloads of events are stored encrypted.
    pub encryption: bool,
    /// Which of several relays' files has the current integrations, 0 to
    /// 1,000,000,000,000: the one with the highest number.
    pub integrations_version: u64,
}

impl Outbox {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        const EVENTS: u64 = 1_000_000_000;
        const BYTES: u64 = 16 * MIB * MIB;
        let kind = from.take("outbox.kind", kind)?;
        let encryption: Option<bool> = from.take("outbox.encryption", automatic)?;
        let outbox = Self {
            kind,
            path: from.take("outbox.path", path)?,
            max_events: from.take("outbox.max_events", number("events", 2..=EVENTS))?,
            max_bytes: from.take("outbox.max_bytes", number("bytes", MIB..=BYTES))?,
            max_integration_events: from.take(
                "outbox.max_integration_events",
                number("events", 2..=EVENTS),
            )?,
            max_integration_bytes: from
                .take("outbox.max_integration_bytes", number("bytes", MIB..=BYTES))?,
            group_commit_max: from
                .take("outbox.group_commit_max", number("captures", 1..=65_536))?,
            idempotency: from.take("outbox.idempotency_hours", hours(1..=YEAR_HOURS))?,
            encryption: encryption.unwrap_or(kind == OutboxKind::Postgres),
            integrations_version: from.take(
                "outbox.integrations_version",
                number("changes", 0..=1_000_000_000_000),
            )?,
        };
        Some(outbox)
    }
}

fn kind(raw: Raw<'_>) -> Parsed<OutboxKind> {
    const KINDS: &[(&str, OutboxKind)] = &[
        ("embedded", OutboxKind::Embedded),
        ("postgres", OutboxKind::Postgres),
    ];
    one_of(KINDS)(raw).map_err(|expected| match text(raw) {
        Ok(given) if given.eq_ignore_ascii_case("jetstream") => Expected::new(format_args!(
            "\"postgres\" (NATS JetStream was removed: {DRAIN})"
        )),
        _ => expected,
    })
}
