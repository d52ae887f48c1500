//! Spans: from the caller's to the attempt, also across a restart; and what becomes
//! of the relay when nobody takes them.

use std::{path::Path, sync::Arc, time::Duration};

use opentelemetry_proto::tonic::{
    collector::{metrics::v1::ExportMetricsServiceRequest, trace::v1::ExportTraceServiceRequest},
    trace::v1::Span,
};
use prost::Message;
use segment_relay::{
    proto::{
        self, Capture, CaptureBatchRequest, CaptureRequest, CaptureStreamRequest, WaitFor,
        integration_service_client::IntegrationServiceClient,
        segment_relay_client::SegmentRelayClient,
    },
    sandbox::{Rule, Sandbox},
};
use tokio::net::TcpListener;
use tonic::{Request, transport::Channel};

use crate::{
    collector::{Collector, attribute, failed},
    harness::{PATIENCE, acme, numbered},
    process::{Process, lasting_sandbox},
    receiver::Receiver,
};

const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";
const METHOD: &str = "jebbit.segmentrelay.v1.SegmentRelay/Capture";

/// A relay as a process, with a sandbox and a collector.
struct Stage {
    sandbox: Arc<Sandbox>,
    urls: [String; 2],
    directory: tempfile::TempDir,
    environment: Vec<(&'static str, String)>,
    relay: Process,
}

impl Stage {
    async fn start(environment: &[(&'static str, &str)]) -> Self {
        let (sandbox, urls) = lasting_sandbox().await;
        let directory = tempfile::tempdir().expect("a directory");
        let environment: Vec<_> = environment
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()))
            .collect();
        let relay = run(directory.path(), &urls, &environment).await;
        let stage = Self {
            sandbox,
            urls,
            directory,
            environment,
            relay,
        };
        let request = proto::CreateIntegrationRequest {
            integration: Some(acme()),
        };
        let mut integrations = IntegrationServiceClient::new(stage.channel());
        integrations
            .create_integration(request)
            .await
            .expect("created");
        stage
    }

    fn channel(&self) -> Channel {
        self.relay.channel.clone()
    }

    /// SIGKILL, and a new one on the same outbox.
    async fn restart(&mut self) {
        self.relay.kill();
        self.relay = run(self.directory.path(), &self.urls, &self.environment).await;
    }

    /// A call of a caller that is traced, or not.
    async fn capture(&self, capture: Capture, wait_for: WaitFor, sampled: Option<bool>) {
        let mut request = Request::new(CaptureRequest {
            integration_id: "acme".into(),
            capture: Some(capture),
            wait_for: wait_for.into(),
        });
        request.set_timeout(PATIENCE);
        if let Some(sampled) = sampled {
            let context = format!("00-{TRACE_ID}-{CALLER}-0{}", u8::from(sampled));
            let context = context.parse().expect("ASCII");
            request.metadata_mut().insert("traceparent", context);
            let state = "vendor=7".parse().expect("ASCII");
            request.metadata_mut().insert("tracestate", state);
        }
        let mut client = SegmentRelayClient::new(self.channel());
        client.capture(request).await.expect("accepted");
    }

    fn fail_with(&self, status: u16) {
        let rule = Rule {
            status: Some(status),
            ..Rule::default()
        };
        self.sandbox.set_rules(vec![rule]).expect("a fine rule");
    }

    async fn arrived(&self, events: u64) {
        let arrived = self
            .sandbox
            .wait_for(|stats| stats.events_accepted >= events, PATIENCE);
        arrived.await.expect("the events arrive");
    }
}

async fn run(directory: &Path, urls: &[String; 2], environment: &[(&str, String)]) -> Process {
    let environment: Vec<(&str, &Path)> = environment
        .iter()
        .map(|(name, value)| (*name, Path::new(value)))
        .collect();
    Process::start_with(&directory.join("outbox"), urls, &environment).await
}

fn named(collector: &Collector, name: &str) -> Vec<Span> {
    let spans = collector.spans().into_iter();
    spans.filter(|span| span.name == name).collect()
}

/// The steps below a span, without what became of its captures later.
fn steps(collector: &Collector, parent: &Span) -> Vec<String> {
    let spans = collector.spans().into_iter();
    let mut names: Vec<_> = spans
        .filter(|span| span.parent_span_id == parent.span_id && span.name != "deliver")
        .map(|span| span.name)
        .collect();
    names.sort_unstable();
    names
}

#[tokio::test]
async fn a_trace_leads_from_the_caller_to_the_attempt_also_across_a_restart() {
    let collector = Collector::start().await;
    let mut stage = Stage::start(&[
        (
            "SEGMENT_RELAY__OTLP__ENDPOINT",
            &format!("http://{}", collector.address),
        ),
        ("SEGMENT_RELAY__OTLP__HEADERS", "x-tenant=quiz"),
        ("SEGMENT_RELAY__TRACES__SAMPLE_RATIO", "0"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "deployment.environment.name=test",
        ),
    ])
    .await;
    stage.fail_with(503);
    stage
        .capture(numbered(1), WaitFor::Accepted, Some(true))
        .await;

    // The call is its caller's child, with the steps below it.
    let call = collector
        .until(|collector| named(collector, METHOD).pop())
        .await;
    assert_eq!(hex::encode(&call.trace_id), TRACE_ID);
    assert_eq!(hex::encode(&call.parent_span_id), CALLER);
    assert_eq!(attribute(&call, "rpc.system.name"), "grpc");
    assert_eq!(attribute(&call, "rpc.method"), METHOD);
    assert_eq!(attribute(&call, "rpc.response.status_code"), "OK");
    assert_eq!(attribute(&call, "segment_relay.integration_id"), "acme");
    assert_eq!(attribute(&call, "segment_relay.capture_id"), "capture-1");
    assert_eq!(steps(&collector, &call), ["enqueue", "map", "validate"]);
    let enqueue = named(&collector, "enqueue").pop().expect("a step");
    assert_eq!(steps(&collector, &enqueue), ["group commit"]);
    assert!(enqueue.end_time_unix_nano <= call.end_time_unix_nano);

    // An attempt that failed, in a batch that is linked to the call.
    let attempt = collector
        .until(|collector| named(collector, "POST").into_iter().find(failed))
        .await;
    assert_eq!(attribute(&attempt, "http.response.status_code"), "503");
    assert_eq!(attribute(&attempt, "error.type"), "503");
    assert_eq!(attribute(&attempt, "segment_relay.reason"), "SERVER_ERROR");
    assert_eq!(attribute(&attempt, "http.request.method"), "POST");
    assert_eq!(attribute(&attempt, "server.address"), "127.0.0.1");

    // After a restart another process delivers it, and its batch is linked as well.
    stage.restart().await;
    stage.sandbox.set_rules(Vec::new()).expect("no rules");
    stage.arrived(2).await;
    let attempt = collector
        .until(|collector| {
            named(collector, "POST")
                .into_iter()
                .find(|span| !failed(span))
        })
        .await;
    assert_eq!(attribute(&attempt, "http.response.status_code"), "200");
    let batch = collector
        .until(|collector| {
            let batches = named(collector, "deliver batch").into_iter();
            batches
                .into_iter()
                .find(|span| span.span_id == attempt.parent_span_id)
        })
        .await;
    assert_eq!(batch.trace_id, attempt.trace_id);
    assert_ne!(batch.trace_id, call.trace_id);
    let [link] = batch.links.as_slice() else {
        panic!("{:?}", batch.links);
    };
    assert_eq!(
        (&link.trace_id, &link.span_id),
        (&call.trace_id, &call.span_id)
    );
    assert_eq!(steps(&collector, &batch), ["POST", "settle"]);
    assert_eq!(attribute(&batch, "segment_relay.events"), "2");

    // In the capture's own trace stands what became of it, linked to the batch.
    let delivered = collector
        .until(|collector| {
            named(collector, "deliver")
                .into_iter()
                .find(|span| !failed(span))
        })
        .await;
    assert_eq!(delivered.trace_id, call.trace_id);
    assert_eq!(delivered.parent_span_id, call.span_id);
    assert_eq!([&call.trace_state, &delivered.trace_state], ["vendor=7"; 2]);
    assert_eq!(
        attribute(&delivered, "segment_relay.track.state"),
        "delivered"
    );
    assert_eq!(delivered.links[0].span_id, batch.span_id);

    // The caller of a stream decides for all its captures, whatever the ratio.
    let mut request = Request::new(tokio_stream::iter((2..4).map(|number| {
        CaptureStreamRequest {
            correlation_id: number.to_string(),
            integration_id: "acme".into(),
            capture: Some(numbered(number)),
        }
    })));
    let context = format!("00-{TRACE_ID}-{CALLER}-01").parse().expect("ASCII");
    request.metadata_mut().insert("traceparent", context);
    let mut client = SegmentRelayClient::new(stage.channel());
    let answers = client.capture_stream(request).await.expect("a stream");
    let mut answers = answers.into_inner();
    while answers.message().await.expect("a result").is_some() {}
    collector
        .until(|collector| (named(collector, "CaptureStream message").len() == 2).then_some(()))
        .await;

    let headers = collector.headers();
    assert!(headers.contains("x-tenant=quiz"), "{headers:?}");
    let resources = collector.resources();
    for expected in [
        "service.name=segment-relay",
        "deployment.environment.name=test",
    ] {
        assert!(resources.contains(expected), "{resources:?}");
    }
}

#[tokio::test]
async fn who_is_not_traced_leaves_no_span_but_errors_do() {
    let collector = Collector::start().await;
    let stage = Stage::start(&[
        (
            "SEGMENT_RELAY__OTLP__ENDPOINT",
            &format!("http://{}", collector.address),
        ),
        ("SEGMENT_RELAY__TRACES__SAMPLE_RATIO", "0"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
    ])
    .await;
    stage.capture(numbered(1), WaitFor::Delivered, None).await;
    stage
        .capture(numbered(2), WaitFor::Delivered, Some(false))
        .await;
    // The caller's fault is no error of the relay's.
    let mut client = SegmentRelayClient::new(stage.channel());
    let request = CaptureRequest {
        integration_id: "nobody".into(),
        ..CaptureRequest::default()
    };
    client.capture(request).await.expect_err("nobody's");
    stage.fail_with(503);
    stage.capture(numbered(3), WaitFor::Accepted, None).await;
    let attempt = collector
        .until(|collector| named(collector, "POST").pop())
        .await;
    assert!(failed(&attempt), "{attempt:?}");
    // What came before it in the queue would have come before it.
    assert_eq!(named(&collector, METHOD), []);
    assert!(
        collector.spans().iter().all(failed),
        "{:#?}",
        collector.spans()
    );
}

#[tokio::test]
async fn batches_and_streams_are_traced_in_few_spans() {
    let collector = Collector::start().await;
    let stage = Stage::start(&[
        (
            "SEGMENT_RELAY__OTLP__ENDPOINT",
            &format!("http://{}", collector.address),
        ),
        ("SEGMENT_RELAY__TRACES__SAMPLE_RATIO", "1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
    ])
    .await;
    let mut client = SegmentRelayClient::new(stage.channel());
    let batch = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: (0..50).map(numbered).collect(),
        wait_for: WaitFor::Accepted.into(),
    };
    client.capture_batch(batch).await.expect("accepted");
    stage.arrived(100).await;
    let call = collector
        .until(|collector| named(collector, &format!("{METHOD}Batch")).pop())
        .await;
    assert_eq!(attribute(&call, "segment_relay.captures"), "50");
    let linked = |collector: &Collector| {
        let batches = named(collector, "deliver batch");
        let links: usize = batches.iter().map(|span| span.links.len()).sum();
        (links == 50).then_some(())
    };
    collector.until(linked).await;
    assert_eq!(steps(&collector, &call), ["enqueue", "validate and map"]);

    // Each message of a stream has a trace of its own, linked to the stream's.
    let requests = (100..103).map(|number| CaptureStreamRequest {
        correlation_id: number.to_string(),
        integration_id: "acme".into(),
        capture: Some(numbered(number)),
    });
    let answers = client.capture_stream(tokio_stream::iter(requests)).await;
    let mut answers = answers.expect("a stream").into_inner();
    while answers.message().await.expect("a result").is_some() {}
    let messages = collector
        .until(|collector| {
            let messages = named(collector, "CaptureStream message");
            (messages.len() == 3).then_some(messages)
        })
        .await;
    let stream = collector
        .until(|collector| named(collector, &format!("{METHOD}Stream")).pop())
        .await;
    for message in &messages {
        assert_ne!(message.trace_id, stream.trace_id);
        assert_eq!(message.links[0].span_id, stream.span_id);
        assert_eq!(attribute(message, "rpc.response.status_code"), "OK");
    }
}

#[tokio::test]
async fn a_collector_is_spoken_to_by_http_as_well_and_gets_the_metrics() {
    let receiver = Receiver::start().await;
    let mut stage = Stage::start(&[
        (
            "SEGMENT_RELAY__OTLP__ENDPOINT",
            &format!("http://{}/otel", receiver.address),
        ),
        ("SEGMENT_RELAY__OTLP__PROTOCOL", "http"),
        ("SEGMENT_RELAY__METRICS__EXPORT_INTERVAL_MS", "1000"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
    ])
    .await;
    stage
        .capture(numbered(1), WaitFor::Delivered, Some(true))
        .await;
    // The last ones leave at the end.
    stage.relay.terminate().await;
    let collector = Collector::by_hand();
    for request in receiver.received() {
        match request.path.as_str() {
            "/otel/v1/traces" => collector
                .take_traces(ExportTraceServiceRequest::decode(request.body).expect("spans")),
            "/otel/v1/metrics" => collector
                .take_metrics(ExportMetricsServiceRequest::decode(request.body).expect("metrics")),
            path => panic!("{path}"),
        }
    }
    assert_eq!(named(&collector, METHOD).len(), 1);
    assert_eq!(named(&collector, "POST").len(), 1);
    let metrics = collector.metrics();
    for name in [
        "rpc.server.call.duration",
        "http.client.request.duration",
        "segment_relay.captures",
        "segment_relay.events",
        "segment_relay.delivery.latency",
        "segment_relay.outbox.commit.duration",
        "segment_relay.outbox.disk.free",
        "process.memory.usage",
    ] {
        assert!(metrics.contains(name), "{name} is not among {metrics:?}");
    }
}

#[tokio::test]
async fn a_dead_collector_costs_nothing_but_the_traces() {
    // One that takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let silent = silent
        .local_addr()
        .map(|address| (silent, address))
        .expect("an address");
    for protocol in ["grpc", "http"] {
        let mut stage = Stage::start(&[
            (
                "SEGMENT_RELAY__OTLP__ENDPOINT",
                &format!("http://{}", silent.1),
            ),
            ("SEGMENT_RELAY__OTLP__PROTOCOL", protocol),
            ("SEGMENT_RELAY__TRACES__SAMPLE_RATIO", "1"),
            ("SEGMENT_RELAY__TRACES__MAX_QUEUED_SPANS", "128"),
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ])
        .await;
        // Many times what the queue of spans holds.
        for number in 0..300 {
            stage
                .capture(numbered(number), WaitFor::Accepted, None)
                .await;
        }
        stage.arrived(600).await;
        let ended = tokio::time::timeout(Duration::from_secs(20), stage.relay.terminate());
        ended
            .await
            .expect("the drain does not wait for a collector");
    }
}
