//! The body of a request to `/v1/batch`.

use std::io::Write;

use flate2::{Compression, write::GzEncoder};

use crate::{secret::WriteKey, time::UnixMillis};

/// Bytes of a body beside its events and the commas between them, at the most:
/// the frame, the time and the longest write key.
pub const REQUEST_OVERHEAD_BYTES: usize = 512;

/// `{"batch":[…],"sentAt":"…","writeKey":"…"}`. `sent_at` is the time of this
/// very attempt: Segment corrects clocks by it.
pub(super) fn body(events: &[&[u8]], write_key: &WriteKey, sent_at: UnixMillis) -> Vec<u8> {
    let size: usize = events.iter().map(|event| event.len() + 1).sum();
    let mut body = Vec::with_capacity(size + REQUEST_OVERHEAD_BYTES);
    body.extend_from_slice(b"{\"batch\":[");
    for (index, event) in events.iter().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        body.extend_from_slice(event);
    }
    body.extend_from_slice(b"],\"sentAt\":\"");
    body.extend_from_slice(sent_at.to_iso().as_bytes());
    // A write key holds nothing that JSON escapes.
    body.extend_from_slice(b"\",\"writeKey\":\"");
    body.extend_from_slice(write_key.expose().as_bytes());
    body.extend_from_slice(b"\"}");
    body
}

/// The body compressed.
pub(super) fn gzip(body: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 4), Compression::fast());
    encoder.write_all(body)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_body_holds_the_events_as_they_are_with_key_and_time() {
        let key = WriteKey::new("k".repeat(256)).expect("the longest key");
        let events: [&[u8]; 2] = [br#"{"a":1}"#, br#"{"b":2}"#];
        let body = body(&events, &key, UnixMillis(0));
        let text = String::from_utf8(body.clone()).expect("UTF-8");
        assert_eq!(
            text,
            format!(
                r#"{{"batch":[{{"a":1}},{{"b":2}}],"sentAt":"1970-01-01T00:00:00.000Z","writeKey":"{}"}}"#,
                "k".repeat(256)
            )
        );
        assert!(body.len() <= 16 + REQUEST_OVERHEAD_BYTES);

        let mut unpacked = Vec::new();
        let packed = gzip(&body).expect("packed");
        flate2::read::GzDecoder::new(packed.as_slice())
            .read_to_end(&mut unpacked)
            .expect("unpacked");
        assert_eq!(unpacked, body);
    }
}
