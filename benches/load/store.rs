//! The store's limit: SQLite with the outbox's durability, used as a plain queue by one
//! thread. Groups of rows go in, the oldest come out in the same transaction.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use hdrhistogram::Histogram;
use rusqlite::{Connection, params};
use serde_json::json;

use crate::record::latencies;

/// So many captures wait before the first is taken out.
const BACKLOG: i64 = 4_096;
/// About what the outbox remembers of a delivered capture.
const STATUS_BYTES: usize = 120;

#[derive(Args)]
pub(crate) struct StoreArgs {
    #[arg(long)]
    directory: PathBuf,
    /// Bytes of one capture's two events
    #[arg(long)]
    bytes: usize,
    /// Captures in a transaction
    #[arg(long, default_value_t = 64)]
    group: usize,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Also remember each capture by its id, as an outbox without duplicates has to
    #[arg(long)]
    remember: bool,
}

pub(crate) fn run(args: &StoreArgs) -> serde_json::Value {
    let path = args.directory.join("store.db");
    let mut connection = Connection::open(&path).expect("opens");
    connection
        .execute_batch(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
             CREATE TABLE queue (sequence INTEGER PRIMARY KEY, identify BLOB, track BLOB);
             CREATE TABLE capture (sequence INTEGER PRIMARY KEY, id BLOB UNIQUE, status BLOB);",
        )
        .expect("tables");
    let mut commits = Histogram::<u64>::new_with_max(60_000_000, 3).expect("bounds");
    let length = Duration::from_secs_f64(args.seconds);
    let (start, mut next, mut taken) = (Instant::now(), 0_i64, 0_i64);
    while start.elapsed() < length {
        let begun = Instant::now();
        turn(&mut connection, args, &mut next, &mut taken);
        let micros = u64::try_from(begun.elapsed().as_micros()).expect("fits");
        commits.saturating_record(micros);
    }
    let seconds = start.elapsed().as_secs_f64();
    drop(connection);
    for end in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{end}", path.display()));
    }
    json!({
        "group": args.group,
        "remember": args.remember,
        "captures_per_second": taken as f64 / seconds,
        "transaction_ms": latencies(&commits),
    })
}

/// One transaction: a group in, and as many out.
fn turn(connection: &mut Connection, args: &StoreArgs, next: &mut i64, taken: &mut i64) {
    let payload = vec![b'x'; args.bytes / 2];
    let status = [b's'; STATUS_BYTES];
    let group = i64::try_from(args.group).expect("fits");
    let transaction = connection.transaction().expect("begins");
    {
        let sql = "INSERT INTO queue VALUES (?1, ?2, ?3)";
        let mut queue = transaction.prepare_cached(sql).expect("prepared");
        let sql = "INSERT INTO capture VALUES (?1, ?2, ?3)";
        let mut capture = transaction.prepare_cached(sql).expect("prepared");
        for sequence in *next..*next + group {
            let row = params![sequence, payload, payload];
            queue.execute(row).expect("inserted");
            if args.remember {
                // As spread as hashed ids are.
                let id = (sequence as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let id = format!("{id:016x}{id:016x}").into_bytes();
                capture
                    .execute(params![sequence, id, &status[..]])
                    .expect("inserted");
            }
        }
        *next += group;
        if *next - *taken >= BACKLOG {
            let sql = "SELECT length(identify), track FROM queue ORDER BY sequence LIMIT ?1";
            let mut oldest = transaction.prepare_cached(sql).expect("prepared");
            let mut rows = oldest.query([group]).expect("read");
            while let Some(row) = rows.next().expect("read") {
                std::hint::black_box(row.get_ref(1).expect("a payload"));
            }
            let sql = "DELETE FROM queue WHERE sequence < ?1";
            let mut delete = transaction.prepare_cached(sql).expect("prepared");
            *taken += group;
            delete.execute([*taken]).expect("deleted");
            if args.remember {
                let sql = "UPDATE capture SET status = ?3 WHERE sequence >= ?1 AND sequence < ?2";
                let mut settle = transaction.prepare_cached(sql).expect("prepared");
                let row = params![*taken - group, *taken, &status[..]];
                settle.execute(row).expect("updated");
            }
        }
    }
    transaction.commit().expect("committed");
}
