//! The instruments, with their units.

use std::sync::Arc;

use opentelemetry::{
    KeyValue,
    metrics::{Counter, Gauge, Histogram, Meter},
};

use super::{BacklogBoard, OTHER};

/// Bounds of latencies, in seconds: from a group commit to a delivery that waited
/// for an outage of a day.
const LATENCY: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 3_600.0,
    86_400.0,
];
/// Bounds of counts.
const COUNTS: [f64; 9] = [1.0, 2.0, 10.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 2_500.0];
/// Bounds of sizes, in bytes: up to what Segment takes.
const BYTES: [f64; 8] = [
    1_000.0, 4_000.0, 16_000.0, 64_000.0, 128_000.0, 256_000.0, 384_000.0, 491_520.0,
];

pub(super) struct Instruments {
    pub(super) rpc_duration: Histogram<f64>,
    pub(super) captures: Counter<u64>,
    pub(super) events: Counter<u64>,
    pub(super) delivery_latency: Histogram<f64>,
    pub(super) attempt_duration: Histogram<f64>,
    pub(super) batch_events: Histogram<u64>,
    pub(super) batch_bytes: Histogram<u64>,
    pub(super) commit_duration: Histogram<f64>,
    pub(super) commit_captures: Histogram<u64>,
    pub(super) breaker_open: Gauge<u64>,
    pub(super) database_available: Gauge<u64>,
}

impl Instruments {
    pub(super) fn new(meter: &Meter) -> Self {
        let seconds = |name: &'static str, description: &'static str| {
            meter
                .f64_histogram(name)
                .with_unit("s")
                .with_description(description)
                .with_boundaries(LATENCY.into())
                .build()
        };
        let counts =
            |name: &'static str, unit: &'static str, description: &'static str, bounds: &[f64]| {
                meter
                    .u64_histogram(name)
                    .with_unit(unit)
                    .with_description(description)
                    .with_boundaries(bounds.into())
                    .build()
            };
        Self {
            rpc_duration: seconds(
                "rpc.server.call.duration",
                "Duration of calls by rpc and status",
            ),
            captures: meter
                .u64_counter("segment_relay.captures")
                .with_unit("{capture}")
                .with_description("Captures that were answered, by integration and outcome")
                .build(),
            events: meter
                .u64_counter("segment_relay.events")
                .with_unit("{event}")
                .with_description(
                    "Changes of events' states, by integration, type, state and reason",
                )
                .build(),
            delivery_latency: seconds(
                "segment_relay.delivery.latency",
                "From an event's acceptance to its delivery",
            ),
            attempt_duration: seconds(
                "http.client.request.duration",
                "Duration of requests to Segment, by region and status",
            ),
            batch_events: counts(
                "segment_relay.batch.events",
                "{event}",
                "Events of a request",
                &COUNTS,
            ),
            batch_bytes: counts(
                "segment_relay.batch.size",
                "By",
                "Size of a request's events",
                &BYTES,
            ),
            commit_duration: seconds(
                "segment_relay.outbox.commit.duration",
                "Duration of a commit of the outbox, its fsync included",
            ),
            commit_captures: counts(
                "segment_relay.outbox.commit.captures",
                "{capture}",
                "Captures that shared a commit",
                &COUNTS,
            ),
            breaker_open: meter
                .u64_gauge("segment_relay.breaker.open")
                .with_description("1 while a region's endpoint is tried with one request at a time")
                .build(),
            database_available: meter
                .u64_gauge("segment_relay.outbox.database.available")
                .with_description("1 while the database of this place in [postgres] urls answers")
                .build(),
        }
    }
}

/// Gauges that are read when somebody asks: from a board that is kept up to date.
pub(super) fn observe(meter: &Meter, board: &Arc<BacklogBoard>, max_integrations: usize) {
    type Read = fn(&super::BacklogOf) -> u64;
    let gauges: [(&'static str, &'static str, &'static str, Read); 5] = [
        (
            "segment_relay.backlog.events",
            "{event}",
            "Events that wait",
            |one| one.events,
        ),
        (
            "segment_relay.backlog.size",
            "By",
            "Bytes that wait",
            |one| one.bytes,
        ),
        (
            "segment_relay.backlog.oldest.age",
            "s",
            "Age of the oldest event that waits",
            |one| one.oldest_age.as_secs(),
        ),
        (
            "segment_relay.backlog.paused",
            "",
            "1 while the integration is paused",
            |one| one.paused.into(),
        ),
        (
            "segment_relay.backlog.condition",
            "",
            "Worst condition of its sources: 0 healthy, 1 broken, 2 suspended, 3 parked",
            |one| one.condition.into(),
        ),
    ];
    for (name, unit, description, read) in gauges {
        let board = Arc::clone(board);
        meter
            .u64_observable_gauge(name)
            .with_unit(unit)
            .with_description(description)
            .with_callback(move |gauge| {
                let (named, others) = board.of_integrations(max_integrations);
                for one in &named {
                    let label = KeyValue::new("integration", one.integration_id.name().to_owned());
                    gauge.observe(read(one), &[label]);
                }
                if let Some(others) = others {
                    gauge.observe(read(&others), &[KeyValue::new("integration", OTHER)]);
                }
            })
            .build();
    }
    type ReadDisk = fn(&super::DiskSpace) -> u64;
    let disk: [(&'static str, &'static str, ReadDisk); 3] = [
        (
            "segment_relay.outbox.disk.free",
            "Bytes that are free on the outbox's disk",
            |disk| disk.free,
        ),
        (
            "segment_relay.outbox.disk.total",
            "Bytes of the outbox's disk",
            |disk| disk.total,
        ),
        (
            "segment_relay.outbox.size",
            "Bytes of the outbox's files",
            |disk| disk.used,
        ),
    ];
    for (name, description, read) in disk {
        let board = Arc::clone(board);
        meter
            .u64_observable_gauge(name)
            .with_unit("By")
            .with_description(description)
            .with_callback(move |gauge| {
                if let Some(disk) = board.disk() {
                    gauge.observe(read(&disk), &[]);
                }
            })
            .build();
    }
    let writable = Arc::clone(board);
    meter
        .u64_observable_gauge("segment_relay.outbox.writable")
        .with_description("1 while the outbox can be written")
        .with_callback(move |gauge| gauge.observe(u64::from(writable.is_writable()), &[]))
        .build();
}
