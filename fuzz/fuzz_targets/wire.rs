//! Whatever comes over the wire is decoded or refused, and what is decoded encodes
//! to the same message again; captures are taken apart as prost takes them apart.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use segment_relay::{
    capture::check_against_prost,
    proto::{CaptureBatchRequest, CaptureRequest, UpdateIntegrationRequest},
};

fn round_trip<M: Message + Default>(bytes: &[u8]) {
    let Ok(message) = M::decode(bytes) else { return };
    let encoded = message.encode_to_vec();
    let again = M::decode(encoded.as_slice()).expect("what was encoded is decoded");
    assert_eq!(again.encode_to_vec(), encoded, "one message, one encoding");
}

fuzz_target!(|bytes: &[u8]| {
    round_trip::<CaptureRequest>(bytes);
    round_trip::<CaptureBatchRequest>(bytes);
    round_trip::<UpdateIntegrationRequest>(bytes);
    let _ = check_against_prost(bytes);
});
