//! What Prometheus reads.

use super::*;
use crate::{segment::Reply, time::UnixMillis};

fn id(name: &str) -> IntegrationId {
    IntegrationId::new(name).expect("valid")
}

fn waiting(name: &str, events: u64) -> BacklogOf {
    BacklogOf {
        integration_id: id(name),
        events,
        bytes: events * 10,
        oldest_age: Duration::from_secs(events),
        paused: false,
        condition: u8::from(name == "b") * 3,
    }
}

#[test]
fn integrations_beyond_the_bound_share_a_label() {
    let board = Arc::new(BacklogBoard::default());
    let metrics = Metrics::new(2, Arc::clone(&board), None).expect("set up");
    for name in ["a", "b", "c", "d", "a"] {
        metrics.captures(&id(name), "accepted", 1);
    }
    let backlogs = [("a", 1), ("b", 5), ("c", 2), ("d", 4)];
    let backlogs = backlogs.map(|(name, events)| waiting(name, events)).into();
    board.note(backlogs, None, true);
    let text = metrics.text();
    for line in [
        "segment_relay_captures_total{integration=\"a\",outcome=\"accepted\"} 2",
        "segment_relay_captures_total{integration=\"b\",outcome=\"accepted\"} 1",
        "segment_relay_captures_total{integration=\"other\",outcome=\"accepted\"} 2",
        "segment_relay_backlog_events{integration=\"b\"} 5",
        "segment_relay_backlog_events{integration=\"d\"} 4",
        "segment_relay_backlog_condition{integration=\"b\"} 3",
        "segment_relay_backlog_condition{integration=\"d\"} 0",
        "segment_relay_backlog_events{integration=\"other\"} 3",
        "segment_relay_backlog_oldest_age_seconds{integration=\"other\"} 2",
        "segment_relay_outbox_writable 1",
    ] {
        assert!(
            text.contains(&format!("{line}\n")),
            "{line} is not in\n{text}"
        );
    }
    assert!(!text.contains("\"c\""), "{text}");
}

#[test]
fn every_instrument_is_read_with_its_unit() {
    let metrics = Metrics::new(10, Arc::default(), None).expect("set up");
    metrics.rpc("a.B/Capture", "OK", Duration::from_millis(3));
    metrics.events(&id("a"), "identify", "delivered", "", 2);
    metrics.delivered_after(Region::Eu, Duration::from_millis(30));
    metrics.attempt(&AttemptFacts {
        region: Region::NonEu,
        endpoint: &Endpoint::new("https://api.segment.io").expect("an endpoint"),
        answer: &Answer {
            reply: Reply::Status {
                status: 503,
                retry_after: None,
            },
            started: UnixMillis(0),
            latency: Duration::from_millis(20),
        },
        events: 100,
        bytes: 70_000,
    });
    metrics.commit(64, Duration::from_millis(2), true);
    metrics.breaker(Region::Eu, true);
    metrics.database(0, true);
    metrics.database(1, false);
    let text = metrics.text();
    for line in [
        "rpc_server_call_duration_seconds_bucket{rpc_method=\"a.B/Capture\",rpc_response_status_code=\"OK\",rpc_system_name=\"grpc\",le=\"0.005\"} 1",
        "segment_relay_events_total{integration=\"a\",reason=\"\",state=\"delivered\",type=\"identify\"} 2",
        "segment_relay_delivery_latency_seconds_count{region=\"eu\"} 1",
        "http_client_request_duration_seconds_count{error_type=\"503\",http_request_method=\"POST\",http_response_status_code=\"503\",region=\"non_eu\",server_address=\"api.segment.io\",server_port=\"443\"} 1",
        "segment_relay_batch_events_sum{region=\"non_eu\"} 100",
        "segment_relay_batch_size_bytes_sum{region=\"non_eu\"} 70000",
        "segment_relay_outbox_commit_duration_seconds_count{result=\"ok\"} 1",
        "segment_relay_outbox_commit_captures_sum 64",
        "segment_relay_breaker_open{region=\"eu\"} 1",
        "segment_relay_outbox_database_available{database=\"0\"} 1",
        "segment_relay_outbox_database_available{database=\"1\"} 0",
    ] {
        assert!(
            text.contains(&format!("{line}\n")),
            "{line} is not in\n{text}"
        );
    }
    for name in [
        "process_uptime_seconds",
        "process_memory_usage_bytes",
        "process_cpu_time_seconds_total",
    ] {
        assert!(
            text.contains(&format!("\n{name} ")),
            "{name} is not in\n{text}"
        );
    }
}

#[test]
fn where_nobody_reads_nothing_is_counted() {
    let metrics = Metrics::off();
    metrics.captures(&id("a"), "accepted", 1);
    assert_eq!(metrics.text(), "");
    metrics.close();
}
