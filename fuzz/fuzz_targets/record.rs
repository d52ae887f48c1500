//! Whatever the disk gives back as a record is decoded or refused, and what is
//! decoded encodes to the same record again.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| segment_relay::outbox::check_stored_record(bytes));
