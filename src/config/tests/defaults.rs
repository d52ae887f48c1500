//! The default file against the code.

use super::*;

/// The settings of the default file: key, value and the comment above it.
fn documented_settings() -> Vec<(String, String, String)> {
    let (mut section, mut comment) = (String::new(), String::new());
    let mut settings = Vec::new();
    for line in DEFAULT_TOML.lines() {
        if let Some(text) = line.strip_prefix("# ") {
            comment = format!("{comment} {text}");
        } else if let Some((key, value)) = line.split_once(" = ")
            && !line.starts_with('#')
        {
            settings.push((
                format!("{section}.{key}"),
                value.to_owned(),
                comment.clone(),
            ));
        } else {
            comment.clear();
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_end_matches(']').to_owned();
            }
        }
    }
    settings
}

fn variable_of(key: &str) -> String {
    format!("SEGMENT_RELAY__{}", key.to_uppercase().replace('.', "__"))
}

#[test]
fn the_default_file_names_every_setting_of_server_and_segment() {
    // A setting that the file does not name, and a name that is no setting,
    // would both be faults.
    let config = load("", &[]).expect("the defaults are fine");
    let seconds = Duration::from_secs;
    assert_eq!(
        config.server,
        Server {
            listen: Listen::Tcp("127.0.0.1:50051".parse().expect("an address")),
            max_message_bytes: 4_194_304,
            max_concurrent_streams: 1024,
            max_calls_in_flight: 4096,
            max_stream_captures_in_flight: 1024,
            max_watchers: 64,
            request_timeout: seconds(60),
            max_wait: seconds(30),
            keepalive_interval: seconds(30),
            keepalive_timeout: seconds(10),
            max_connection_age: seconds(3600),
            drain_delay: Duration::ZERO,
            drain_timeout: seconds(20),
            reflection: true,
            max_connections: 10_000,
            handshake_timeout: seconds(10),
            max_connection_idle: seconds(300),
            max_connection_age_grace: seconds(60),
        }
    );
    let endpoint = |url| Endpoint::new(url).expect(url);
    assert_eq!(
        config.segment,
        Segment {
            request_timeout: seconds(10),
            connect_timeout: seconds(5),
            pool_idle_timeout: seconds(50),
            max_connection_age: seconds(3600),
            gzip: false,
            ca_file: None,
            endpoints: Endpoints {
                non_eu: endpoint("https://api.segment.io/v1/batch"),
                eu: endpoint("https://events.eu1.segmentapis.com/v1/batch"),
            },
        }
    );
    assert!(config.integrations.is_empty());
}

#[test]
fn the_default_file_names_every_setting_of_delivery_outbox_and_log() {
    let config = load("", &[]).expect("the defaults are fine");
    let seconds = Duration::from_secs;
    assert_eq!(
        config.delivery,
        Delivery {
            max_requests_in_flight: 64,
            max_batch_bytes: 491_520,
            max_batch_events: 2500,
            max_events_per_second: 1_000,
            burst_events: 2_500,
            retry_base: Duration::from_millis(500),
            retry_max: seconds(60),
            unauthorized_retry: seconds(300),
            max_age: seconds(72 * 3600),
        }
    );
    assert_eq!(
        config.outbox,
        Outbox {
            kind: OutboxKind::Embedded,
            path: "segment-relay-data".into(),
            max_events: 20_000_000,
            max_bytes: 20 * 1024 * 1024 * 1024,
            max_integration_events: 10_000_000,
            max_integration_bytes: 10 * 1024 * 1024 * 1024,
            group_commit_max: 512,
            idempotency: seconds(168 * 3600),
            encryption: false,
            integrations_version: 0,
        }
    );
    assert_eq!(
        config.metrics,
        Metrics {
            listen: None,
            max_integrations: 200,
            export_interval: seconds(60),
        }
    );
    assert!(config.otlp.is_none(), "{:?}", config.otlp);
    assert_eq!(
        config.traces,
        Traces {
            sample_ratio: 0.1,
            keep_errors: true,
            max_queued_spans: 8_192,
        }
    );
    assert_eq!(
        config.log,
        Log {
            format: LogFormat::Auto,
            filter: "info".to_owned(),
            max_lines_per_second: 20,
            audit_file: None,
        }
    );
}

#[test]
fn the_default_file_is_itself_a_configuration() {
    let config = load(DEFAULT_TOML, &[]).expect("what is printed can be used");
    assert_eq!(config.server.max_watchers, 64);
}

#[test]
fn every_documented_bound_is_the_one_that_is_checked() {
    let mut numbers = 0;
    for (key, value, comment) in documented_settings() {
        // What is empty by default may be empty.
        if value == "\"\"" {
            continue;
        }
        let found = faults("", &[(&variable_of(&key), "")]);
        assert_eq!(found.len(), 1, "{key} may be empty: {found:?}");
        if value.parse::<u64>().is_err() {
            continue;
        }
        numbers += 1;
        // "…: must be a whole number of UNIT, LOW to HIGH, not …"
        let bounds = found[0].split(", ").nth(1).expect("bounds");
        assert!(bounds.contains(" to "), "{found:?}");
        assert!(comment.contains(bounds), "{key}: {bounds} in {comment}");

        let (low, high) = bounds.split_once(" to ").expect("two numbers");
        let (low, high): (u64, u64) = (low.parse().expect("low"), high.parse().expect("high"));
        for (number, fits) in [
            (low.checked_sub(1), false),
            (Some(low), true),
            (Some(high), true),
            (Some(high + 1), false),
        ] {
            let Some(number) = number.map(|number| number.to_string()) else {
                continue;
            };
            // Inside the bounds another setting may be in the way, not the bounds.
            let refused = load("", &[(&variable_of(&key), &number)])
                .err()
                .is_some_and(|faults| lines(&faults)[0].contains("whole number"));
            assert_eq!(refused, !fits, "{key} = {number}");
        }
    }
    assert!(numbers > 25, "only {numbers} numbers were found");
}
