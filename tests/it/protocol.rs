//! The protocol's edges: what is no gRPC is refused before anything of it is read, and what is
//! no message, too large or compressed gets the code that other gRPC servers have for it.

use std::io::Write;

use bytes::{BufMut, Bytes, BytesMut};
use flate2::{Compression, write::GzEncoder};
use http::{Request, StatusCode};
use prost::Message;
use segment_relay::proto::{
    Capture, CaptureBatchRequest, CaptureRequest, CaptureStreamRequest, ListDeadLettersRequest,
    ListIntegrationsRequest, WaitFor,
};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;

use crate::{
    harness::{World, acme, numbered, reason, text},
    wire::{Wire, call, framed, read, within},
};

const CAPTURE: &str = "/jebbit.segmentrelay.v1.SegmentRelay/Capture";
const BATCH: &str = "/jebbit.segmentrelay.v1.SegmentRelay/CaptureBatch";
const STREAM: &str = "/jebbit.segmentrelay.v1.SegmentRelay/CaptureStream";
const LIST: &str = "/jebbit.segmentrelay.v1.IntegrationService/ListIntegrations";
const DEAD_LETTERS: &str = "/jebbit.segmentrelay.v1.DeadLetterService/ListDeadLetters";
const HEALTH: &str = "/grpc.health.v1.Health/Check";

fn capture(number: usize) -> Bytes {
    framed(&CaptureRequest {
        integration_id: "acme".into(),
        capture: Some(numbered(number)),
        wait_for: WaitFor::Accepted.into(),
    })
}

fn with_type(content_type: Option<&str>) -> http::request::Builder {
    let builder = Request::post(format!("http://relay{CAPTURE}"));
    match content_type {
        Some(one) => builder.header("content-type", one),
        None => builder,
    }
}

#[tokio::test]
async fn other_content_types_and_methods_are_refused_and_nothing_is_stored() {
    let world = World::start().await;
    world.create(acme()).await;
    let wire = Wire::connect(world.address).await;
    for other in [
        Some("application/grpc-web"),
        Some("application/grpc-web+proto"),
        Some("application/grpc+json"),
        Some("application/json"),
        Some("text/plain"),
        Some(""),
        None,
    ] {
        let answer = wire.unary(with_type(other), capture(1)).await;
        let answer = answer.expect("answered");
        assert_eq!(
            (answer.status, answer.code()),
            (StatusCode::UNSUPPORTED_MEDIA_TYPE, None),
            "{other:?}"
        );
    }
    for method in ["GET", "PUT", "DELETE", "HEAD", "OPTIONS"] {
        let answer = wire.unary(call(CAPTURE).method(method), capture(1)).await;
        let answer = answer.expect("answered");
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{method}");
        assert_eq!(answer.headers["allow"], "POST", "{method}");
    }
    let unknown = world.status("capture-1").await.expect_err("not stored");
    assert_eq!(unknown.code(), Code::NotFound);
    for taken in [
        "application/grpc",
        "application/grpc+proto",
        "application/grpc; charset=utf-8",
    ] {
        let answer = wire.unary(with_type(Some(taken)), capture(1)).await;
        assert_eq!(answer.expect("answered").code(), Some(0), "{taken}");
    }
    world.status("capture-1").await.expect("stored");
    world.stop().await;
}

#[tokio::test]
async fn a_refusal_does_not_wait_for_the_body() {
    let world = World::start().await;
    let wire = Wire::connect(world.address).await;
    let json = with_type(Some("application/json"));
    let (answer, stream) = wire.open(json, false).await.expect("opened");
    let answer = within(read(answer)).await.expect("answered");
    assert_eq!(answer.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    drop(stream);
    world.stop().await;
}

/// A body of one frame that says so much of itself.
fn raw(flag: u8, length: usize, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(flag);
    frame.put_u32(length.try_into().expect("short"));
    frame.extend_from_slice(message);
    frame.freeze()
}

#[tokio::test]
async fn each_broken_request_has_its_code_its_reason_and_changes_nothing() {
    use Code::{Internal, InvalidArgument, ResourceExhausted, Unimplemented};
    let world = World::start().await;
    let wire = Wire::connect(world.address).await;
    // A field of bytes that ends too early, in every message.
    let broken = raw(0, 2, &[0x0a, 9]);
    let large = raw(0, 5_000_000, b"");
    let flagged = raw(1, 2, &[0x0a, 0]);
    let two = [&raw(0, 0, b"")[..], &raw(0, 0, b"")].concat();
    let mut rows = Vec::new();
    for path in [CAPTURE, BATCH, LIST, DEAD_LETTERS, STREAM] {
        rows.push((path, &broken, InvalidArgument, "MALFORMED_MESSAGE"));
        rows.push((path, &large, ResourceExhausted, "MESSAGE_TOO_LARGE"));
        rows.push((path, &flagged, Internal, "MALFORMED_MESSAGE"));
    }
    let (two, cut, empty) = (Bytes::from(two), raw(0, 9, b"x"), Bytes::new());
    for path in [CAPTURE, BATCH] {
        for bad in [&two, &cut, &empty] {
            rows.push((path, bad, InvalidArgument, "MALFORMED_MESSAGE"));
        }
    }
    for path in [LIST, DEAD_LETTERS] {
        rows.push((path, &empty, InvalidArgument, "MALFORMED_MESSAGE"));
    }
    for path in [
        "/jebbit.segmentrelay.v1.SegmentRelay/NoSuch",
        "/no.such.Service/Call",
        "/grpc.health.v1.Health/NoSuch",
        "/",
    ] {
        rows.push((path, &broken, Unimplemented, "RPC_UNKNOWN"));
    }
    for (path, body, code, word) in rows {
        let answer = wire.unary(call(path), body.clone()).await;
        let answer = answer.unwrap_or_else(|error| panic!("{path}: {error}"));
        let status = answer.grpc();
        assert_eq!(answer.status, StatusCode::OK, "{path}");
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (code, word),
            "{path} {body:?}: {status:?}"
        );
        if word == "RPC_UNKNOWN" {
            assert!(status.message().contains(path), "{status:?}");
        }
    }
    world.stop().await;
}

fn gzip(message: &impl Message) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder
        .write_all(&message.encode_to_vec())
        .expect("written");
    let bytes = encoder.finish().expect("finished");
    raw(1, bytes.len(), &bytes)
}

fn encoded(path: &str, encoding: &str) -> http::request::Builder {
    call(path).header("grpc-encoding", encoding)
}

#[tokio::test]
async fn gzip_is_taken_everywhere_and_other_encodings_are_told_what_is() {
    let world = World::start().await;
    world.create(acme()).await;
    let wire = Wire::connect(world.address).await;
    let one = CaptureRequest {
        integration_id: "acme".into(),
        capture: Some(numbered(1)),
        wait_for: 0,
    };
    let batch = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: vec![numbered(2), numbered(3)],
        wait_for: 0,
    };
    for (path, body) in [
        (CAPTURE, gzip(&one)),
        (BATCH, gzip(&batch)),
        (LIST, gzip(&ListIntegrationsRequest::default())),
        (DEAD_LETTERS, gzip(&ListDeadLettersRequest::default())),
        (HEALTH, gzip(&HealthCheckRequest::default())),
        // A message that is not worth it comes as it is.
        (CAPTURE, framed(&one)),
    ] {
        let answer = wire.unary(encoded(path, "gzip"), body).await;
        assert_eq!(answer.expect("answered").code(), Some(0), "{path}");
    }
    let streamed = (4..8).map(|number| {
        let request = CaptureStreamRequest {
            correlation_id: number.to_string(),
            integration_id: "acme".into(),
            capture: Some(numbered(number)),
        };
        match number % 2 {
            0 => gzip(&request),
            _ => framed(&request),
        }
    });
    let body = streamed.collect::<Vec<_>>().concat();
    let answer = wire.unary(encoded(STREAM, "gzip"), body.into()).await;
    let answer = answer.expect("answered");
    assert_eq!((answer.code(), answer.messages.len()), (Some(0), 4));
    for number in 1..8 {
        world
            .status(&format!("capture-{number}"))
            .await
            .expect("stored");
    }
    for encoding in ["deflate", "zstd", "GZIP", ""] {
        for path in [CAPTURE, STREAM, LIST, HEALTH] {
            let answer = wire.unary(encoded(path, encoding), gzip(&one)).await;
            let answer = answer.unwrap_or_else(|error| panic!("{path}: {error}"));
            let status = answer.grpc();
            assert_eq!(
                (status.code(), reason(&status).as_str()),
                (Code::Unimplemented, "COMPRESSION_UNSUPPORTED"),
                "{encoding} {path}"
            );
            assert_eq!(answer.headers["grpc-accept-encoding"], "identity,gzip");
        }
    }
    world.stop().await;
}

#[tokio::test]
async fn what_inflates_beyond_a_bound_is_refused() {
    let settings = "[limits]\nrequest_bytes_in_flight = 8388608\n";
    let world = World::with(settings).await;
    world.create(acme()).await;
    let wire = Wire::connect(world.address).await;
    let capture = |bytes: usize| {
        let mut capture = numbered(1);
        let essay = text(&"x".repeat(bytes));
        capture.attributes.insert("essay".into(), essay);
        Some(capture)
    };
    let unary = |capture: Option<Capture>| CaptureRequest {
        integration_id: "acme".into(),
        capture,
        wait_for: 0,
    };
    let bomb = gzip(&unary(capture(50_000_000)));
    assert!(bomb.len() < 100_000, "{}", bomb.len());
    let streamed = gzip(&CaptureStreamRequest {
        correlation_id: String::new(),
        integration_id: "acme".into(),
        capture: capture(200_000),
    });
    let health = gzip(&HealthCheckRequest {
        service: "x".repeat(100_000),
    });
    for (path, body) in [(CAPTURE, bomb), (STREAM, streamed), (HEALTH, health)] {
        let answer = wire.unary(encoded(path, "gzip"), body).await;
        let status = answer.expect("answered").grpc();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"),
            "{path}: {status:?}"
        );
    }
    // Calls under way hold what they have inflated: three of 3 MB are too many for 8 MiB.
    let large = gzip(&unary(capture(3_000_000)));
    let mut open = Vec::new();
    for _ in 0..2 {
        let (answer, mut stream) = wire
            .open(encoded(CAPTURE, "gzip"), false)
            .await
            .expect("opened");
        // The end of the call does not come.
        stream.send_data(large.clone(), false).expect("sent");
        open.push((answer, stream));
    }
    let refused = async {
        loop {
            let answer = wire.unary(encoded(CAPTURE, "gzip"), large.clone()).await;
            let status = answer.expect("answered").grpc();
            if status.code() == Code::ResourceExhausted {
                break reason(&status);
            }
        }
    };
    assert_eq!(within(refused).await, "RELAY_LIMIT");
    drop(open);
    world.stop().await;
}
