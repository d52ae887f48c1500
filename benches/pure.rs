//! The pure path on one core: decode -> validate -> map -> serialise, beside a minimal
//! typed-serde reference of the same work, round by round.
//!
//! `bash benches/run pure` runs it. Rates are for each second of this thread's CPU
//! time, so that neighbours on the machine disturb little.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "workload/mod.rs"]
mod workload;

use std::{hint::black_box, time::Duration};

use workload::{encoded, event_bytes, integration, reference, relay_decode, relay_path};

/// That of the command, for the relay and the reference alike.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Different captures, so that caches and branches see what they see in service.
const CAPTURES: usize = 4_096;

/// CPU time of this thread so far.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    let nanos = stat.split(' ').next().expect("nanoseconds");
    Duration::from_nanos(nanos.parse().expect("a number"))
}

/// Captures in a second of CPU time.
fn rate(requests: &[Vec<u8>], least: Duration, mut work: impl FnMut(&[u8])) -> f64 {
    let (start, mut done) = (cpu(), 0_usize);
    loop {
        for request in requests {
            work(request);
        }
        done += requests.len();
        let took = cpu() - start;
        if took >= least {
            return done as f64 / took.as_secs_f64();
        }
    }
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn main() {
    let quick = std::env::args().any(|word| word == "--quick");
    let (rounds, least) = if quick {
        (3, Duration::from_millis(200))
    } else {
        (9, Duration::from_millis(700))
    };
    let requests = encoded(CAPTURES);
    let integration = integration();
    let [identify, track] = reference::path(&requests[0]);
    let relay_bytes = event_bytes(&relay_path(&integration, &requests[0]));

    let mut rates = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        rates[0].push(rate(&requests, least, |request| {
            black_box(relay_path(&integration, black_box(request)));
        }));
        rates[1].push(rate(&requests, least, |request| {
            black_box(reference::path(black_box(request)));
        }));
        rates[2].push(rate(&requests, least, |request| {
            relay_decode(black_box(request), |capture| {
                black_box(capture);
            });
        }));
        rates[3].push(rate(&requests, least, |request| {
            use prost::Message;
            black_box(reference::CaptureRequest::decode(black_box(request)).expect("a request"));
        }));
    }
    let [relay, reference, relay_decode, reference_decode] = rates.map(median);
    let result = serde_json::json!({
        "request_bytes": requests[0].len(),
        "event_bytes": relay_bytes,
        "reference_event_bytes": identify.len() + track.len(),
        "relay_per_second": relay,
        "reference_per_second": reference,
        "relay_decode_per_second": relay_decode,
        "reference_decode_per_second": reference_decode,
        "rounds": rounds,
    });
    println!("{result}");
}
