//! What happened: counts and latencies of one run.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use serde_json::json;
use tonic::{Code, Status};

use crate::call::Answers;

/// Locks, so that tasks seldom meet.
const SHARDS: usize = 16;
/// Longest latency that is told from longer ones: a minute, in microseconds.
const MAX_MICROS: u64 = 60_000_000;

/// The part of a run that counts; what ends before or after does not.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) from: Instant,
    pub(crate) to: Instant,
}

impl Window {
    pub(crate) fn new(warm_up: Duration, length: Duration) -> Self {
        let from = Instant::now() + warm_up;
        Self {
            from,
            to: from + length,
        }
    }
}

struct Shard {
    accepted: Histogram<u64>,
    refused: Histogram<u64>,
    counts: Counts,
}

#[derive(Clone, Default)]
struct Counts {
    accepted: u64,
    /// Also outside the window.
    accepted_ever: u64,
    duplicates: u64,
    refused: BTreeMap<String, u64>,
    /// In an open loop: what found all places in flight taken.
    unsent: u64,
}

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Record {
    shards: Arc<Vec<Mutex<Shard>>>,
    pub(crate) window: Window,
}

impl Record {
    pub(crate) fn new(window: Window) -> Self {
        let histogram = || Histogram::new_with_max(MAX_MICROS, 3).expect("bounds");
        let shard = || {
            Mutex::new(Shard {
                accepted: histogram(),
                refused: histogram(),
                counts: Counts::default(),
            })
        };
        Self {
            shards: Arc::new((0..SHARDS).map(|_| shard()).collect()),
            window,
        }
    }

    /// A call with so many captures, sent (or due) at `start`, has ended.
    pub(crate) fn ended(
        &self,
        place: usize,
        start: Instant,
        captures: usize,
        answer: &Result<Answers, Status>,
    ) {
        let now = Instant::now();
        let micros = u64::try_from((now - start).as_micros()).unwrap_or(MAX_MICROS);
        let in_window = (self.window.from..self.window.to).contains(&now);
        let mut shard = self.shards[place % SHARDS].lock().expect("sound");
        let mut refused = 0;
        let mut refuse = |counts: &mut Counts, code: Code, captures: u64| {
            refused += captures;
            if in_window {
                *counts.refused.entry(format!("{code:?}")).or_default() += captures;
            }
        };
        match answer {
            Ok(answers) => {
                for answer in &answers.results {
                    shard.counts.duplicates += u64::from(answer.duplicate);
                    if let Some(error) = &answer.error {
                        refuse(&mut shard.counts, Code::from(error.code), 1);
                    }
                }
            }
            Err(status) => refuse(&mut shard.counts, status.code(), captures as u64),
        }
        let accepted = captures as u64 - refused;
        shard.counts.accepted_ever += accepted;
        if in_window {
            shard.counts.accepted += accepted;
            let histogram = if accepted > 0 {
                &mut shard.accepted
            } else {
                &mut shard.refused
            };
            histogram.saturating_record(micros);
        }
    }

    /// An open loop had no place for so many captures.
    pub(crate) fn unsent(&self, captures: usize) {
        if Instant::now() >= self.window.from {
            let mut shard = self.shards[0].lock().expect("sound");
            shard.counts.unsent += captures as u64;
        }
    }

    /// The result as it is printed.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        let mut shards = self.shards.iter().map(|shard| shard.lock().expect("sound"));
        let mut total = shards.next().expect("one at least");
        for shard in shards {
            total.accepted.add(&shard.accepted).expect("same bounds");
            total.refused.add(&shard.refused).expect("same bounds");
            total.counts.accepted += shard.counts.accepted;
            total.counts.accepted_ever += shard.counts.accepted_ever;
            total.counts.duplicates += shard.counts.duplicates;
            for (code, count) in &shard.counts.refused {
                *total.counts.refused.entry(code.clone()).or_default() += count;
            }
        }
        let seconds = (self.window.to - self.window.from).as_secs_f64();
        let counts = &total.counts;
        json!({
            "seconds": seconds,
            "accepted": counts.accepted,
            "accepted_ever": counts.accepted_ever,
            "accepted_per_second": counts.accepted as f64 / seconds,
            "duplicates": counts.duplicates,
            "refused": counts.refused,
            "unsent": counts.unsent,
            "calls": total.accepted.len(),
            "latency_ms": latencies(&total.accepted),
            "refused_latency_ms": latencies(&total.refused),
        })
    }
}

/// Quantiles of the curves.
const CURVE: [f64; 11] = [
    0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999,
];

/// Percentiles in milliseconds; nothing where nothing was recorded.
pub(crate) fn latencies(histogram: &Histogram<u64>) -> serde_json::Value {
    if histogram.is_empty() {
        return serde_json::Value::Null;
    }
    let at = |share: f64| histogram.value_at_quantile(share) as f64 / 1_000.0;
    json!({
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "p999": at(0.999),
        "max": histogram.max() as f64 / 1_000.0,
        "curve": CURVE.map(|share| [share, at(share)]),
    })
}
