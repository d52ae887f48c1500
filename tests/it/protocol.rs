//! What is no gRPC is refused before anything of it is read.

use bytes::Bytes;
use http::{Request, StatusCode};
use segment_relay::proto::{CaptureRequest, WaitFor};
use tonic::Code;

use crate::{
    harness::{World, acme, numbered},
    wire::{Wire, call, framed, read, within},
};

const CAPTURE: &str = "/jebbit.segmentrelay.v1.SegmentRelay/Capture";

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
