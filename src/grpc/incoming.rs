//! A request's body as HTTP/2 brings it in.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http_body::{Body, Frame, SizeHint};

/// The frames of one stream. Flow control: its peer may send more once a frame was read here.
pub struct Incoming {
    stream: RecvStream,
    /// Whether all data was read, and only trailers can follow.
    data_ended: bool,
}

impl Incoming {
    /// Reads a stream.
    #[must_use]
    pub fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            data_ended: false,
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let Self { stream, data_ended } = &mut *self;
        if !*data_ended {
            match ready!(stream.poll_data(context)) {
                Some(Ok(data)) => {
                    // It fails where the stream is gone, and then there is no window to open.
                    let _ = stream.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                // A peer that ends a call without fault, as hyper has it.
                Some(Err(error)) if ends_quietly(&error) => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => *data_ended = true,
            }
        }
        let trailers = ready!(stream.poll_trailers(context));
        Poll::Ready(trailers.transpose().map(|one| one.map(Frame::trailers)))
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.stream.is_end_stream() {
            SizeHint::with_exact(0)
        } else {
            SizeHint::default()
        }
    }
}

fn ends_quietly(error: &h2::Error) -> bool {
    matches!(error.reason(), Some(Reason::NO_ERROR | Reason::CANCEL))
}
