//! The body of a request to `/v1/batch`.

use std::{
    convert::Infallible,
    io::{self, Write},
    pin::Pin,
    task::{Context, Poll},
    vec::IntoIter,
};

use bytes::{Bytes, BytesMut};
use flate2::{Compression, write::GzEncoder};
use http_body::{Frame, SizeHint};

use crate::{secret::WriteKey, time::UnixMillis};

/// Bytes of a body beside its events and the commas between them, at the most:
/// the frame, the time and the longest write key.
pub const REQUEST_OVERHEAD_BYTES: usize = 512;
/// A body is put together in pieces of this size while it is sent, so that no request
/// takes memory for the whole of it.
const PIECE_BYTES: usize = 64 * 1024;

const HEAD: &[u8] = b"{\"batch\":[";

/// `{"batch":[…],"sentAt":"…","writeKey":"…"}`. `sent_at` is the time of this
/// very attempt: Segment corrects clocks by it.
pub(super) struct Batch {
    events: Vec<Bytes>,
    tail: Vec<u8>,
}

impl Batch {
    pub(super) fn new(events: Vec<Bytes>, write_key: &WriteKey, sent_at: UnixMillis) -> Self {
        // A write key holds nothing that JSON escapes.
        let tail = [
            "],\"sentAt\":\"",
            &sent_at.to_iso(),
            "\",\"writeKey\":\"",
            write_key.expose(),
            "\"}",
        ];
        Self {
            events,
            tail: tail.concat().into_bytes(),
        }
    }

    /// Length of the whole body.
    fn bytes(&self) -> usize {
        let events: usize = self.events.iter().map(Bytes::len).sum();
        let commas = self.events.len().saturating_sub(1);
        HEAD.len() + events + commas + self.tail.len()
    }

    /// The body compressed.
    pub(super) fn gzip(&self) -> io::Result<Vec<u8>> {
        let packed = Vec::with_capacity(self.bytes() / 4);
        let mut encoder = GzEncoder::new(packed, Compression::fast());
        encoder.write_all(HEAD)?;
        for (index, event) in self.events.iter().enumerate() {
            if index > 0 {
                encoder.write_all(b",")?;
            }
            encoder.write_all(event)?;
        }
        encoder.write_all(&self.tail)?;
        encoder.finish()
    }

    /// The body as it is sent.
    pub(super) fn into_body(self) -> BatchBody {
        BatchBody {
            left: self.bytes(),
            next: Some(("", Bytes::from_static(HEAD))),
            events: self.events.into_iter(),
            comma: "",
            tail: Some(self.tail.into()),
        }
    }
}

/// A body whose events are copied when the connection takes them.
pub(super) struct BatchBody {
    /// Bytes that are to be sent still.
    left: usize,
    /// What comes next with its comma: the beginning, or what did not fit.
    next: Option<(&'static str, Bytes)>,
    events: IntoIter<Bytes>,
    /// What stands before the next event.
    comma: &'static str,
    tail: Option<Bytes>,
}

impl BatchBody {
    fn piece(&mut self) -> Bytes {
        let mut piece = BytesMut::with_capacity(self.left.min(PIECE_BYTES));
        while let Some((comma, part)) = self.next.take().or_else(|| self.following()) {
            if !piece.is_empty() && piece.len() + comma.len() + part.len() > PIECE_BYTES {
                self.next = Some((comma, part));
                break;
            }
            piece.extend_from_slice(comma.as_bytes());
            piece.extend_from_slice(&part);
        }
        self.left -= piece.len();
        piece.freeze()
    }

    fn following(&mut self) -> Option<(&'static str, Bytes)> {
        match self.events.next() {
            Some(event) => Some((std::mem::replace(&mut self.comma, ","), event)),
            None => self.tail.take().map(|tail| ("", tail)),
        }
    }
}

impl http_body::Body for BatchBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let more = self.left > 0;
        Poll::Ready(more.then(|| Ok(Frame::data(self.piece()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use http_body_util::BodyExt;

    use super::*;

    fn batch(events: Vec<Bytes>) -> Batch {
        let key = WriteKey::new("k".repeat(256)).expect("the longest key");
        Batch::new(events, &key, UnixMillis(0))
    }

    /// The body's pieces, which are as many bytes as it announces.
    async fn pieces(events: Vec<Bytes>) -> Vec<Bytes> {
        let mut body = batch(events).into_body();
        let mut pieces = Vec::new();
        let announced = http_body::Body::size_hint(&body).exact();
        while let Some(frame) = body.frame().await {
            pieces.push(frame.expect("infallible").into_data().expect("data"));
        }
        let sent: usize = pieces.iter().map(Bytes::len).sum();
        assert_eq!(announced, Some(sent as u64));
        pieces
    }

    fn text(events: &[Bytes]) -> String {
        let events: Vec<&str> = events
            .iter()
            .map(|event| std::str::from_utf8(event).expect("UTF-8"))
            .collect();
        format!(
            r#"{{"batch":[{}],"sentAt":"1970-01-01T00:00:00.000Z","writeKey":"{}"}}"#,
            events.join(","),
            "k".repeat(256)
        )
    }

    #[tokio::test]
    async fn a_body_holds_the_events_as_they_are_with_key_and_time() {
        for count in 0..4 {
            let events = vec![Bytes::from_static(br#"{"a":1}"#); count];
            let body = pieces(events.clone()).await.concat();
            assert_eq!(body, text(&events).as_bytes());
            assert!(body.len() <= 8 * count + REQUEST_OVERHEAD_BYTES);

            let mut unpacked = Vec::new();
            let packed = batch(events).gzip().expect("packed");
            flate2::read::GzDecoder::new(packed.as_slice())
                .read_to_end(&mut unpacked)
                .expect("unpacked");
            assert_eq!(unpacked, body);
        }
    }

    #[tokio::test]
    async fn a_large_body_comes_in_pieces() {
        let event = |size: usize| Bytes::from(format!("\"{}\"", "x".repeat(size)));
        let events: Vec<Bytes> = (0..600).map(|number| event(number * 50)).collect();
        let pieces = pieces(events.clone()).await;
        assert_eq!(pieces.concat(), text(&events).as_bytes());
        let largest = pieces.iter().map(Bytes::len).max();
        assert!(largest <= Some(PIECE_BYTES), "{largest:?}");
        assert!(pieces.len() < 200, "{}", pieces.len());
    }
}
