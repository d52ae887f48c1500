//! Requests made by writing numbers into bytes that were encoded once.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use prost::Message;

use crate::workload::{
    DIGITS, MARK, capture,
    reference::{CaptureBatchRequest, CaptureRequest, CaptureStreamRequest},
};

/// Digits of a stream's slot, which is the correlation id.
const SLOT_DIGITS: usize = 5;

/// The next capture's number: none is used twice, in this process or the next.
pub(crate) struct Numbers(AtomicU64);

impl Numbers {
    /// Starts at the microseconds since 1970, of which there are more than captures.
    pub(crate) fn new() -> Self {
        let since = std::time::UNIX_EPOCH.elapsed().expect("a clock");
        Self(AtomicU64::new(
            u64::try_from(since.as_micros()).expect("fits"),
        ))
    }

    pub(crate) fn take(&self, count: usize) -> u64 {
        self.0.fetch_add(count as u64, Relaxed)
    }
}

/// An encoded request.
pub(crate) struct Template {
    bytes: Vec<u8>,
    marks: Vec<usize>,
    /// Captures in it.
    pub(crate) captures: usize,
}

impl Template {
    pub(crate) fn unary(integration_id: String) -> Self {
        let request = CaptureRequest {
            integration_id,
            capture: Some(capture(MARK)),
            wait_for: 0,
        };
        Self::new(request.encode_to_vec(), 1)
    }

    pub(crate) fn batch(integration_id: String, captures: usize) -> Self {
        let request = CaptureBatchRequest {
            integration_id,
            captures: vec![capture(MARK); captures],
            wait_for: 0,
        };
        Self::new(request.encode_to_vec(), captures)
    }

    pub(crate) fn stream(integration_id: String) -> Self {
        let request = CaptureStreamRequest {
            correlation_id: "0".repeat(SLOT_DIGITS),
            integration_id,
            capture: Some(capture(MARK)),
        };
        Self::new(request.encode_to_vec(), 1)
    }

    fn new(bytes: Vec<u8>, captures: usize) -> Self {
        let is_mark = |place: &usize| bytes[*place..].starts_with(MARK.as_bytes());
        let marks: Vec<_> = (0..bytes.len()).filter(is_mark).collect();
        assert_eq!(
            marks.len(),
            captures * 3,
            "id, address and session of each capture"
        );
        Self {
            bytes,
            marks,
            captures,
        }
    }

    /// The request with the numbers of new captures.
    pub(crate) fn fill(&self, numbers: &Numbers) -> Bytes {
        Bytes::from(self.filled(numbers))
    }

    /// The request of a stream, with its slot as the correlation id.
    pub(crate) fn fill_slot(&self, numbers: &Numbers, slot: usize) -> Bytes {
        // A field's tag and length are before it.
        const START: usize = 2;
        let mut bytes = self.filled(numbers);
        let text = format!("{slot:0SLOT_DIGITS$}");
        bytes[START..START + SLOT_DIGITS].copy_from_slice(text.as_bytes());
        Bytes::from(bytes)
    }

    fn filled(&self, numbers: &Numbers) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let first = numbers.take(self.captures);
        for (number, marks) in (first..).zip(self.marks.chunks(3)) {
            let text = format!("{number:0DIGITS$}");
            for &mark in marks {
                bytes[mark..mark + DIGITS].copy_from_slice(text.as_bytes());
            }
        }
        bytes
    }
}
