//! Bodies that are counted: a request's bytes as they come, a call until its
//! answer has left.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Status, body::Body};

use super::{RelayError, Usage, peer::ActiveCall};

/// Bytes of a request that are held.
#[derive(Default)]
pub(super) struct HeldBytes(Mutex<Held>);

#[derive(Default)]
struct Held {
    permit: Option<OwnedSemaphorePermit>,
    bytes: usize,
}

impl HeldBytes {
    /// Holds more, up to `most`: a message is decoded before the next one is read.
    fn add(&self, usage: &Usage, more: usize, most: usize) -> Result<(), RelayError> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let more = more.min(most.saturating_sub(held.bytes));
        if more == 0 {
            return Ok(());
        }
        let permit = usage.hold(more)?;
        held.bytes += more;
        match &mut held.permit {
            Some(all) => all.merge(permit),
            None => held.permit = Some(permit),
        }
        Ok(())
    }
}

/// What a call holds until its answer has left.
pub(super) struct CallGuards {
    _activity: Option<ActiveCall>,
    _permit: Option<OwnedSemaphorePermit>,
    bytes: Arc<HeldBytes>,
}

impl CallGuards {
    pub(super) fn new(activity: Option<ActiveCall>, permit: Option<OwnedSemaphorePermit>) -> Self {
        Self {
            _activity: activity,
            _permit: permit,
            bytes: Arc::default(),
        }
    }

    pub(super) fn bytes(&self) -> &Arc<HeldBytes> {
        &self.bytes
    }
}

/// A request's body whose bytes take room as they come.
pub(super) struct Metered {
    body: Body,
    usage: Arc<Usage>,
    held: Arc<HeldBytes>,
    most: usize,
}

impl Metered {
    pub(super) fn new(body: Body, usage: Arc<Usage>, held: Arc<HeldBytes>, most: usize) -> Self {
        Self {
            body,
            usage,
            held,
            most,
        }
    }
}

impl HttpBody for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(error) = this.held.add(&this.usage, data.len(), this.most)
        {
            return Poll::Ready(Some(Err(error.into())));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body; what the call holds goes with its end.
pub(super) struct Answering {
    body: Body,
    guards: Option<CallGuards>,
}

impl Answering {
    pub(super) fn new(body: Body, guards: CallGuards) -> Self {
        Self {
            body,
            guards: Some(guards),
        }
    }
}

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        if frame.is_none() {
            this.guards = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
