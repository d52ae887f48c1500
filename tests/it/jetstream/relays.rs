//! Relays as processes, each with doors of its own to the servers, and an endpoint that
//! watches whether two requests of one lane are ever under way at once.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::{nats_server::Server, process::Process};

/// Longest request to the endpoint.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// A relay's lanes are its own for so long after its last word, as docs/scaling.md has it.
pub(crate) const LEASE: Duration = Duration::from_secs(REQUEST_TIMEOUT.as_secs() + 3);
/// How long the endpoint takes.
const LATENCY: Duration = Duration::from_millis(15);
/// What an event holds that the endpoint refuses for good.
pub(crate) const POISON: &str = "poisoned";

/// A door to one server that can be shut.
pub(crate) struct Door {
    pub(crate) url: String,
    shut: watch::Sender<bool>,
}

impl Door {
    pub(crate) async fn before(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("nats://{}", listener.local_addr().expect("bound"));
        let (shut, is_shut) = watch::channel(false);
        let port = server.port;
        tokio::spawn(async move {
            while let Ok((mut outer, _)) = listener.accept().await {
                let mut is_shut = is_shut.clone();
                tokio::spawn(async move {
                    if *is_shut.borrow() {
                        return;
                    }
                    let Ok(mut inner) = TcpStream::connect(("127.0.0.1", port)).await else {
                        return;
                    };
                    tokio::select! {
                        _ = copy_bidirectional(&mut outer, &mut inner) => {}
                        _ = is_shut.wait_for(|shut| *shut) => {}
                    }
                });
            }
        });
        Self { url, shut }
    }

    pub(crate) fn shut(&self, shut: bool) {
        self.shut.send_replace(shut);
    }
}

/// A relay behind its doors.
pub(crate) struct Relay {
    pub(crate) process: Process,
    pub(crate) doors: Vec<Door>,
}

impl Relay {
    pub(crate) async fn start(
        servers: &[Server],
        directory: &Path,
        endpoint: &str,
        replicas: usize,
    ) -> Self {
        let mut doors = Vec::new();
        for server in servers {
            doors.push(Door::before(server).await);
        }
        let urls: Vec<&str> = doors.iter().map(|door| door.url.as_str()).collect();
        let process = process(&urls.join(","), directory, endpoint, replicas).await;
        Self { process, doors }
    }

    pub(crate) fn cut_off(&self, cut_off: bool) {
        for door in &self.doors {
            door.shut(cut_off);
        }
    }

    /// Sends it a signal: STOP or CONT.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.process.child.id().to_string();
        let sent = std::process::Command::new("kill")
            .args([&format!("-{signal}"), &pid])
            .status();
        assert!(sent.expect("kill runs").success());
    }
}

/// A relay on the shared outbox.
pub(crate) async fn process(
    servers: &str,
    directory: &Path,
    endpoint: &str,
    replicas: usize,
) -> Process {
    process_with(servers, directory, endpoint, replicas, &[]).await
}

/// The same with more variables in its environment.
pub(crate) async fn process_with(
    servers: &str,
    directory: &Path,
    endpoint: &str,
    replicas: usize,
    more: &[(&str, &Path)],
) -> Process {
    let timeout = REQUEST_TIMEOUT.as_millis().to_string();
    let replicas = replicas.to_string();
    let mut settings = vec![
        ("SEGMENT_RELAY__OUTBOX__KIND", Path::new("jetstream")),
        ("SEGMENT_RELAY__NATS__SERVERS", Path::new(servers)),
        ("SEGMENT_RELAY__NATS__REPLICAS", Path::new(&replicas)),
        (
            "SEGMENT_RELAY__SEGMENT__REQUEST_TIMEOUT_MS",
            Path::new(&timeout),
        ),
    ];
    settings.extend(more);
    let urls = [endpoint.to_owned(), endpoint.to_owned()];
    Process::start_with(&directory.join("outbox"), &urls, &settings).await
}

/// The endpoint in Segment's place.
#[derive(Default)]
pub(crate) struct Watched {
    under_way: Mutex<HashMap<Lane, usize>>,
    /// Requests of one lane that were under way at once.
    pub(crate) collisions: AtomicU64,
    /// Message ids in the order of their first arrival, with how often they came.
    arrived: Mutex<(HashMap<String, usize>, HashMap<String, u64>)>,
    /// Whether it answers 503.
    pub(crate) is_down: AtomicBool,
}

type Lane = (String, u8);

/// A request under way, also if its caller goes away.
struct UnderWay<'a> {
    watched: &'a Watched,
    lanes: HashSet<Lane>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut under_way = self.watched.under_way.lock().expect("sound");
        for lane in &self.lanes {
            *under_way.get_mut(lane).expect("counted") -= 1;
        }
    }
}

impl Watched {
    /// Listens; returns the URL.
    pub(crate) async fn listen(self: &Arc<Self>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/v1/batch", listener.local_addr().expect("bound"));
        let watched = Arc::clone(self);
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let watched = Arc::clone(&watched);
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let watched = Arc::clone(&watched);
                        async move { watched.answer(request).await }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(connection), service)
                        .await;
                });
            }
        });
        url
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Full<hyper::body::Bytes>>, hyper::Error> {
        let key = format!("{:?}", request.headers().get("authorization"));
        let body = request.into_body().collect().await?.to_bytes();
        let batch: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        let events = batch["batch"].as_array().expect("a batch");
        let shard = |event: &serde_json::Value| {
            let user = event["userId"].as_str().expect("a user");
            u8::from_str_radix(&user[..2], 16).expect("hex") % 4
        };
        let lanes: HashSet<Lane> = events.iter().map(|one| (key.clone(), shard(one))).collect();
        let under_way = self.enter(lanes);
        tokio::time::sleep(LATENCY).await;
        let status = if self.is_down.load(Ordering::Relaxed) {
            503
        } else if body
            .windows(POISON.len())
            .any(|part| part == POISON.as_bytes())
        {
            400
        } else {
            let mut arrived = self.arrived.lock().expect("sound");
            for event in events {
                let id = event["messageId"].as_str().expect("an id").to_owned();
                let next = arrived.0.len();
                arrived.0.entry(id.clone()).or_insert(next);
                *arrived.1.entry(id).or_default() += 1;
            }
            200
        };
        drop(under_way);
        let answer = Response::builder().status(status);
        Ok(answer.body(Full::default()).expect("an answer"))
    }

    fn enter(&self, lanes: HashSet<Lane>) -> UnderWay<'_> {
        let mut under_way = self.under_way.lock().expect("sound");
        for lane in &lanes {
            let count = under_way.entry(lane.clone()).or_default();
            *count += 1;
            if *count > 1 {
                self.collisions.fetch_add(1, Ordering::Relaxed);
            }
        }
        UnderWay {
            watched: self,
            lanes,
        }
    }

    /// The place of each message id in the order of first arrivals.
    pub(crate) fn places(&self) -> HashMap<String, usize> {
        self.arrived.lock().expect("sound").0.clone()
    }

    /// Events that came more than once.
    pub(crate) fn repeated(&self) -> usize {
        let arrived = self.arrived.lock().expect("sound");
        arrived.1.values().filter(|count| **count > 1).count()
    }

    pub(crate) fn count(&self) -> usize {
        self.arrived.lock().expect("sound").0.len()
    }
}
