//! Many captures through relays that share PostgreSQL: whether the rate falls as tables grow,
//! how long calls take, what the tables weigh, and what relays and servers cost without work.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use segment_relay::proto::{CaptureRequest, segment_relay_client::SegmentRelayClient};
use tokio_postgres::NoTls;
use tonic::transport::Channel;

use crate::{Fleet, capture, cpu, relay_ids, send, server_ids};

/// Captures of one line of the table.
const STEP: usize = 1_000_000;
/// Least time between two unary calls of the probe.
const PROBE_INTERVAL: Duration = Duration::from_millis(10);
/// How long costs without work are measured.
const IDLE: Duration = Duration::from_secs(30);

type Times = Arc<Mutex<Vec<Duration>>>;

/// Unary calls one after another, until it is dropped.
fn probe(channel: Channel, name: &'static str) -> (Times, tokio::task::JoinHandle<()>) {
    let times = Times::default();
    let kept = Arc::clone(&times);
    let task = tokio::spawn(async move {
        let mut client = SegmentRelayClient::new(channel);
        for number in 0.. {
            let mut one = capture(number);
            one.capture_id = format!("{name}-{number}");
            let request = CaptureRequest {
                integration_id: "bench-0".into(),
                capture: Some(one),
                ..CaptureRequest::default()
            };
            let begun = Instant::now();
            client.capture(request).await.unwrap();
            let took = begun.elapsed();
            kept.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(took);
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
    });
    (times, task)
}

/// The median and the 99th percentile in milliseconds, of the times since the last call.
fn percentiles(times: &Times) -> (f64, f64) {
    let mut times = std::mem::take(&mut *times.lock().unwrap_or_else(PoisonError::into_inner));
    times.sort_unstable();
    let at = |share: f64| {
        let place = (times.len() as f64 * share) as usize;
        times
            .get(place)
            .map_or(f64::NAN, |it| it.as_secs_f64() * 1e3)
    };
    (at(0.5), at(0.99))
}

/// Sends `captures`, and prints a line for each million.
pub(crate) async fn run(fleet: &Fleet<'_>, captures: usize) {
    let connected = tokio_postgres::connect(&fleet.servers[0].url(), NoTls).await;
    let (primary, connection) = connected.unwrap();
    tokio::spawn(connection);
    let number = async |sql: &str| -> i64 { primary.query_one(sql, &[]).await.unwrap().get(0) };
    println!("captures    accepted/s  unary p50 ms  p99 ms  captures MB  queue MB  dead rows");
    let (times, task) = probe(fleet.channels[0].clone(), "probe");
    for first in (0..captures).step_by(STEP) {
        let count = STEP.min(captures - first);
        let begun = Instant::now();
        send(&fleet.channels, first..first + count).await;
        let rate = count as f64 / begun.elapsed().as_secs_f64();
        let (median, worst) = percentiles(&times);
        let megabytes = async |table: &str| {
            number(&format!(
                "SELECT pg_total_relation_size('{table}') / 1000000"
            ))
            .await
        };
        const DEAD: &str = "SELECT sum(n_dead_tup)::int8 FROM pg_stat_user_tables \
                            WHERE relname IN ('queue', 'lanes', 'backlog')";
        println!(
            "{:>9} {rate:>13.0} {median:>13.1} {worst:>7.1} {:>12} {:>9} {:>10}",
            first + count,
            megabytes("captures").await,
            megabytes("queue").await,
            number(DEAD).await,
        );
    }
    fleet.is_delivered(captures).await;
    task.abort();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (times, task) = probe(fleet.channels[0].clone(), "alone");
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (median, worst) = percentiles(&times);
    task.abort();
    println!("unary calls alone: p50 {median:.1} ms, p99 {worst:.1} ms");
    tokio::time::sleep(Duration::from_secs(5)).await;
    let relays = || cpu(relay_ids(&fleet.processes));
    let servers = || cpu(server_ids(fleet.servers));
    let before = (relays(), servers());
    tokio::time::sleep(IDLE).await;
    let share = |after: f64, before: f64| (after - before) / IDLE.as_secs_f64() * 100.0;
    println!(
        "without work: relays {:.2} %, servers {:.2} % of a core",
        share(relays(), before.0),
        share(servers(), before.1)
    );
}
