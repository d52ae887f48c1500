//! The guard against gross regressions of the pure path: it counts allocations, which are the same on every
//! machine and in every profile, not seconds.

use std::hint::black_box;

use allocation_counter::measure;

use crate::workload::{encoded, event_bytes, integration, relay_path};

/// What decoding, validating, mapping and serialising one capture of the benchmarks allocates,
/// measured. A change that needs more says why in its commit; one that needs fewer lowers it.
const MAX_ALLOCATIONS: u64 = 12;
const MAX_BYTES: u64 = 4_094;

#[test]
fn the_pure_path_of_a_capture_allocates_no_more_than_it_did() {
    let integration = integration();
    let requests = encoded(3);
    for request in &requests {
        let new = relay_path(&integration, request);
        assert!(event_bytes(&new) > 1_000, "both events are built");
        let counted = measure(|| drop(black_box(relay_path(&integration, black_box(request)))));
        assert!(
            counted.count_total <= MAX_ALLOCATIONS,
            "{} allocations for one capture, at most {MAX_ALLOCATIONS}",
            counted.count_total
        );
        assert!(
            counted.bytes_total <= MAX_BYTES,
            "{} bytes allocated for one capture, at most {MAX_BYTES}",
            counted.bytes_total
        );
        assert_eq!(counted.count_current, 0, "everything is given back");
    }
}

#[test]
fn allocations_are_counted() {
    let counted = measure(|| drop(black_box(vec![0_u8; 64])));
    assert_eq!((counted.count_total, counted.bytes_total), (1, 64));
}
