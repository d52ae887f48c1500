//! Where traces and metrics go, and that no fault shows a token.

use super::*;

#[test]
fn a_collector_is_read_with_its_headers_and_prints_without_them() {
    let text = "[otlp]\nendpoint = \"https://collector.internal/otel\"\nprotocol = \"HTTP\"\n\
                headers = \"authorization=Bearer planted=, x-team=quiz\"\n";
    let config = load(text, &[]).expect("fine");
    let otlp = config.otlp.as_ref().expect("a collector");
    assert_eq!(otlp.endpoint.as_str(), "https://collector.internal/otel");
    assert_eq!(otlp.protocol, OtlpProtocol::Http);
    let headers = otlp.headers.expose();
    assert_eq!(headers["authorization"], "Bearer planted=");
    assert_eq!(headers["x-team"], "quiz");
    let printed = format!("{config:?}");
    assert!(!printed.contains("planted"), "{printed}");
}

#[test]
fn what_is_wrong_with_a_collector_is_said_without_its_token() {
    for (text, fault) in [
        (
            "endpoint = \"collector:4317\"",
            "f.toml:2:1: otlp.endpoint: must be a URL such as",
        ),
        (
            "endpoint = \"http://planted@collector\"",
            "otlp.endpoint: must be a URL without user name and password",
        ),
        (
            "headers = \"authorization planted\"",
            "otlp.headers: must be headers as name=value",
        ),
        (
            "headers = \"a=pl\\u0001anted\"",
            "otlp.headers: must be headers as name=value",
        ),
        (
            "endpoint = \"http://collector:4317\"\nheaders = \"authorization=planted\"",
            "headers may hold a token, and plain http would show it to the network",
        ),
        (
            "protocol = \"thrift\"",
            "otlp.protocol: must be one of grpc, http",
        ),
    ] {
        let found = faults(&format!("[otlp]\n{text}\n"), &[]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(fault), "{found:?}");
        assert!(!found[0].contains("planted"), "{found:?}");
    }
}

#[test]
fn a_ratio_is_a_number_from_0_to_1() {
    for (text, ratio) in [("0", 0.0), ("1", 1.0), ("0.25", 0.25), ("1e-3", 0.001)] {
        let config = load(&format!("[traces]\nsample_ratio = {text}\n"), &[]).expect("fine");
        assert_eq!(config.traces.sample_ratio, ratio);
    }
    for text in ["-0.1", "1.1", "nan", "\"half\"", "true"] {
        let found = faults(&format!("[traces]\nsample_ratio = {text}\n"), &[]);
        assert!(
            found[0].contains("must be a number from 0 to 1"),
            "{found:?}"
        );
    }
}
