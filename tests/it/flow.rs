//! Flow control: a client that sends faster than the relay takes is slowed down, and keeps
//! its connection.

use bytes::Bytes;
use h2::Reason;
use http::StatusCode;
use prost::Message;
use segment_relay::proto::{
    Capture, CaptureStreamRequest, CaptureStreamResponse, CreateIntegrationRequest,
    ListIntegrationsRequest, integration_service_client::IntegrationServiceClient,
};

use tempfile::TempDir;
use tracing::subscriber::{DefaultGuard, NoSubscriber};

use crate::{
    faults::build_shim,
    harness::acme,
    process::{Process, lasting_sandbox},
    wire::{Answer, Wire, call, framed, read, within},
};

const STREAM: &str = "/jebbit.segmentrelay.v1.SegmentRelay/CaptureStream";
const LIST: &str = "/jebbit.segmentrelay.v1.IntegrationService/ListIntegrations";
const CAPTURES: usize = 8_000;
/// Bytes of one call that the relay lets be unread.
const WINDOW: usize = 256 * 1024;

/// A relay whose log has no line for each frame, with its directory.
struct Quiet {
    relay: Process,
    directory: TempDir,
    /// Nor has the test's.
    _subscriber: DefaultGuard,
}

impl Quiet {
    async fn start(settings: &str) -> Self {
        let subscriber = tracing::subscriber::set_default(NoSubscriber::new());
        let (_sandbox, urls) = lasting_sandbox().await;
        let directory = tempfile::tempdir().expect("a directory");
        let shim = build_shim(directory.path());
        let file = directory.path().join("relay.toml");
        let settings = format!("[log]\nfilter = \"info\"\n[server]\n{settings}\n");
        std::fs::write(&file, settings).expect("written");
        let environment = [
            ("LD_PRELOAD", shim),
            ("FAULT_CONTROL", directory.path().join("control")),
        ];
        let outbox = directory.path().join("outbox");
        let relay = Process::start_faulty(&outbox, &urls, &file, &environment).await;
        let message = CreateIntegrationRequest {
            integration: Some(acme()),
        };
        let created = IntegrationServiceClient::new(relay.channel.clone())
            .create_integration(message)
            .await;
        created.expect("created");
        Self {
            relay,
            directory,
            _subscriber: subscriber,
        }
    }

    async fn connect(&self) -> Wire {
        Wire::connect(self.relay.address.parse().expect("an address")).await
    }
}

/// A capture whose frame has so many bytes.
fn frame(size: usize, number: usize) -> Bytes {
    let mut request = CaptureStreamRequest {
        correlation_id: String::new(),
        integration_id: "acme".into(),
        capture: Some(Capture {
            email: "a@b.io".into(),
            campaign_id: "c".into(),
            session_id: format!("{number:05}"),
            ..Capture::default()
        }),
    };
    let short = size.checked_sub(framed(&request).len()).expect("it fits");
    if short > 2 {
        request.correlation_id = "x".repeat(short - 2);
        let over = framed(&request).len() - size;
        request.correlation_id.truncate(short - 2 - over);
    }
    framed(&request)
}

fn results(answer: &Answer) -> usize {
    let results = answer.messages.iter().filter(|message| {
        let result = CaptureStreamResponse::decode(&***message).expect("a result");
        result.result.is_some_and(|result| result.error.is_none())
    });
    results.count()
}

async fn another_call_works(wire: &Wire) {
    let message = framed(&ListIntegrationsRequest::default());
    let answer = wire.unary(call(LIST), message).await.expect("answered");
    assert_eq!((answer.status, answer.code()), (StatusCode::OK, Some(0)));
}

/// As fast as the windows allow, every result read at once.
#[tokio::test]
async fn a_fast_stream_keeps_its_connection_whatever_the_size_of_its_messages() {
    let relay = Quiet::start("").await;
    for size in [46, 88, 171, 262] {
        let mut wire = relay.connect().await;
        let (answer, mut stream) = wire.open(call(STREAM), false).await.expect("opened");
        let reading = tokio::spawn(read(answer));
        let mut sent = 0;
        while sent < CAPTURES {
            // The same captures for each size: they are known then, which is quicker.
            let next = |number| frame(size, sent + number);
            let filled = wire.fill(&mut stream, CAPTURES - sent, next).await;
            sent += filled.unwrap_or_else(|error| panic!("{size} bytes: {error}"));
        }
        stream.send_data(Bytes::new(), true).expect("ended");
        let answer = within(reading).await.expect("no panic").expect("answered");
        assert_eq!((answer.code(), results(&answer)), (Some(0), sent), "{size}");
    }
}

#[tokio::test]
async fn streams_whose_results_are_not_read_wait_and_others_go_on() {
    let relay = Quiet::start("").await;
    for size in [46, 88] {
        let mut wire = relay.connect().await;
        let mut streams = Vec::new();
        for _ in 0..3 {
            let (answer, mut stream) = wire.open(call(STREAM), false).await.expect("opened");
            let sent = wire.fill(&mut stream, usize::MAX, |_| frame(size, 7)).await;
            let sent = sent.unwrap_or_else(|error| panic!("{size} bytes: {error}"));
            assert!(sent * size > WINDOW - size, "{sent} frames of {size} bytes");
            streams.push((answer, stream, sent));
        }
        another_call_works(&wire).await;
        for (answer, mut stream, sent) in streams {
            stream.send_data(Bytes::new(), true).expect("ended");
            let answer = within(read(answer)).await.expect("answered");
            assert_eq!((answer.code(), results(&answer)), (Some(0), sent), "{size}");
        }
    }
}

#[tokio::test]
async fn a_stalled_disk_slows_streams_down_and_ends_none() {
    let relay = Quiet::start("").await;
    let control = relay.directory.path().join("control");
    std::fs::write(&control, "stall").expect("the fault begins");
    let mut wire = relay.connect().await;
    let mut streams = Vec::new();
    for first in [10_000, 40_000] {
        let (answer, mut stream) = wire.open(call(STREAM), false).await.expect("opened");
        let filled = wire.fill(&mut stream, usize::MAX, |number| frame(88, first + number));
        let sent = filled.await.expect("the connection lives");
        assert!(sent * 88 > WINDOW - 88, "{sent} frames");
        streams.push((answer, stream, sent));
    }
    std::fs::remove_file(&control).expect("the fault ends");
    for (answer, mut stream, sent) in streams {
        stream.send_data(Bytes::new(), true).expect("ended");
        let answer = within(read(answer)).await.expect("answered");
        assert_eq!((answer.code(), results(&answer)), (Some(0), sent));
    }
}

/// What the bound on small frames is there for: messages without content, results unread.
#[tokio::test]
async fn a_flood_of_tiny_frames_ends_its_connection() {
    let relay = Quiet::start("").await;
    let mut wire = relay.connect().await;
    let (_answer, mut stream) = wire.open(call(STREAM), false).await.expect("opened");
    let empty = framed(&CaptureStreamRequest::default());
    let filled = wire.fill(&mut stream, usize::MAX, |_| empty.clone()).await;
    filled.expect_err("closed");
    let ended = within(wire.ended).await.expect("no panic");
    let ended = ended.expect_err("closed for a reason");
    // The end of the connection may overtake the GOAWAY.
    let is_told = ended.reason() == Some(Reason::ENHANCE_YOUR_CALM);
    assert!(is_told || ended.is_io(), "{ended:?}");
    another_call_works(&relay.connect().await).await;
}
