//! How connections begin, how long they live, and what their peers may do.

use segment_relay::proto::{
    CaptureBatchRequest, ListIntegrationsRequest, WaitFor, WatchDeliveriesRequest,
    integration_service_client::IntegrationServiceClient,
};
use segment_relay::sandbox::Rule;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, transport::Endpoint};

use crate::harness::{PATIENCE, World, acme, numbered};

/// Waits until a call over a connection of its own works.
pub(crate) async fn works(world: &World) {
    let endpoint = Endpoint::from_shared(format!("http://{}", world.address)).expect("a URL");
    let channel = endpoint.connect().await.expect("connects");
    let request = ListIntegrationsRequest::default();
    IntegrationServiceClient::new(channel)
        .list_integrations(request)
        .await
        .expect("works");
}

#[tokio::test]
async fn connections_are_bounded_and_idle_and_old_ones_end() {
    let world = World::with(
        "[server]\nmax_connections = 2\nmax_connection_idle_ms = 200\nmax_connection_age_ms = 1000\n\
         max_connection_age_grace_ms = 100\n",
    )
    .await;
    // Each waits for a place, which the idle ones before it give up.
    for _ in 0..5 {
        tokio::time::timeout(PATIENCE, works(&world))
            .await
            .expect("a place is free in time");
    }
    // A watch is no idle connection, but its connection grows old, and the grace is
    // short: it is cut off.
    let mut updates = world
        .relay()
        .watch_deliveries(WatchDeliveriesRequest::default())
        .await
        .expect("watches")
        .into_inner();
    let cut = tokio::time::timeout(PATIENCE, updates.message())
        .await
        .expect("in time");
    assert_eq!(cut.expect_err("cut off").code(), Code::Unknown);
    world.stop().await;
}

#[tokio::test]
async fn http_1_is_not_spoken() {
    let world = World::start().await;
    let mut peer = TcpStream::connect(world.address).await.expect("connects");
    let request = b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n";
    peer.write_all(request).await.expect("written");
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, peer.read_to_end(&mut answer)).await;
    // The server may close before it has read all.
    let _ = ended.expect("closed");
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    works(&world).await;
    world.stop().await;
}

/// Waits until a new connection is asked to end.
async fn asked_to_end(world: &World) {
    let mut peer = by_hand(world).await;
    let mut all = Vec::new();
    let asked = async {
        while !goes_away(&all, NO_ERROR) {
            assert_ne!(peer.read_buf(&mut all).await.expect("read"), 0, "cut off");
        }
    };
    tokio::time::timeout(PATIENCE, asked)
        .await
        .expect("in time");
}

#[tokio::test]
async fn an_old_connection_is_asked_to_end_and_its_calls_finish() {
    let world = World::with("[server]\nmax_connection_age_ms = 1000\n").await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    let mut relay = world.relay();
    let held = tokio::spawn(async move {
        let waiting = CaptureBatchRequest {
            wait_for: WaitFor::Delivered.into(),
            integration_id: "acme".into(),
            captures: vec![numbered(0)],
        };
        relay.capture_batch(waiting).await
    });
    let tried = world
        .sandbox
        .wait_for(|stats| stats.requests > 0, PATIENCE)
        .await;
    tried.expect("the call is under way");
    // Two connections, one after the other, live longer than the call's.
    for _ in 0..2 {
        asked_to_end(&world).await;
    }
    assert!(!held.is_finished());
    world.behave();
    held.await.expect("no panic").expect("delivered");
    works(&world).await;
    world.stop().await;
}

/// A peer that speaks HTTP/2 by hand: it has sent its preface and settings.
pub(crate) async fn by_hand(world: &World) -> TcpStream {
    let mut peer = TcpStream::connect(world.address).await.expect("connects");
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend_from_slice(&frame(4, 0, 0, &[]));
    peer.write_all(&bytes).await.expect("written");
    peer
}

#[tokio::test]
async fn a_peer_that_gives_no_sign_of_life_is_cut_off_and_told_how_many_streams_it_may_open() {
    let world = World::with(
        "[server]\nkeepalive_interval_ms = 100\nkeepalive_timeout_ms = 100\nmax_concurrent_streams = 7\n",
    )
    .await;
    let mut peer = by_hand(&world).await;
    let mut all = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, peer.read_to_end(&mut all)).await;
    let _ = ended.expect("cut off in time");
    let frames = frames(&all);
    // PING (6), to which it gave no answer.
    assert!(frames.iter().any(|(kind, _)| *kind == 6), "{frames:?}");
    // SETTINGS (4) with MAX_CONCURRENT_STREAMS (3).
    let settings = frames.iter().find(|(kind, _)| *kind == 4);
    let (_, settings) = settings.expect("settings");
    let told = settings.chunks(6).any(|one| one == [0, 3, 0, 0, 0, 7]);
    assert!(told, "{settings:?}");
    world.stop().await;
}

#[tokio::test]
async fn headers_beyond_their_bound_are_refused() {
    let world = World::start().await;
    let mut request = tonic::Request::new(ListIntegrationsRequest::default());
    let long = "x".repeat(20_000).parse().expect("ASCII");
    request.metadata_mut().insert("x-long", long);
    let refused = world.integrations().list_integrations(request).await;
    refused.expect_err("refused");
    world
        .integrations()
        .list_integrations(ListIntegrationsRequest::default())
        .await
        .expect("the next call works");
    world.stop().await;
}

#[tokio::test]
async fn a_client_that_opens_and_resets_streams_all_the_time_is_cut_off() {
    let world = World::start().await;
    let mut peer = by_hand(&world).await;
    let mut bytes = Vec::new();
    // :method POST, :scheme http, :path and :authority as literals (RFC 7541).
    let mut headers = vec![0x83, 0x86, 0x04, 1, b'/', 0x01, 1, b'a'];
    headers.extend_from_slice(&[0x0f, 0x10, 16]);
    headers.extend_from_slice(b"application/grpc");
    for stream in (1..20_001_u32).step_by(2) {
        bytes.extend_from_slice(&frame(1, 4, stream, &headers));
        bytes.extend_from_slice(&frame(3, 0, stream, &8_u32.to_be_bytes()));
    }
    // The server may close while this is written.
    let _ = peer.write_all(&bytes).await;
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, peer.read_to_end(&mut answer)).await;
    let _ = ended.expect("cut off in time");
    assert!(
        goes_away(&answer, ENHANCE_YOUR_CALM),
        "no GOAWAY with ENHANCE_YOUR_CALM"
    );
    works(&world).await;
    world.stop().await;
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The kinds and payloads of whole frames.
fn frames(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let mut frames = Vec::new();
    while bytes.len() >= 9 {
        let length =
            usize::from(bytes[0]) << 16 | usize::from(bytes[1]) << 8 | usize::from(bytes[2]);
        let Some(payload) = bytes.get(9..9 + length) else {
            break;
        };
        frames.push((bytes[3], payload));
        bytes = &bytes[9 + length..];
    }
    frames
}

const NO_ERROR: u32 = 0;
const ENHANCE_YOUR_CALM: u32 = 11;

/// Whether one of the frames is a GOAWAY (7) for this reason.
fn goes_away(bytes: &[u8], reason: u32) -> bool {
    let reason = reason.to_be_bytes();
    frames(bytes)
        .iter()
        .any(|(kind, payload)| *kind == 7 && payload.get(4..8) == Some(&reason[..]))
}
