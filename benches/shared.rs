//! How many captures relays take and deliver over a shared outbox, beside one with the embedded
//! outbox: real processes on loopback that share the machine with the load and the endpoint.
//!
//! `cargo bench --bench shared -- 100000` sends 100,000 captures in each setting, in batches of
//! 100; words after it choose settings by their names. It needs PostgreSQL as the tests do.
//! `cargo bench --bench shared -- 10000000 soak` sends ten million through three relays and
//! prints a line for each million.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a measurement stops at the first thing that is not as it should be"
)]

#[allow(dead_code, reason = "shared with the tests")]
#[path = "../tests/it/postgres_server.rs"]
mod postgres_server;
mod shared_soak;

use std::{
    io::{BufRead, BufReader},
    ops::Range,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use postgres_server::OwnServer;
use segment_relay::proto::{
    Capture, CaptureBatchRequest, CreateIntegrationRequest, Credential, DataRegion, Integration,
    UnmappedAttributes, integration_service_client::IntegrationServiceClient,
    segment_relay_client::SegmentRelayClient,
};
use tokio::net::TcpListener;
use tonic::transport::Channel;

const BATCH: usize = 100;
/// Calls under way, over all relays.
const CALLS: usize = 16;
const INTEGRATIONS: usize = 4;
const TIMEOUT: Duration = Duration::from_secs(300);

struct Relay(Child);

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn endpoint(arrived: Arc<AtomicU64>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/batch", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let arrived = Arc::clone(&arrived);
            tokio::spawn(async move {
                let service = service_fn(move |request: Request<Incoming>| {
                    let arrived = Arc::clone(&arrived);
                    async move {
                        let body = request.into_body().collect().await?.to_bytes();
                        let events = body
                            .windows(12)
                            .filter(|part| *part == b"\"messageId\":")
                            .count();
                        arrived.fetch_add(events as u64, Ordering::Relaxed);
                        Ok::<_, hyper::Error>(Response::new(Full::<hyper::body::Bytes>::default()))
                    }
                });
                let http = hyper::server::conn::http1::Builder::new();
                let _ = http
                    .serve_connection(TokioIo::new(connection), service)
                    .await;
            });
        }
    });
    url
}

async fn start(directory: &Path, endpoint: &str, servers: &[OwnServer]) -> (Relay, Channel) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
    command
        .arg("serve")
        .env("SEGMENT_RELAY__SERVER__LISTEN", "127.0.0.1:0")
        .env("SEGMENT_RELAY__OUTBOX__PATH", directory.join("outbox"))
        .env("SEGMENT_RELAY__SECRETS__KEY_FILE", directory.join("key"))
        .env("SEGMENT_RELAY__SEGMENT__ENDPOINTS__NON_EU", endpoint)
        .env("SEGMENT_RELAY__SEGMENT__ENDPOINTS__EU", endpoint)
        .env("SEGMENT_RELAY__DELIVERY__MAX_EVENTS_PER_SECOND", "10000000")
        .env("SEGMENT_RELAY__DELIVERY__BURST_EVENTS", "10000000")
        .env(
            "SEGMENT_RELAY__LIMITS__CALLER_CAPTURES_PER_SECOND",
            "10000000",
        )
        .env("SEGMENT_RELAY__LIMITS__CALLER_BURST_CAPTURES", "10000000")
        .env(
            "SEGMENT_RELAY__LIMITS__INTEGRATION_CAPTURES_PER_SECOND",
            "10000000",
        )
        .env(
            "SEGMENT_RELAY__LIMITS__INTEGRATION_BURST_CAPTURES",
            "10000000",
        )
        .env("SEGMENT_RELAY__LOG__FILTER", "error")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if let Some(primary) = servers.first() {
        command
            .env("SEGMENT_RELAY__OUTBOX__KIND", "postgres")
            .env("SEGMENT_RELAY__POSTGRES__URLS", primary.url());
    }
    let mut child = command.spawn().unwrap();
    let out = child.stdout.take().unwrap();
    let line = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).unwrap();
        line
    });
    let line = line.await.unwrap();
    let address = line.trim().rsplit(' ').next().unwrap().to_owned();
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    (Relay(child), channel.connect().await.unwrap())
}

fn integration(number: usize) -> Integration {
    Integration {
        integration_id: format!("bench-{number}"),
        credentials: vec![Credential {
            data_region: DataRegion::NonEu.into(),
            write_key: "write-key-of-a-benchmark".into(),
            ..Credential::default()
        }],
        unmapped_attributes: UnmappedAttributes::Forward.into(),
        ..Integration::default()
    }
}

fn capture(number: usize) -> Capture {
    Capture {
        capture_id: format!("capture-{number}"),
        email: format!("person-{number}@example.com"),
        campaign_id: "n3zrik6g".into(),
        campaign_name: "New Quiz".into(),
        session_id: format!("session-{number}"),
        traffic_source: "Owned+Web".into(),
        ..Capture::default()
    }
}

fn relay_ids(relays: &[Relay]) -> impl Iterator<Item = u32> {
    relays.iter().map(|relay| relay.0.id())
}

fn server_ids(servers: &[OwnServer]) -> impl Iterator<Item = u32> {
    let processes = servers.iter().flat_map(OwnServer::processes);
    processes.filter_map(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok())
}

/// CPU seconds of processes so far, by the clock ticks of `/proc`: 100 a second on Linux.
fn cpu(processes: impl Iterator<Item = u32>) -> f64 {
    let ticks = |id: u32| -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let fields: Vec<f64> = fields
            .split_whitespace()
            .skip(11)
            // Its own, and that of its children that have ended.
            .take(4)
            .map(|one| one.parse().unwrap())
            .collect();
        fields.iter().sum()
    };
    processes.map(ticks).sum::<f64>() / 100.0
}

/// A primary, with a synchronous standby or without, and the schema.
async fn postgres(standby: bool, directory: &Path) -> Vec<OwnServer> {
    const SETTINGS: [(&str, &str); 2] = [("shared_buffers", "1GB"), ("max_wal_size", "4GB")];
    let primary = postgres_server::Server::start_own(&SETTINGS).unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_segment-relay"))
        .args(["outbox", "init"])
        .env("SEGMENT_RELAY__POSTGRES__URLS", primary.url())
        .env("SEGMENT_RELAY__SECRETS__KEY_FILE", directory.join("key"))
        .stdout(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    let mut servers = vec![primary];
    if standby {
        servers.push(servers[0].standby(&SETTINGS));
        servers[0].require_standby();
    }
    servers
}

async fn send(channels: &[Channel], captures: Range<usize>) {
    let next = Arc::new(AtomicUsize::new(captures.start));
    let tasks: Vec<_> = (0..CALLS)
        .map(|call| {
            let mut client = SegmentRelayClient::new(channels[call % channels.len()].clone());
            let (next, end) = (Arc::clone(&next), captures.end);
            tokio::spawn(async move {
                loop {
                    let first = next.fetch_add(BATCH, Ordering::Relaxed);
                    if first >= end {
                        return;
                    }
                    let request = CaptureBatchRequest {
                        integration_id: format!("bench-{}", first / BATCH % INTEGRATIONS),
                        captures: (first..first + BATCH).map(capture).collect(),
                        ..CaptureBatchRequest::default()
                    };
                    let answer = client.capture_batch(request).await.unwrap().into_inner();
                    let refused = answer.results.iter().find(|one| one.error.is_some());
                    assert!(refused.is_none(), "{refused:?}");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// Relays over a primary and its standby, or over the embedded outbox without any.
struct Fleet<'a> {
    processes: Vec<Relay>,
    channels: Vec<Channel>,
    servers: &'a [OwnServer],
    arrived: Arc<AtomicU64>,
}

impl<'a> Fleet<'a> {
    async fn start(directory: &Path, servers: &'a [OwnServer], relays: usize) -> Self {
        let arrived = Arc::new(AtomicU64::new(0));
        let url = endpoint(Arc::clone(&arrived)).await;
        let (mut processes, mut channels) = (Vec::new(), Vec::new());
        for _ in 0..relays {
            let (process, channel) = start(directory, &url, servers).await;
            processes.push(process);
            channels.push(channel);
        }
        for number in 0..INTEGRATIONS {
            let request = CreateIntegrationRequest {
                integration: Some(integration(number)),
            };
            let mut client = IntegrationServiceClient::new(channels[0].clone());
            client.create_integration(request).await.unwrap();
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        Self {
            processes,
            channels,
            servers,
            arrived,
        }
    }

    async fn is_delivered(&self, captures: usize) {
        let begun = Instant::now();
        while self.arrived.load(Ordering::Relaxed) < 2 * captures as u64 {
            assert!(begun.elapsed() < TIMEOUT, "not delivered in time");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn measure(name: &str, captures: usize, fleet: &Fleet<'_>) {
    let servers = fleet.servers;
    let processes = &fleet.processes;
    let before = (cpu(relay_ids(processes)), cpu(server_ids(servers)));
    let begun = Instant::now();
    send(&fleet.channels, 0..captures).await;
    let accepted = begun.elapsed();
    fleet.is_delivered(captures).await;
    let delivered = begun.elapsed();
    let rate = |time: Duration| captures as f64 / time.as_secs_f64();
    // What settles the last captures is part of their cost.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let each = |after: f64, before: f64| (after - before) * 1e6 / captures as f64;
    println!(
        "{name:<34} {:>7.0} accepted/s {:>7.0} delivered/s, CPU a capture: relays {:>5.1} µs, servers {:>5.1} µs",
        rate(accepted),
        rate(delivered),
        each(cpu(relay_ids(processes)), before.0),
        each(cpu(server_ids(servers)), before.1),
    );
}

#[tokio::main]
async fn main() {
    let captures = std::env::args().skip(1).find_map(|one| one.parse().ok());
    let captures = captures.unwrap_or(100_000);
    // Words choose the settings whose names have one of them.
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|one| !one.starts_with('-') && one.parse::<u64>().is_err())
        .collect();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word));
    let embedded = "embedded, one relay";
    if wanted(embedded) {
        let directory = tempfile::tempdir().unwrap();
        let fleet = Fleet::start(directory.path(), &[], 1).await;
        measure(embedded, captures, &fleet).await;
    }
    if words.iter().any(|word| word == "soak") {
        let directory = tempfile::tempdir().unwrap();
        let servers = postgres(true, directory.path()).await;
        let fleet = Fleet::start(directory.path(), &servers, 3).await;
        shared_soak::run(&fleet, captures).await;
    }
    if postgres_server::database().is_some() {
        for (standby, word) in [
            (false, "PostgreSQL"),
            (true, "PostgreSQL, synchronous standby"),
        ] {
            for relays in [1, 3] {
                let name = format!("{word}, {relays} relays");
                if wanted(&name) {
                    let directory = tempfile::tempdir().unwrap();
                    let servers = postgres(standby, directory.path()).await;
                    let fleet = Fleet::start(directory.path(), &servers, relays).await;
                    measure(&name, captures, &fleet).await;
                }
            }
        }
    }
}
