//! The listeners, and the endpoints beside `/v1/batch`.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use ::http::header::{ACCEPT, HeaderMap};
use ::http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::answer::{AnswerBody, json, problem, text, wrong_method};
use super::batch;
use super::fault::parse_rules;
use super::query::Filter;
use super::render::entry_text;
use super::{Region, Sandbox};

/// How long requests in flight may take to end at shutdown.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);
/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Wait after a failed accept (no file descriptors left), so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Most streams at once in an HTTP/2 connection.
const MAX_STREAMS: u32 = 256;
/// Largest body of `PUT /control`, in bytes.
const MAX_CONTROL_BYTES: usize = 1_000_000;

const ABOUT: &str = "\
segment-relay's sandbox: an imitation of Segment's HTTP tracking API.

POST   /v1/batch  takes events as Segment does: 200 first, drops afterwards
GET    /debugger  the last entries, oldest first, as JSON, or with Accept: text/plain
                  as text; ?type= &userId= &messageId= &after=SEQ &limit=N &format=text|json
GET    /stats     counters
GET    /control   the rules of misbehaviour; PUT sets one rule or {\"rules\": [...]},
                  DELETE restores good behaviour
POST   /reset     forgets entries, counters, messageIds and rules
";

/// Serves the imitation on listeners, each for one region, until `shutdown`. Then
/// requests in flight have a second to end before all connections are closed.
pub async fn run(
    listeners: Vec<(Region, TcpListener)>,
    sandbox: Arc<Sandbox>,
    shutdown: CancellationToken,
) {
    let tasks = TaskTracker::new();
    for (region, listener) in listeners {
        let accepting = accept(
            region,
            listener,
            Arc::clone(&sandbox),
            shutdown.clone(),
            tasks.clone(),
        );
        tasks.spawn(accepting);
    }
    shutdown.cancelled().await;
    tasks.close();
    tasks.wait().await;
}

async fn accept(
    region: Region,
    listener: TcpListener,
    sandbox: Arc<Sandbox>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
) {
    let places = Arc::new(Semaphore::new(
        sandbox.max_connections.min(Semaphore::MAX_PERMITS),
    ));
    let next = async || {
        // Closed never; a place comes first, so that no connection waits accepted.
        let place = Arc::clone(&places).acquire_owned().await.ok()?;
        match listener.accept().await {
            Ok((stream, _peer)) => Some((stream, place)),
            Err(error) => {
                tracing::warn!(%error, region = region.as_str(), "sandbox: accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                None
            }
        }
    };
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = next() => accepted,
        };
        if let Some((stream, place)) = accepted {
            let serving = serve(
                region,
                stream,
                Arc::clone(&sandbox),
                shutdown.clone(),
                place,
            );
            tasks.spawn(serving);
        }
    }
}

/// Counts a connection as open for as long as it is.
struct Open<'a>(&'a Sandbox);

impl<'a> Open<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        sandbox.store.count(|stats| {
            stats.connections_opened += 1;
            stats.connections_open += 1;
        });
        Self(sandbox)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.store.count(|stats| {
            stats.connections_open = stats.connections_open.saturating_sub(1);
        });
    }
}

async fn serve(
    region: Region,
    stream: TcpStream,
    sandbox: Arc<Sandbox>,
    shutdown: CancellationToken,
    _place: OwnedSemaphorePermit,
) {
    let _open = Open::new(&sandbox);
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "sandbox: no TCP_NODELAY");
    }
    let close = CancellationToken::new();
    let service = service_fn(|request| {
        let (sandbox, close) = (Arc::clone(&sandbox), close.clone());
        async move { Ok::<_, Infallible>(route(region, request, &sandbox, &close).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let served = async {
        tokio::select! {
            result = connection.as_mut() => return result,
            () = shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        match tokio::time::timeout(SHUTDOWN_GRACE, connection).await {
            Ok(result) => result,
            Err(_elapsed) => Ok(()),
        }
    };
    tokio::select! {
        result = served => {
            if let Err(error) = result {
                tracing::debug!(%error, "sandbox: a connection ended badly");
            }
        }
        () = close.cancelled() => {}
    }
}

async fn route(
    region: Region,
    request: Request<Incoming>,
    sandbox: &Sandbox,
    close: &CancellationToken,
) -> Response<AnswerBody> {
    let (head, body) = request.into_parts();
    let is = |method: Method| head.method == method;
    let reads = is(Method::GET) || is(Method::HEAD);
    match head.uri.path() {
        "/v1/batch" if is(Method::POST) => {
            batch::handle(region, &head.headers, body, sandbox, close).await
        }
        "/v1/batch" => wrong_method("POST"),
        "/" if reads => text(ABOUT),
        "/debugger" if reads => debugger(head.uri.query().unwrap_or(""), &head.headers, sandbox),
        "/stats" if reads => json(&sandbox.stats()),
        "/" | "/debugger" | "/stats" => wrong_method("GET, HEAD"),
        "/reset" if is(Method::POST) => {
            sandbox.reset();
            json(&serde_json::json!({"success": true}))
        }
        "/reset" => wrong_method("POST"),
        "/control" if reads => control(sandbox),
        "/control" if is(Method::PUT) => set_control(body, sandbox).await,
        "/control" if is(Method::DELETE) => {
            sandbox.faults.clear();
            control(sandbox)
        }
        "/control" => wrong_method("GET, HEAD, PUT, DELETE"),
        _ => problem(
            StatusCode::NOT_FOUND,
            "there is nothing here; GET / says what is where",
        ),
    }
}

fn debugger(query: &str, headers: &HeaderMap, sandbox: &Sandbox) -> Response<AnswerBody> {
    let filter = match Filter::parse(query) {
        Ok(filter) => filter,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &error),
    };
    let entries = filter.apply(sandbox.entries());
    let accepts_text = || {
        let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
        accept.is_some_and(|accept| accept.contains("text/plain"))
    };
    if filter.as_text.unwrap_or_else(accepts_text) {
        text(entries.iter().map(entry_text).collect::<String>())
    } else {
        json(&entries)
    }
}

/// The rules, and how many times each has acted.
fn control(sandbox: &Sandbox) -> Response<AnswerBody> {
    let (rules, acted) = sandbox.faults.rules_and_acted();
    json(&serde_json::json!({"rules": rules, "acted": acted}))
}

async fn set_control(body: Incoming, sandbox: &Sandbox) -> Response<AnswerBody> {
    let body = match batch::read_body(body, MAX_CONTROL_BYTES).await {
        Ok(body) => body,
        Err(error) => return batch::unreadable(error),
    };
    match parse_rules(&body).and_then(|rules| sandbox.faults.set(rules)) {
        Ok(()) => control(sandbox),
        Err(error) => problem(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}
