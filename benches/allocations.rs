//! Allocations of the pure path, for each capture: exact, and the same on every machine.
//! `bash benches/run pure` runs it; `tests/it/allocations.rs` guards it.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "workload/mod.rs"]
mod workload;

use std::hint::black_box;

use allocation_counter::{AllocationInfo, measure};
use workload::{encoded, integration, reference, relay_decode, relay_path};

fn main() {
    let request = &encoded(1)[0];
    let integration = integration();
    let counted = |work: &dyn Fn()| {
        // Whatever is set up once is not a capture's.
        work();
        let AllocationInfo {
            count_total,
            bytes_total,
            ..
        } = measure(work);
        serde_json::json!({"count": count_total, "bytes": bytes_total})
    };
    let result = serde_json::json!({
        "relay": counted(&|| drop(black_box(relay_path(&integration, request)))),
        "relay_decode": counted(&|| relay_decode(request, |capture| {
            black_box(capture);
        })),
        "reference": counted(&|| drop(black_box(reference::path(request)))),
    });
    println!("{result}");
}
