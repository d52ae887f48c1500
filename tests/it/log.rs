//! The log: its ids, its storms, and its filter while the relay runs.

use std::{fs, path::Path};

use rustix::process::Signal;
use segment_relay::{
    proto::{
        self, CaptureRequest, WaitFor, integration_service_client::IntegrationServiceClient,
        segment_relay_client::SegmentRelayClient,
    },
    sandbox::Rule,
};
use serde_json::Value;
use tonic::Request;

use crate::{
    harness::{acme, numbered},
    process::{Process, lasting_sandbox},
};

const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";

async fn create(relay: &Process) {
    let request = proto::CreateIntegrationRequest {
        integration: Some(acme()),
    };
    let mut integrations = IntegrationServiceClient::new(relay.channel.clone());
    let created = integrations.create_integration(request).await;
    created.expect("created");
}

async fn capture(relay: &Process, number: usize, wait_for: WaitFor) {
    let mut request = Request::new(CaptureRequest {
        integration_id: "acme".into(),
        capture: Some(numbered(number)),
        wait_for: wait_for.into(),
    });
    let context = format!("00-{TRACE_ID}-b7ad6b7169203331-01");
    let context = context.parse().expect("ASCII");
    request.metadata_mut().insert("traceparent", context);
    let mut client = SegmentRelayClient::new(relay.channel.clone());
    client.capture(request).await.expect("accepted");
}

#[tokio::test]
async fn a_line_within_a_trace_has_its_ids_also_where_nobody_gets_the_spans() {
    let (sandbox, urls) = lasting_sandbox().await;
    let directory = tempfile::tempdir().expect("a directory");
    let with = async |endpoint: &str| {
        let environment = [
            ("SEGMENT_RELAY__OTLP__ENDPOINT", Path::new(endpoint)),
            ("SEGMENT_RELAY__LOG__FORMAT", Path::new("json")),
        ];
        let store = directory.path().join(format!("outbox-{}", endpoint.len()));
        Process::start_with(&store, &urls, &environment).await
    };
    let has = |line: &str, field: &str| {
        let line: Value = serde_json::from_str(line).expect("a JSON line");
        line[field].as_str().map(str::to_owned)
    };

    // A caller's ids stand in the lines of its call.
    let relay = with("").await;
    create(&relay).await;
    let mut request = Request::new(CaptureRequest {
        integration_id: "acme".into(),
        ..CaptureRequest::default()
    });
    let context = format!("00-{TRACE_ID}-b7ad6b7169203331-01");
    let context = context.parse().expect("ASCII");
    request.metadata_mut().insert("traceparent", context);
    request
        .metadata_mut()
        .insert("authorization", "Bearer x".parse().expect("ASCII"));
    let mut client = SegmentRelayClient::new(relay.channel.clone());
    client.capture(request).await.expect_err("no capture");
    let line = relay.log.line(|line| line.contains(TRACE_ID)).await;
    assert_eq!(has(&line, "trace_id").as_deref(), Some(TRACE_ID));
    assert_eq!(has(&line, "span_id").map(|id| id.len()), Some(16));
    drop(relay);

    // A batch has a trace of its own.
    let relay = with(&format!(
        "http://{}",
        crate::collector::Collector::for_all()
    ))
    .await;
    create(&relay).await;
    let rule = Rule {
        status: Some(503),
        ..Rule::default()
    };
    sandbox.set_rules(vec![rule]).expect("a fine rule");
    capture(&relay, 1, WaitFor::Accepted).await;
    let line = relay.log.line(|line| line.contains("not delivered")).await;
    assert_eq!(has(&line, "reason").as_deref(), Some("SERVER_ERROR"));
    let id = has(&line, "trace_id").expect("an id");
    assert!(id.len() == 32 && id != TRACE_ID, "{line}");
}

#[tokio::test]
async fn the_filter_changes_while_the_relay_runs_and_a_bad_one_changes_nothing() {
    let (_sandbox, urls) = lasting_sandbox().await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("relay.toml");
    let write = |filter: &str| {
        fs::write(&file, format!("[log]\nfilter = \"{filter}\"\n")).expect("written");
    };
    write("info");
    let relay = Process::start_configured(&directory.path().join("outbox"), &urls, &file).await;
    create(&relay).await;
    let delivered = |line: &str| line.contains("delivered");
    capture(&relay, 1, WaitFor::Delivered).await;

    write("info,segment_relay::delivery=debug");
    relay.signal(Signal::HUP);
    relay.log.line(|line| line.contains("another filter")).await;
    // Nothing of what came before was written.
    assert_eq!(relay.log.count(delivered), 0);
    capture(&relay, 2, WaitFor::Delivered).await;
    relay.log.line(delivered).await;

    write("info,,=");
    relay.signal(Signal::HUP);
    let line = relay
        .log
        .line(|line| line.contains("nothing was changed"))
        .await;
    assert!(line.contains("log.filter"), "{line}");
    let before = relay.log.count(delivered);
    capture(&relay, 3, WaitFor::Delivered).await;
    relay.log.nth(before, delivered).await;
}

#[tokio::test]
async fn a_storm_is_cut_and_counted() {
    let (sandbox, urls) = lasting_sandbox().await;
    let directory = tempfile::tempdir().expect("a directory");
    let environment = [
        ("SEGMENT_RELAY__LOG__FILTER", Path::new("info")),
        ("SEGMENT_RELAY__LOG__MAX_LINES_PER_SECOND", Path::new("1")),
    ];
    let outbox = directory.path().join("outbox");
    let mut relay = Process::start_with(&outbox, &urls, &environment).await;
    create(&relay).await;
    let rule = Rule {
        status: Some(503),
        ..Rule::default()
    };
    sandbox.set_rules(vec![rule]).expect("a fine rule");
    for number in 0..4 {
        capture(&relay, number, WaitFor::Accepted).await;
    }
    // Retried every 50 ms at the most, by up to four lanes.
    let stormy = sandbox.wait_for(|stats| stats.requests >= 60, crate::harness::PATIENCE);
    stormy.await.expect("they retry");
    relay.terminate().await;
    let told = relay
        .log
        .line(|line| line.contains("lines were left out"))
        .await;
    assert!(told.contains("segment_relay::delivery"), "{told}");
    let written = relay.log.count(|line| line.contains("not delivered"));
    assert!((5..40).contains(&written), "{written}");
}
