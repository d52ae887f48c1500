use std::collections::HashSet;

use segment_relay::proto::{
    Capture, CaptureStreamRequest, CaptureStreamResponse, DeliveryState, EventDelivery, Integration,
};
use tokio_stream::StreamExt;
use tonic::{Code, Status};

use crate::harness::{PATIENCE, World, acme, numbered, reason, worked_example};

fn request(number: usize, capture: Capture) -> CaptureStreamRequest {
    CaptureStreamRequest {
        correlation_id: format!("mark-{number}"),
        integration_id: "acme".into(),
        capture: Some(capture),
    }
}

async fn collect(
    answers: &mut tonic::Streaming<CaptureStreamResponse>,
) -> (Vec<CaptureStreamResponse>, Option<Status>) {
    let mut results = Vec::new();
    while let Some(answer) = answers.next().await {
        match answer {
            Ok(result) => results.push(result),
            Err(status) => return (results, Some(status)),
        }
    }
    (results, None)
}

#[tokio::test]
async fn a_stream_answers_every_capture_and_a_bad_one_fails_alone() {
    let world = World::with("[server]\nmax_stream_captures_in_flight = 8\n").await;
    world.create(acme()).await;
    let requests = (0..500).map(|number| match number {
        7 => request(
            7,
            Capture {
                email: "nobody".into(),
                ..numbered(7)
            },
        ),
        8 => CaptureStreamRequest {
            integration_id: "nobody".into(),
            ..request(8, numbered(8))
        },
        _ => request(number, numbered(number)),
    });
    let stream = tokio_stream::iter(requests.collect::<Vec<_>>());
    let mut answers = world
        .relay()
        .capture_stream(stream)
        .await
        .expect("opened")
        .into_inner();
    let (results, status) = collect(&mut answers).await;
    assert!(status.is_none(), "{status:?}");
    let marks: HashSet<_> = results
        .iter()
        .map(|answer| answer.correlation_id.clone())
        .collect();
    assert_eq!(
        marks,
        (0..500).map(|number| format!("mark-{number}")).collect()
    );
    let mut refused: Vec<_> = results
        .iter()
        .filter_map(|answer| answer.result.as_ref()?.error.as_ref())
        .map(|error| error.reason.as_str())
        .collect();
    refused.sort_unstable();
    assert_eq!(refused, ["INTEGRATION_NOT_FOUND", "INVALID_CAPTURE"]);
    world.arrived(996).await;
    world.stop().await;
}

#[tokio::test]
async fn the_events_of_one_person_keep_the_order_of_the_stream() {
    let world = World::start().await;
    world.create(acme()).await;
    let requests = (0..300).map(|number| {
        let capture_id = format!("capture-{number:03}");
        request(
            number,
            Capture {
                capture_id,
                ..worked_example()
            },
        )
    });
    let stream = tokio_stream::iter(requests.collect::<Vec<_>>());
    let mut answers = world
        .relay()
        .capture_stream(stream)
        .await
        .expect("opened")
        .into_inner();
    let (results, _) = collect(&mut answers).await;
    world.arrived(600).await;
    let mut by_mark = results;
    by_mark.sort_by_key(|answer| answer.result.as_ref().expect("a result").capture_id.clone());
    let expected: Vec<_> = by_mark
        .iter()
        .flat_map(|answer| &answer.result.as_ref().expect("a result").events)
        .map(|event| event.message_id.clone())
        .collect();
    let arrived: Vec<_> = world
        .sandbox
        .entries()
        .iter()
        .map(|entry| {
            entry.event()["messageId"]
                .as_str()
                .expect("an id")
                .to_owned()
        })
        .collect();
    assert_eq!(arrived, expected);
    world.stop().await;
}

/// Captures that come together are submitted together; each is answered for itself.
#[tokio::test]
async fn what_comes_together_is_answered_one_for_one() {
    let world = World::start().await;
    world.create(acme()).await;
    world
        .create(Integration {
            integration_id: "other".into(),
            ..acme()
        })
        .await;
    let changed = Capture {
        traffic_source: "elsewhere".into(),
        ..numbered(1)
    };
    let nameless = Capture {
        email: String::new(),
        ..numbered(2)
    };
    let of_other = CaptureStreamRequest {
        integration_id: "other".into(),
        ..request(4, numbered(1))
    };
    let long = CaptureStreamRequest {
        correlation_id: "ä".repeat(257),
        ..request(6, numbered(6))
    };
    let requests = vec![
        request(0, numbered(1)),
        request(1, numbered(1)),
        request(2, changed),
        request(3, nameless),
        of_other,
        CaptureStreamRequest {
            capture: None,
            ..request(5, numbered(5))
        },
        long,
    ];
    let mut relay = world.relay();
    let stream = relay.capture_stream(tokio_stream::iter(requests)).await;
    let mut answers = stream.expect("opened").into_inner();
    let (results, status) = collect(&mut answers).await;
    assert!(status.is_none(), "{status:?}");
    let mut said: Vec<_> = results
        .into_iter()
        .map(|answer| {
            let result = answer.result.expect("a result");
            let reason = result.error.map(|error| error.reason).unwrap_or_default();
            let is_skipped = |event: &EventDelivery| event.state() == DeliveryState::Skipped;
            let skipped = result
                .events
                .iter()
                .filter(|event| is_skipped(event))
                .count();
            (answer.correlation_id, result.duplicate, reason, skipped)
        })
        .collect();
    said.sort();
    let row = |mark: &str, duplicate, reason: &str, skipped| {
        (mark.to_owned(), duplicate, reason.to_owned(), skipped)
    };
    let mut expected = vec![
        row("mark-0", false, "", 0),
        row("mark-1", true, "", 0),
        row("mark-2", false, "CAPTURE_ID_REUSED", 0),
        row("mark-3", false, "", 2),
        row("mark-4", false, "", 0),
        row("mark-5", false, "INVALID_REQUEST", 0),
        row(&"ä".repeat(256), false, "INVALID_REQUEST", 0),
    ];
    expected.sort();
    assert_eq!(said, expected);
    world.arrived(4).await;
    world.stop().await;
}

#[tokio::test]
async fn a_drain_answers_what_was_taken_and_ends_the_stream() {
    let world = World::start().await;
    world.create(acme()).await;
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    sender.send(request(1, numbered(1))).await.expect("open");
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = world
        .relay()
        .capture_stream(stream)
        .await
        .expect("opened")
        .into_inner();
    let first = answers.next().await.expect("an answer").expect("no error");
    assert_eq!(first.correlation_id, "mark-1");
    world.begin_drain();
    let (_, status) = tokio::time::timeout(PATIENCE, collect(&mut answers))
        .await
        .expect("ends");
    let status = status.expect("an end with a status");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "DRAINING")
    );
    drop(sender);
    world.stop().await;
}

/// A request of an rpc that takes captures, of which the capture's bytes are no capture.
mod malformed {
    use bytes::Bytes;
    use http::uri::PathAndQuery;
    use prost::Message;
    use segment_relay::proto::raw;
    use tonic::{Request, client::Grpc};
    use tonic_prost::ProstCodec;

    use super::*;

    /// A text that is not UTF-8, as the address.
    const BAD: &[u8] = &[0x12, 2, 0xff, 0xfe];

    async fn unary<M: Message + Default + 'static>(world: &World, rpc: &str, request: M) -> Status {
        let mut client = Grpc::new(world.channel.clone());
        client.ready().await.expect("connected");
        let path = PathAndQuery::try_from(format!("/jebbit.segmentrelay.v1.SegmentRelay/{rpc}"));
        let codec = ProstCodec::<M, CaptureStreamResponse>::default();
        let answer = client.unary(Request::new(request), path.expect("a path"), codec);
        answer.await.expect_err("refused")
    }

    #[tokio::test]
    async fn bytes_that_are_no_capture_are_refused_and_change_nothing() {
        let world = World::start().await;
        world.create(acme()).await;
        let capture = raw::CaptureRequest {
            integration_id: "acme".into(),
            capture: vec![Bytes::from_static(BAD)],
            wait_for: 0,
        };
        let batch = raw::CaptureBatchRequest {
            integration_id: "acme".into(),
            captures: vec![numbered(1).encode_to_vec().into(), Bytes::from_static(BAD)],
            wait_for: 0,
        };
        for refused in [
            unary(&world, "Capture", capture).await,
            unary(&world, "CaptureBatch", batch).await,
        ] {
            assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
            assert_eq!(reason(&refused), "MALFORMED_MESSAGE");
            assert!(refused.message().contains("Capture"), "{refused:?}");
        }
        assert!(
            world.status("capture-1").await.is_err(),
            "nothing is stored"
        );
        world.stop().await;
    }

    #[tokio::test]
    async fn a_stream_answers_what_came_before_and_says_why_it_ends() {
        let world = World::start().await;
        world.create(acme()).await;
        let mut requests: Vec<_> = (0..3)
            .map(|number| raw::CaptureStreamRequest {
                correlation_id: format!("mark-{number}"),
                integration_id: "acme".into(),
                capture: vec![numbered(number).encode_to_vec().into()],
            })
            .collect();
        requests[2].capture = vec![Bytes::from_static(BAD)];
        let mut client = Grpc::new(world.channel.clone());
        client.ready().await.expect("connected");
        let path = "/jebbit.segmentrelay.v1.SegmentRelay/CaptureStream";
        let mut answers = client
            .streaming(
                Request::new(tokio_stream::iter(requests)),
                PathAndQuery::from_static(path),
                ProstCodec::<raw::CaptureStreamRequest, CaptureStreamResponse>::default(),
            )
            .await
            .expect("opened")
            .into_inner();
        let (results, status) = collect(&mut answers).await;
        let status = status.expect("an error");
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert_eq!(reason(&status), "MALFORMED_MESSAGE");
        let answered: HashSet<_> = results
            .iter()
            .map(|answer| answer.correlation_id.as_str())
            .collect();
        assert_eq!(answered, HashSet::from(["mark-0", "mark-1"]));
        world.stop().await;
    }
}
