//! The requests that take captures, as the server reads them: each capture is left as the
//! bytes that it came in. A message and a field of bytes are written alike, so nothing of
//! this shows on the wire.

use std::fmt;

use bytes::Bytes;
use prost::Message;

/// `CaptureRequest`.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct CaptureRequest {
    /// As in the schema.
    #[prost(string, tag = "1")]
    pub integration_id: String,
    /// Each occurrence of the field; together they are one capture.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub capture: Vec<Bytes>,
    /// The number of a [`super::WaitFor`].
    #[prost(enumeration = "super::WaitFor", tag = "3")]
    pub wait_for: i32,
}

/// `CaptureBatchRequest`.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct CaptureBatchRequest {
    /// As in the schema.
    #[prost(string, tag = "1")]
    pub integration_id: String,
    /// One for each capture.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub captures: Vec<Bytes>,
    /// The number of a [`super::WaitFor`].
    #[prost(enumeration = "super::WaitFor", tag = "3")]
    pub wait_for: i32,
}

/// `CaptureStreamRequest`.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct CaptureStreamRequest {
    /// As in the schema.
    #[prost(string, tag = "1")]
    pub correlation_id: String,
    /// As in the schema.
    #[prost(string, tag = "2")]
    pub integration_id: String,
    /// Each occurrence of the field; together they are one capture.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub capture: Vec<Bytes>,
}

/// What is raw may be anything, and is not printed.
macro_rules! print_ids_alone {
    ($($message:ident),+) => {$(
        impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($message))
                    .field("integration_id", &self.integration_id)
                    .finish_non_exhaustive()
            }
        }
    )+};
}
print_ids_alone!(CaptureRequest, CaptureBatchRequest, CaptureStreamRequest);
