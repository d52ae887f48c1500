//! CaptureStream: captures are submitted in the order of the stream, those that have come
//! together in one group, their results sent as they become durable. What is between the
//! two is bounded, and so is what waits to be sent: a client that does not read is not read.

mod group;

use std::{collections::BTreeMap, future::poll_fn, mem, pin::pin, sync::Arc, task::Poll};

use futures_util::{FutureExt, StreamExt, poll, stream::FuturesUnordered};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::PollSemaphore;
use tonic::{Status, Streaming};

use super::{
    RelayError, Services, foreign::explained_status, gate::Place, spans::StreamTrace, usage::units,
};
use crate::{
    integration::Integration,
    permission::Caller,
    proto::{CaptureStreamResponse, raw::CaptureStreamRequest},
};

use group::{Answered, Group, MAX_GROUP, Member};

/// Results that wait to be sent.
const RESULTS: usize = 2 * MAX_GROUP;

type Results = mpsc::Sender<Result<CaptureStreamResponse, Status>>;

/// Serves a stream in a task of its own, which holds the call's place.
pub(super) fn serve(
    services: Services,
    caller: Arc<Caller>,
    trace: StreamTrace,
    requests: Streaming<CaptureStreamRequest>,
    place: Place,
) -> ReceiverStream<Result<CaptureStreamResponse, Status>> {
    let (results, receiver) = mpsc::channel(RESULTS);
    let tracker = services.gate.streams.clone();
    let intake = Intake {
        room: PollSemaphore::new(services.usage.memory()),
        services,
        caller,
        trace,
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
    trace: StreamTrace,
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
        let mut groups = FuturesUnordered::new();
        let mut flight = Flight::default();
        let gate = Arc::clone(&self.services.gate);
        let mut draining = pin!(gate.draining());
        while self.reading || self.next.is_some() || !groups.is_empty() {
            tokio::select! {
                Some(answered) = groups.next(), if !groups.is_empty() => {
                    let last = groups.is_empty();
                    let answers = flight.land(answered, last, &self.services).await;
                    if !send(&results, answers).await {
                        return;
                    }
                }
                () = &mut draining, if self.reading => self.end(RelayError::Draining.into()),
                held = room_for(&mut self.room, self.next.as_ref()),
                    if self.next.is_some() && flight.stale.is_empty() =>
                {
                    let group = self.gather(held, max_in_flight - flight.captures).await;
                    while flight.must_land_before(&group)
                        && let Some(answered) = groups.next().await
                    {
                        let last = groups.is_empty();
                        let answers = flight.land(answered, last, &self.services).await;
                        if !send(&results, answers).await {
                            return;
                        }
                    }
                    let number = flight.start(&group);
                    let (refused, answers) = group.submit(&self.services).await;
                    groups.extend(answers.map(|answers| answers.map(move |all| (number, all))));
                    if !send(&results, refused).await {
                        return;
                    }
                }
                request = self.requests.message(),
                    if self.reading && self.next.is_none() && flight.captures < max_in_flight =>
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
        // Without room the next request stays where it is.
        while let Some(room) = held.take() {
            let Some(request) = self.next.take() else {
                break;
            };
            let (services, caller, id) = (&self.services, &self.caller, &request.integration_id);
            let integration = group.integration(services, caller, id).await;
            let added = group.add(services, caller, &self.trace, request, integration, room);
            if let Err(bad) = added {
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
        group.settle_doubts(&self.services).await;
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
        (self.reading, self.end) = (false, Some(explained_status(status)));
    }
}

/// The captures of a stream that are being stored.
#[derive(Default)]
struct Flight {
    captures: usize,
    /// Groups so far.
    started: u64,
    /// What they were mapped with, where other relays may change it.
    integrations: Vec<Arc<Integration>>,
    /// Stale captures by the number of their group. They are submitted again, in the order
    /// of the stream, once no group is under way; no other group starts before.
    stale: BTreeMap<u64, Vec<Member>>,
}

impl Flight {
    /// Whether a group has to wait: one that was mapped with another revision could be
    /// accepted before captures of the same integration that turn out to be stale.
    fn must_land_before(&self, group: &Group) -> bool {
        let differs = |new: &Arc<Integration>| {
            let mut known = self.integrations.iter();
            let old = known.find(|old| old.id() == new.id());
            old.is_some_and(|old| old.revision.etag != new.revision.etag)
        };
        group.integrations.iter().any(differs)
    }

    /// Counts a group in; returns its number.
    fn start(&mut self, group: &Group) -> u64 {
        self.captures += group.len();
        self.started += 1;
        for new in &group.integrations {
            if self.integrations.iter().all(|old| old.id() != new.id()) {
                self.integrations.push(Arc::clone(new));
            }
        }
        self.started
    }

    /// The answers to a group; after the last one under way also those to stale captures.
    async fn land(
        &mut self,
        (number, answered): (u64, Answered),
        last: bool,
        services: &Services,
    ) -> Vec<CaptureStreamResponse> {
        let mut answers = answered.answers;
        if !answered.stale.is_empty() {
            self.stale.insert(number, answered.stale);
        }
        if last {
            self.integrations.clear();
            let stale: Vec<Member> = mem::take(&mut self.stale).into_values().flatten().collect();
            if !stale.is_empty() {
                answers.extend(Box::pin(group::submit_again(stale, services)).await);
            }
        }
        self.captures -= answers.len();
        answers
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

/// Whether the client is there to get the answers.
async fn send(results: &Results, answers: Vec<CaptureStreamResponse>) -> bool {
    let mut answers = answers.into_iter();
    loop {
        let Ok(places) = results.reserve_many(answers.len().min(RESULTS)).await else {
            return false;
        };
        for (place, answer) in places.zip(answers.by_ref()) {
            place.send(Ok(answer));
        }
        if answers.len() == 0 {
            return true;
        }
    }
}
