//! CaptureStream: captures are submitted in the order of the stream, those that have come
//! together in one group, their results sent as they become durable. What is between the
//! two is bounded, and so is what waits to be sent: a client that does not read is not read.

mod group;

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll};

use futures_util::{StreamExt, poll, stream::FuturesUnordered};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::PollSemaphore;
use tonic::{Status, Streaming};

use super::{RelayError, Services, gate::Place, usage::units};
use crate::{
    permission::Caller,
    proto::{CaptureStreamResponse, raw::CaptureStreamRequest},
    trace::TraceLink,
};

use group::{Group, MAX_GROUP};

/// Results that wait to be sent.
const RESULTS: usize = 2 * MAX_GROUP;

type Results = mpsc::Sender<Result<CaptureStreamResponse, Status>>;

/// Serves a stream in a task of its own, which holds the call's place.
pub(super) fn serve(
    services: Services,
    caller: Arc<Caller>,
    requests: Streaming<CaptureStreamRequest>,
    place: Place,
) -> ReceiverStream<Result<CaptureStreamResponse, Status>> {
    let (results, receiver) = mpsc::channel(RESULTS);
    let tracker = services.gate.streams.clone();
    let intake = Intake {
        room: PollSemaphore::new(services.usage.memory()),
        services,
        caller,
        stream: TraceLink::current(),
        requests,
        next: None,
        reading: true,
        end: None,
    };
    tracker.spawn(async move {
        intake.run(results).await;
        drop(place);
    });
    ReceiverStream::new(receiver)
}

/// The way of a stream's requests to the outbox.
struct Intake {
    services: Services,
    caller: Arc<Caller>,
    /// The stream's span, where it is traced.
    stream: Option<TraceLink>,
    requests: Streaming<CaptureStreamRequest>,
    room: PollSemaphore,
    /// The next one, which waits for room.
    next: Option<CaptureStreamRequest>,
    reading: bool,
    /// With what the stream ends once all that was taken is answered.
    end: Option<Status>,
}

impl Intake {
    /// Ends when the client has ended its side and has all results, when it has sent what is
    /// no request or has gone, or when the relay drains.
    async fn run(mut self, results: Results) {
        let max_in_flight = self.services.limits.max_stream_captures_in_flight;
        let (mut groups, mut in_flight) = (FuturesUnordered::new(), 0);
        let gate = Arc::clone(&self.services.gate);
        let mut draining = pin!(gate.draining());
        while self.reading || self.next.is_some() || !groups.is_empty() {
            tokio::select! {
                Some(answers) = groups.next(), if !groups.is_empty() => {
                    in_flight -= Vec::len(&answers);
                    if !send(&results, answers).await {
                        return;
                    }
                }
                () = &mut draining, if self.reading => self.end(RelayError::Draining.into()),
                held = room_for(&mut self.room, self.next.as_ref()), if self.next.is_some() => {
                    let group = self.gather(held, max_in_flight - in_flight).await;
                    in_flight += group.len();
                    let (refused, answers) = group.submit(&self.services).await;
                    groups.extend(answers);
                    if !send(&results, refused).await {
                        return;
                    }
                }
                request = self.requests.message(),
                    if self.reading && self.next.is_none() && in_flight < max_in_flight =>
                {
                    self.take(request);
                }
            }
        }
        if let Some(status) = self.end {
            // An error says that the client has gone.
            let _ = results.send(Err(status)).await;
        }
    }

    /// Prepares the next request, which has its room now, and those behind it that have
    /// come already and find room: together they cost little more than one.
    async fn gather(&mut self, held: Option<OwnedSemaphorePermit>, most: usize) -> Group {
        let mut group = Group::default();
        let mut held = Some(held);
        while let (Some(room), Some(request)) = (held.take(), self.next.take()) {
            if let Err(bad) = group.add(&self.services, &self.caller, self.stream, request, room) {
                self.end(bad);
            }
            if !self.reading || group.taken() >= most.min(MAX_GROUP) {
                break;
            }
            let Poll::Ready(request) = poll!(pin!(self.requests.message())) else {
                break;
            };
            self.take(request);
            if let Poll::Ready(room) = poll!(pin!(room_for(&mut self.room, self.next.as_ref()))) {
                held = Some(room);
            }
        }
        group
    }

    /// Notes what has come of the stream.
    fn take(&mut self, request: Result<Option<CaptureStreamRequest>, Status>) {
        match request {
            Ok(Some(request)) => self.next = Some(request),
            Ok(None) => self.reading = false,
            // Bytes that are no request, or a caller who has gone.
            Err(status) => self.end(status),
        }
    }

    /// Reads no more.
    fn end(&mut self, status: Status) {
        (self.reading, self.end) = (false, Some(status));
    }
}

/// Room for a request among all that are being handled. Keeps its place in the
/// queue when it is dropped and asked again.
async fn room_for(
    room: &mut PollSemaphore,
    request: Option<&CaptureStreamRequest>,
) -> Option<OwnedSemaphorePermit> {
    let bytes = request.map_or(0, Message::encoded_len);
    poll_fn(|context| room.poll_acquire_many(context, units(bytes))).await
}

/// Whether the client is there to get the answers, which are those of a group.
async fn send(results: &Results, answers: Vec<CaptureStreamResponse>) -> bool {
    let Ok(places) = results.reserve_many(answers.len()).await else {
        return false;
    };
    for (place, answer) in places.zip(answers) {
        place.send(Ok(answer));
    }
    true
}
