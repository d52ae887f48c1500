//! The captures of the requests that take them.

use bytes::Bytes;

use super::{Capture, Malformed, decode};
use crate::proto::raw::{CaptureBatchRequest, CaptureRequest, CaptureStreamRequest};

impl CaptureRequest {
    /// The capture, if there is one.
    ///
    /// # Errors
    /// Its bytes are no capture.
    pub fn capture(&self) -> Result<Option<Capture<'_>>, Malformed> {
        merged(&self.capture)
    }
}

impl CaptureBatchRequest {
    /// The captures in their order.
    ///
    /// # Errors
    /// The bytes of one are no capture.
    pub fn captures(&self) -> Result<Vec<Capture<'_>>, Malformed> {
        self.captures
            .iter()
            .map(|bytes| decode([&**bytes]))
            .collect()
    }
}

impl CaptureStreamRequest {
    /// The capture, if there is one.
    ///
    /// # Errors
    /// Its bytes are no capture.
    pub fn capture(&self) -> Result<Option<Capture<'_>>, Malformed> {
        merged(&self.capture)
    }
}

fn merged(pieces: &[Bytes]) -> Result<Option<Capture<'_>>, Malformed> {
    if pieces.is_empty() {
        return Ok(None);
    }
    decode(pieces.iter().map(|bytes| &**bytes)).map(Some)
}
