//! The disk's limit: group-committed appends to a file, without any recovery.

use std::{
    fs::File,
    io::{Seek, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use hdrhistogram::Histogram;
use serde_json::json;

use crate::record::latencies;

/// The file starts again at this size.
const MAX_FILE_BYTES: u64 = 1024 * 1024 * 1024;

#[derive(Args)]
pub(crate) struct DiskArgs {
    /// Directory on the disk to measure
    #[arg(long)]
    directory: PathBuf,
    /// Bytes of one capture
    #[arg(long)]
    bytes: usize,
    /// Captures that share one fdatasync
    #[arg(long)]
    group: usize,
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
}

pub(crate) fn run(args: &DiskArgs) -> serde_json::Value {
    let path = args.directory.join("append");
    let mut file = File::create(&path).expect("a file");
    let record = vec![b'x'; args.bytes * args.group];
    let mut syncs = Histogram::<u64>::new_with_max(60_000_000, 3).expect("bounds");
    let length = Duration::from_secs_f64(args.seconds);
    let (start, mut captures, mut size) = (Instant::now(), 0, 0);
    while start.elapsed() < length {
        file.write_all(&record).expect("written");
        let sync = Instant::now();
        file.sync_data().expect("synced");
        let micros = u64::try_from(sync.elapsed().as_micros()).expect("fits");
        syncs.saturating_record(micros);
        captures += args.group;
        size += record.len() as u64;
        if size > MAX_FILE_BYTES {
            file.set_len(0).expect("cut");
            file.rewind().expect("at its start");
            size = 0;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    drop(file);
    std::fs::remove_file(&path).expect("removed");
    json!({
        "group": args.group,
        "captures_per_second": captures as f64 / seconds,
        "sync_ms": latencies(&syncs),
    })
}
