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
use tokio_util::sync::PollSemaphore;
use tonic::{Status, body::Body};

use super::{
    Incoming, Usage,
    inflate::Inflater,
    peer::{ActiveCall, OpenCall},
    timer::CallTimer,
    usage::{CallerPermit, units},
};

/// Bytes of a compressed request of a call without a caller, once inflated.
const MAX_OPEN_BYTES: usize = 4_096;

/// Bytes of a request that are held.
#[derive(Default)]
pub(super) struct HeldBytes(Mutex<Option<OwnedSemaphorePermit>>);

impl HeldBytes {
    pub(super) fn add(&self, permit: OwnedSemaphorePermit) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match held.as_mut() {
            Some(all) => all.merge(permit),
            None => *held = Some(permit),
        }
    }

    /// Gives back what is held beyond `units`.
    fn shrink_to(&self, units: u32) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(all) = held.as_mut() {
            let spare = all.num_permits().saturating_sub(units as usize);
            drop(all.split(spare));
        }
    }
}

/// What a call holds until its answer has left.
pub(super) struct CallGuards {
    _activity: ActiveCall,
    _permit: Option<CallerPermit>,
    _turn: Option<Arc<CallerPermit>>,
    _open: Option<OpenCall>,
    bytes: Arc<HeldBytes>,
}

impl CallGuards {
    pub(super) fn new(
        activity: ActiveCall,
        permit: CallerPermit,
        turn: Option<Arc<CallerPermit>>,
    ) -> Self {
        Self {
            _activity: activity,
            _permit: Some(permit),
            _turn: turn,
            _open: None,
            bytes: Arc::default(),
        }
    }

    /// Those of a call that anybody may make.
    pub(super) fn open(activity: ActiveCall, open: OpenCall) -> Self {
        Self {
            _activity: activity,
            _permit: None,
            _turn: None,
            _open: Some(open),
            bytes: Arc::default(),
        }
    }

    pub(super) fn bytes(&self) -> &Arc<HeldBytes> {
        &self.bytes
    }
}

/// A request's body whose bytes take room as they come.
pub(super) struct Metered {
    body: Incoming,
    meter: Option<Meter>,
    /// Where its messages are compressed.
    inflater: Option<Box<Inflater>>,
}

/// Takes the room.
///
/// One message: it is held until the call ends, and refused where there is no
/// room. A stream: only the message that is coming in is held, and it waits for
/// room; HTTP/2 slows its sender down meanwhile.
pub(super) struct Meter {
    held: Arc<HeldBytes>,
    usage: Arc<Usage>,
    stream: Option<StreamMeter>,
}

struct StreamMeter {
    room: PollSemaphore,
    messages: Messages,
    /// A frame that waits for room.
    waiting: Option<Frame<Bytes>>,
}

impl Meter {
    pub(super) fn new(usage: Arc<Usage>, held: Arc<HeldBytes>, streams: bool) -> Self {
        let stream = streams.then(|| StreamMeter {
            room: PollSemaphore::new(usage.memory()),
            messages: Messages::default(),
            waiting: None,
        });
        Self {
            held,
            usage,
            stream,
        }
    }
}

impl Metered {
    /// Takes no room without a meter.
    pub(super) fn new(body: Incoming, meter: Option<Meter>) -> Self {
        Self {
            body,
            meter,
            inflater: None,
        }
    }

    /// The same with messages that come compressed and leave plain, of at most `limit` bytes.
    pub(super) fn inflated(body: Incoming, meter: Option<Meter>, limit: usize) -> Self {
        let inflater = match &meter {
            None => Inflater::unary(limit.min(MAX_OPEN_BYTES), None),
            Some(meter) if meter.stream.is_some() => Inflater::stream(limit),
            Some(meter) => {
                let held = (Arc::clone(&meter.usage), Arc::clone(&meter.held));
                Inflater::unary(limit, Some(held))
            }
        };
        Self {
            inflater: Some(Box::new(inflater)),
            ..Self::new(body, meter)
        }
    }
}

type PolledFrame = Poll<Option<Result<Frame<Bytes>, Status>>>;

/// The next frame as it comes in.
fn poll_incoming(body: &mut Incoming, context: &mut Context<'_>) -> PolledFrame {
    let frame = Pin::new(body).poll_frame(context);
    frame.map_err(|error| Status::from_error(error.into()))
}

impl Metered {
    /// The next frame once it has its room.
    fn poll_metered(&mut self, context: &mut Context<'_>) -> PolledFrame {
        let Self { body, meter, .. } = self;
        let Some(meter) = meter else {
            return poll_incoming(body, context);
        };
        let Some(stream) = &mut meter.stream else {
            let frame = ready!(poll_incoming(body, context));
            if let Some(data) = data_of(&frame) {
                match meter.usage.hold(data.len()) {
                    Ok(permit) => meter.held.add(permit),
                    Err(error) => return Poll::Ready(Some(Err(error.into()))),
                }
            }
            return Poll::Ready(frame);
        };
        if stream.waiting.is_none() {
            // Whoever asks for more has taken all whole messages.
            meter.held.shrink_to(units(stream.messages.incomplete()));
            match ready!(poll_incoming(body, context)) {
                Some(Ok(frame)) if frame.is_data() => stream.waiting = Some(frame),
                other => return Poll::Ready(other),
            }
        }
        let bytes = stream.waiting.as_ref().and_then(Frame::data_ref);
        let bytes = bytes.map_or(0, Bytes::len);
        // Never closed.
        if let Some(permit) = ready!(stream.room.poll_acquire_many(context, units(bytes))) {
            meter.held.add(permit);
        }
        let frame = stream.waiting.take();
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            stream.messages.feed(data);
        }
        Poll::Ready(frame.map(Ok))
    }
}

impl HttpBody for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        let this = &mut *self;
        loop {
            let Some(inflater) = &mut this.inflater else {
                return this.poll_metered(context);
            };
            if let Some(message) = inflater.next().transpose() {
                return Poll::Ready(Some(message.map(Frame::data)));
            }
            let frame = ready!(this.poll_metered(context));
            let Some(inflater) = &mut this.inflater else {
                return Poll::Ready(frame);
            };
            match data_of(&frame) {
                Some(data) => inflater.feed(data),
                None if frame.is_none() && !inflater.is_empty() => {
                    this.inflater = None;
                    let rule = "the request ends within its message";
                    return Poll::Ready(Some(Err(Status::invalid_argument(rule))));
                }
                None => return Poll::Ready(frame),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let stream = self.meter.as_ref().and_then(|meter| meter.stream.as_ref());
        let waits = stream.is_some_and(|stream| stream.waiting.is_some());
        let inflater = self.inflater.as_ref();
        let inflates = inflater.is_some_and(|inflater| !inflater.is_empty());
        !waits && !inflates && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.inflater {
            Some(_) => SizeHint::default(),
            None => self.body.size_hint(),
        }
    }
}

fn data_of(frame: &Option<Result<Frame<Bytes>, Status>>) -> Option<&Bytes> {
    frame.as_ref()?.as_ref().ok()?.data_ref()
}

/// Follows the messages in a stream's bytes: a flag, a length of four bytes, the
/// message (gRPC over HTTP/2, "Length-Prefixed-Message").
#[derive(Debug, Default)]
struct Messages {
    head: [u8; 5],
    /// Bytes of the current message so far, its head included.
    have: usize,
}

impl Messages {
    /// Bytes of the message that is not whole yet.
    fn incomplete(&self) -> usize {
        self.have
    }

    fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            while self.have < self.head.len() {
                let Some((first, rest)) = bytes.split_first() else {
                    return;
                };
                self.head[self.have] = *first;
                self.have += 1;
                bytes = rest;
            }
            let [_, length @ ..] = self.head;
            let whole = self.head.len() + u32::from_be_bytes(length) as usize;
            let taken = bytes.len().min(whole - self.have);
            bytes = &bytes[taken..];
            self.have += taken;
            if self.have == whole {
                self.have = 0;
            }
        }
    }
}

/// An answer's body; what the call holds goes with its end.
pub struct Answering {
    body: Body,
    guards: Option<CallGuards>,
    timer: Option<CallTimer>,
}

impl Answering {
    /// The body of an answer that holds nothing.
    pub(super) fn free(body: Body) -> Self {
        Self {
            body,
            guards: None,
            timer: None,
        }
    }

    pub(super) fn new(body: Body, guards: CallGuards, timer: Option<CallTimer>) -> Self {
        Self {
            body,
            guards: Some(guards),
            timer,
        }
    }
}

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        let trailers = frame.as_ref().and_then(|frame| frame.as_ref().ok());
        if let Some(trailers) = trailers.and_then(Frame::trailers_ref)
            && let Some(timer) = this.timer.take()
        {
            timer.see(trailers);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_followed_however_their_bytes_are_cut() {
        let mut stream = Vec::new();
        for length in [3_u8, 0, 200] {
            stream.extend_from_slice(&[0, 0, 0, 0, length]);
            stream.extend(std::iter::repeat_n(7, length.into()));
        }
        // Ends of the three messages.
        let ends = [8, 13, 218];
        for size in 1..=stream.len() {
            let mut messages = Messages::default();
            let mut fed = 0;
            for piece in stream.chunks(size) {
                messages.feed(piece);
                fed += piece.len();
                let begun = ends.iter().rev().find(|end| **end <= fed).unwrap_or(&0);
                assert_eq!(messages.incomplete(), fed - begun, "pieces of {size}");
            }
        }
    }
}
