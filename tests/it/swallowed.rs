//! Connections to Segment over HTTP/2 on which requests get lost.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use segment_relay::proto::{
    Capture, CaptureBatchRequest, DeliveryAttempt, DeliveryReason, DeliveryState,
    GetCaptureResponse,
};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    sync::Notify,
};
use tokio_rustls::server::TlsStream;

use crate::{
    certificates::{Authority, Files},
    harness::{PATIENCE, World, acme, numbered, states},
    tls::acceptor,
};

/// What becomes of requests on the connections of the beginning.
#[derive(Clone, Copy, Debug)]
enum Loss {
    /// They are read and not answered. The connection answers pings.
    Swallowed,
    /// The same, and the connection does not answer pings either.
    Silent,
    /// They are answered 421.
    Misdirected,
}

/// An endpoint with connections on which requests get lost for as long as they live, and
/// good ones later.
struct Endpoint {
    loss: Loss,
    /// Whether connections are good from now on.
    good: AtomicBool,
    connections: AtomicUsize,
    lost: AtomicUsize,
    came: Notify,
}

impl Endpoint {
    /// Notes that a request was lost, or bytes of one.
    fn lose(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
        self.came.notify_one();
    }

    async fn serve(self: Arc<Self>, mut tls: TlsStream<TcpStream>) {
        self.connections.fetch_add(1, Ordering::Relaxed);
        let good = self.good.load(Ordering::Relaxed);
        if !good && matches!(self.loss, Loss::Silent) {
            let mut read = [0; 4_096];
            while tls.read(&mut read).await.is_ok_and(|bytes| bytes > 0) {
                self.lose();
            }
            return;
        }
        let service = service_fn(|request: Request<Incoming>| {
            let endpoint = Arc::clone(&self);
            async move { endpoint.answer(request, good).await }
        });
        let _ = http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(tls), service)
            .await;
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        good: bool,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let _ = request.into_body().collect().await;
        if good {
            return Ok(Response::new(r#"{"success":true}"#.into()));
        }
        self.lose();
        if matches!(self.loss, Loss::Swallowed) {
            std::future::pending::<()>().await;
        }
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = StatusCode::MISDIRECTED_REQUEST;
        Ok(answer)
    }
}

/// A relay whose endpoint is such a one.
async fn world(loss: Loss, files: &Files) -> (World, Arc<Endpoint>) {
    let endpoint = Arc::new(Endpoint {
        loss,
        good: AtomicBool::new(false),
        connections: AtomicUsize::new(0),
        lost: AtomicUsize::new(0),
        came: Notify::new(),
    });
    let ca = Authority::new();
    let ca_file = files.put("segment-ca.pem", &ca.pem());
    let acceptor = acceptor(&ca.issue(&["localhost"]), &[b"h2"]);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let accepting = Arc::clone(&endpoint);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (endpoint, acceptor) = (Arc::clone(&accepting), acceptor.clone());
            tokio::spawn(async move {
                if let Ok(tls) = acceptor.accept(tcp).await {
                    endpoint.serve(tls).await;
                }
            });
        }
    });
    // Long enough for a good connection on a busy machine.
    let settings = format!(
        "[segment]\nrequest_timeout_ms = 2000\nca_file = \"{}\"\n",
        ca_file.display()
    );
    let url = format!("https://localhost:{port}/v1/batch");
    let world = World::with_front(&settings, async |_| url).await;
    world.create(acme()).await;
    (world, endpoint)
}

/// What became of captures of all lanes whose first requests are lost.
async fn delivered(loss: Loss) -> (Vec<GetCaptureResponse>, usize) {
    let files = Files::new();
    let (world, endpoint) = world(loss, &files).await;
    let captures: Vec<Capture> = (0..20).map(numbered).collect();
    let request = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: captures.clone(),
        ..CaptureBatchRequest::default()
    };
    let accepted = world.relay().capture_batch(request).await;
    accepted.expect("accepted");
    let lost = async {
        while endpoint.lost.load(Ordering::Relaxed) == 0 {
            endpoint.came.notified().await;
        }
    };
    let lost = tokio::time::timeout(PATIENCE, lost).await;
    lost.expect("a request is lost");
    endpoint.good.store(true, Ordering::Relaxed);
    let mut found = Vec::new();
    for capture in captures {
        let result = world.settled(capture).await;
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
        found.push(world.status(&result.capture_id).await.expect("found"));
    }
    world.stop().await;
    (found, endpoint.connections.load(Ordering::Relaxed))
}

/// Each event was lost with one request at the most: the next one went over a new connection.
/// Returns the attempts that were lost.
fn lost_once(found: Vec<GetCaptureResponse>) -> Vec<DeliveryAttempt> {
    let mut lost = Vec::new();
    for capture in found {
        for event in capture.result.expect("a result").events {
            assert!(event.attempt_count <= 2, "{event:?}");
        }
        let attempts = capture.attempts.into_iter();
        lost.extend(attempts.filter(|one| one.http_status != 200));
    }
    assert!(!lost.is_empty(), "nothing was lost");
    lost
}

fn seconds(attempt: &DeliveryAttempt) -> f64 {
    let latency = attempt.latency.expect("a latency");
    Duration::try_from(latency).expect("positive").as_secs_f64()
}

#[tokio::test]
async fn a_connection_that_swallows_requests_is_given_up_at_the_first_time_out() {
    let (found, connections) = delivered(Loss::Swallowed).await;
    for lost in lost_once(found) {
        assert_eq!(lost.reason(), DeliveryReason::Timeout);
    }
    // A lane each opens one at the most, before it knows that they can share it.
    assert!(connections <= 8, "{connections}");
}

#[tokio::test]
async fn a_silent_connection_is_given_up_before_the_time_out() {
    let (found, connections) = delivered(Loss::Silent).await;
    // A ping goes unanswered after half of the time-out.
    let lost = lost_once(found);
    let soonest = lost.iter().map(seconds).fold(f64::MAX, f64::min);
    assert!(soonest < 1.9, "{soonest} s");
    assert!(connections <= 8, "{connections}");
}

#[tokio::test]
async fn a_misdirected_request_goes_over_a_new_connection_and_costs_no_event() {
    let (found, connections) = delivered(Loss::Misdirected).await;
    for lost in lost_once(found) {
        assert_eq!(lost.http_status, 421);
    }
    assert!(connections <= 8, "{connections}");
}
