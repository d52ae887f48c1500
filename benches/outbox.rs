//! Endurance of the outbox: submits, leases and settles captures as fast as it
//! goes, then looks at what an empty outbox costs.
//!
//! `cargo bench --bench outbox -- [captures] [captures in a call] [waiting at the most] [directory] [encrypted]`

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    missing_docs
)]

use std::{
    path::Path,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use segment_relay::{
    event::{EventPair, EventType},
    integration::IntegrationId,
    metrics::Metrics,
    outbox::{
        Content, EventSet, LaneKey, LeaseBudget, Limits, NewCapture, Outbox, SettledCapture,
        Settlement, SqliteOptions, SqliteOutbox,
    },
    region::Region,
    status::Outcome,
    time::UnixMillis,
    vault::Vault,
};

const PAYLOAD_BYTES: usize = 700;
const SHARD: u16 = 0;

fn capture(number: u64) -> NewCapture {
    let payload = || {
        let mut bytes = format!("{{\"n\":{number},\"filler\":\"").into_bytes();
        bytes.resize(PAYLOAD_BYTES - 2, b'x');
        bytes.extend_from_slice(b"\"}");
        bytes
    };
    // As spread as real ids are.
    let id = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    NewCapture {
        integration_id: IntegrationId::new("bench").unwrap(),
        capture_id: format!("{id:032x}"),
        digest: [7; 16],
        region: Region::NonEu,
        mapping_version: 1,
        revision: 0,
        accept_time: UnixMillis::now(),
        user_id: Some(format!("{id:064x}")),
        room: None,
        trace: None,
        content: Content::Send {
            shard: SHARD,
            events: EventPair {
                identify: payload(),
                track: payload(),
            },
        },
    }
}

fn lane() -> LaneKey {
    LaneKey {
        integration_id: IntegrationId::new("bench").unwrap(),
        region: Region::NonEu,
        shard: SHARD,
    }
}

async fn drain_once(outbox: &SqliteOutbox) -> usize {
    let budget = LeaseBudget {
        max_events: 2_500,
        max_bytes: 490_000,
    };
    let leased = outbox
        .lease(&lane(), budget, segment_relay::outbox::LeaseScope::All)
        .await
        .unwrap();
    let count = leased.len();
    if count == 0 {
        return 0;
    }
    let captures = leased
        .into_iter()
        .map(|leased| {
            let mut record = Arc::unwrap_or_clone(leased.record);
            for event in EventType::ALL {
                record
                    .event_mut(event)
                    .advance(Outcome::Delivered, UnixMillis::now());
            }
            SettledCapture {
                sequence: leased.sequence,
                record: Arc::new(record),
                changed: EventSet::BOTH,
            }
        })
        .collect();
    let settlement = Settlement {
        lane: lane(),
        captures,
    };
    outbox.settle(Arc::new(settlement)).await.unwrap();
    count
}

fn size_mib(directory: &Path) -> u64 {
    let files = std::fs::read_dir(directory).unwrap();
    files
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum::<u64>()
        / (1024 * 1024)
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap_or_default();
    let kib = line
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

fn open(directory: &Path) -> SqliteOutbox {
    let options = SqliteOptions {
        directory: directory.to_owned(),
        limits: Limits {
            max_events: u64::MAX / 2,
            max_bytes: u64::MAX / 2,
            max_integration_events: u64::MAX / 2,
            max_integration_bytes: u64::MAX / 2,
        },
        group_commit_max: 512,
        remember: Duration::from_secs(7 * 24 * 3_600),
        encrypt_payloads: std::env::args().any(|word| word == "encrypted"),
        metrics: Metrics::off(),
    };
    static VAULT: LazyLock<Arc<Vault>> = LazyLock::new(|| Arc::new(Vault::forgetful().unwrap()));
    SqliteOutbox::open(&options, &VAULT).unwrap()
}

async fn probe(outbox: &SqliteOutbox, number: u64) -> (Duration, Duration, Duration) {
    const TURNS: u32 = 200;
    let (mut submit, mut work, mut idle) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    for turn in 0..TURNS {
        let start = Instant::now();
        let new = vec![capture(number + u64::from(turn))];
        outbox.submit(new).await.unwrap().wait().await.unwrap();
        submit += start.elapsed();
        let start = Instant::now();
        assert_eq!(drain_once(outbox).await, 1);
        work += start.elapsed();
        let start = Instant::now();
        assert_eq!(drain_once(outbox).await, 0);
        idle += start.elapsed();
    }
    (submit / TURNS, work / TURNS, idle / TURNS)
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args()
        .filter(|arg| !arg.starts_with("--"))
        .collect();
    let number = |place: usize, default: u64| {
        arguments
            .get(place)
            .and_then(|arg| arg.parse().ok())
            .unwrap_or(default)
    };
    let (captures, in_a_call, backlog) = (number(1, 200_000), number(2, 64), number(3, 20_000));
    let temporary = tempfile::tempdir().unwrap();
    let directory = arguments.get(4).map_or(temporary.path(), Path::new);
    let outbox = Arc::new(open(directory));

    let (submit, work, idle) = probe(&outbox, u64::MAX / 2).await;
    println!("new outbox: submit {submit:?}, lease and settle {work:?}, lease of nothing {idle:?}");

    let start = Instant::now();
    let submitting = Arc::clone(&outbox);
    // A permit for each capture that may wait.
    let room = Arc::new(tokio::sync::Semaphore::new(
        usize::try_from(backlog).unwrap(),
    ));
    let rooms = Arc::clone(&room);
    let submitted = tokio::spawn(async move {
        let mut receipts = std::collections::VecDeque::new();
        let mut next = 0;
        while next < captures {
            let batch = (next..captures.min(next + in_a_call))
                .map(capture)
                .collect();
            next += in_a_call;
            rooms
                .acquire_many(u32::try_from(in_a_call).unwrap())
                .await
                .unwrap()
                .forget();
            receipts.push_back(submitting.submit(batch).await.unwrap());
            if receipts.len() > 16 {
                receipts.pop_front().unwrap().wait().await.unwrap();
            }
        }
        for receipt in receipts {
            receipt.wait().await.unwrap();
        }
    });
    let mut drained = 0;
    let (mut told, mut maintained) = (Instant::now(), Instant::now());
    while drained < captures {
        match drain_once(&outbox).await {
            0 => tokio::task::yield_now().await,
            count => {
                drained += count as u64;
                room.add_permits(count);
            }
        }
        if maintained.elapsed() > Duration::from_millis(200) {
            maintained = Instant::now();
            outbox.maintain().await.unwrap();
        }
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            let rate = drained as f64 / start.elapsed().as_secs_f64();
            println!(
                "{drained} drained, {rate:.0} captures/s, {} MiB on disk",
                size_mib(directory)
            );
        }
    }
    submitted.await.unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{captures} captures accepted and settled in {seconds:.1} s: {:.0} captures/s, {} MiB on disk, {} MiB resident",
        captures as f64 / seconds,
        size_mib(directory),
        resident_mib()
    );
    let (submit, work, idle) = probe(&outbox, u64::MAX / 4).await;
    println!(
        "emptied outbox: submit {submit:?}, lease and settle {work:?}, lease of nothing {idle:?}"
    );
    outbox.close().await;
    let start = Instant::now();
    let outbox = open(directory);
    let lanes = outbox.waiting_lanes().await.unwrap().len();
    println!("opened again in {:?}, {lanes} lanes wait", start.elapsed());
    outbox.close().await;
}
