//! An HTTP server that keeps what it gets: for webhooks, and for key sets.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{net::TcpListener, sync::Notify};

use crate::harness::PATIENCE;

/// A request as it came.
#[derive(Clone)]
pub(crate) struct Received {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

#[derive(Default)]
struct State {
    received: Mutex<Vec<Received>>,
    /// Statuses of the next answers; then 200.
    statuses: Mutex<VecDeque<u16>>,
    body: Mutex<String>,
    location: Mutex<Option<String>>,
    endless: AtomicBool,
    /// Requests with more events than this get no answer.
    most_events: AtomicUsize,
    came: Notify,
}

pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

impl Receiver {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(State {
            most_events: AtomicUsize::new(usize::MAX),
            ..State::default()
        });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                tokio::spawn(async move {
                    let service = service_fn(|request| answer(Arc::clone(&state), request));
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(tcp), service)
                        .await;
                });
            }
        });
        Self { address, state }
    }

    /// What it answers from now on.
    pub(crate) fn answer(&self, body: &str) {
        body.clone_into(&mut self.state.body.lock().expect("sound"));
    }

    /// Answers without end from now on.
    pub(crate) fn answer_without_end(&self) {
        self.state.endless.store(true, Ordering::Relaxed);
    }

    /// Answers requests with more events than this no more.
    pub(crate) fn answer_up_to(&self, events: usize) {
        self.state.most_events.store(events, Ordering::Relaxed);
    }

    /// Answers 307 with this location from now on.
    pub(crate) fn redirect_to(&self, location: String) {
        *self.state.location.lock().expect("sound") = Some(location);
    }

    /// The statuses of the next answers.
    pub(crate) fn fail_with(&self, statuses: &[u16]) {
        self.state.statuses.lock().expect("sound").extend(statuses);
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.state.received.lock().expect("sound").clone()
    }

    /// Waits for so many requests.
    pub(crate) async fn wait_for(&self, requests: usize) -> Vec<Received> {
        let enough = async {
            loop {
                let came = self.state.came.notified();
                let received = self.received();
                if received.len() >= requests {
                    return received;
                }
                came.await;
            }
        };
        tokio::time::timeout(PATIENCE, enough)
            .await
            .expect("they come")
    }
}

/// Events of a request to `/v1/batch`; none of any other.
pub(crate) fn events_in(body: &[u8]) -> usize {
    let batch = serde_json::from_slice::<serde_json::Value>(body).ok();
    let batch = batch.as_ref().and_then(|body| body.get("batch"));
    batch
        .and_then(|events| events.as_array())
        .map_or(0, Vec::len)
}

type Answer = BoxBody<Bytes, Infallible>;

async fn answer(
    state: Arc<State>,
    request: Request<Incoming>,
) -> Result<Response<Answer>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.expect("a whole body").to_bytes();
    let events = events_in(&body);
    let (path, headers) = (head.uri.path().to_owned(), head.headers);
    state.received.lock().expect("sound").push(Received {
        path,
        headers,
        body,
    });
    state.came.notify_waiters();
    if events > state.most_events.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
    let status = state
        .statuses
        .lock()
        .expect("sound")
        .pop_front()
        .unwrap_or(200);
    let body = if state.endless.load(Ordering::Relaxed) {
        let chunk = Bytes::from_static(&[b' '; 4_096]);
        let frames = futures_util::stream::repeat(chunk);
        let frames = futures_util::StreamExt::map(frames, |chunk| Ok(Frame::data(chunk)));
        StreamBody::new(frames).boxed()
    } else {
        Full::from(state.body.lock().expect("sound").clone()).boxed()
    };
    let mut answer = Response::new(body);
    *answer.status_mut() = StatusCode::from_u16(status).expect("a status");
    if let Some(location) = &*state.location.lock().expect("sound") {
        *answer.status_mut() = StatusCode::TEMPORARY_REDIRECT;
        let location = location.parse().expect("a location");
        answer
            .headers_mut()
            .insert(http::header::LOCATION, location);
    }
    Ok(answer)
}
