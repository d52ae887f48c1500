//! CaptureStream: captures are submitted in the order of the stream, their
//! results sent as they become durable. What is between the two is bounded, and
//! so is what waits to be sent: a client that does not read is not read.

use std::sync::Arc;

use futures_util::{StreamExt, stream::FuturesUnordered};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::PollSemaphore;
use tonic::{Code, Status, Streaming};
use tracing::{Instrument, Span};

use super::{
    RelayError, Services,
    accept::{accepted, capture_result, describe, echo_id, malformed, tally},
    gate::Place,
    spans,
    usage::units,
};
use crate::{
    capture::{Capture, Malformed},
    integration::{Integration, IntegrationId},
    metrics::Metrics,
    outbox::{NewCapture, Receipt},
    permission::Caller,
    proto::{CaptureStreamResponse, raw::CaptureStreamRequest},
    trace::{TraceLink, step},
};

/// Results that wait to be sent.
const RESULTS: usize = 64;
/// Longest correlation id, in characters.
const MAX_CORRELATION_CHARS: usize = 256;

type Results = mpsc::Sender<Result<CaptureStreamResponse, Status>>;

/// Serves a stream in a task of its own, which holds the call's place.
pub(super) fn serve(
    services: Services,
    caller: Arc<Caller>,
    requests: Streaming<CaptureStreamRequest>,
    place: Place,
) -> ReceiverStream<Result<CaptureStreamResponse, Status>> {
    let (results, receiver) = mpsc::channel(RESULTS);
    let stream = TraceLink::current();
    let tracker = services.gate.streams.clone();
    tracker.spawn(async move {
        run(services, caller, requests, results, stream).await;
        drop(place);
    });
    ReceiverStream::new(receiver)
}

/// Ends when the client has ended its side and has all results, when it has sent what is no
/// request or has gone, or when the relay drains.
async fn run(
    services: Services,
    caller: Arc<Caller>,
    mut requests: Streaming<CaptureStreamRequest>,
    results: Results,
    stream: Option<TraceLink>,
) {
    let max_in_flight = services.limits.max_stream_captures_in_flight;
    let mut room = PollSemaphore::new(services.usage.memory());
    let mut in_flight = FuturesUnordered::new();
    let draining = services.gate.draining();
    tokio::pin!(draining);
    // The next one, which waits for room.
    let mut next: Option<CaptureStreamRequest> = None;
    let mut reading = true;
    // With what the stream ends once all that was taken is answered.
    let mut end: Option<Status> = None;
    while reading || next.is_some() || !in_flight.is_empty() {
        tokio::select! {
            Some(result) = in_flight.next(), if !in_flight.is_empty() => {
                if results.send(Ok(result)).await.is_err() {
                    return;
                }
            }
            () = &mut draining, if reading => {
                (reading, end) = (false, Some(RelayError::Draining.into()));
            }
            held = room_for(&mut room, next.as_ref()), if next.is_some() => {
                if let Some(request) = next.take() {
                    let span = spans::message(services.traces, stream);
                    let submitted = submit(&services, &caller, request, held);
                    match submitted.instrument(span.clone()).await {
                        Ok(submitted) => in_flight.push(submitted.result().instrument(span)),
                        Err(bad) => (reading, end) = (false, Some(malformed(bad))),
                    }
                }
            }
            request = requests.message(),
                if reading && next.is_none() && in_flight.len() < max_in_flight =>
            {
                match request {
                    Ok(Some(request)) => next = Some(request),
                    Ok(None) => reading = false,
                    // Bytes that are no request, or a caller who has gone.
                    Err(status) => (reading, end) = (false, Some(status)),
                }
            }
        }
    }
    if let Some(status) = end {
        // An error says that the client has gone.
        let _ = results.send(Err(status)).await;
    }
}

/// Room for a request among all that are being handled. Keeps its place in the
/// queue when it is dropped and asked again.
async fn room_for(
    room: &mut PollSemaphore,
    request: Option<&CaptureStreamRequest>,
) -> Option<OwnedSemaphorePermit> {
    let bytes = request.map_or(0, Message::encoded_len);
    std::future::poll_fn(|context| room.poll_acquire_many(context, units(bytes))).await
}

/// A capture of the stream between its submission and its result.
struct InFlight {
    correlation_id: String,
    capture_id: String,
    submitted: Result<Receipt, RelayError>,
    metrics: Metrics,
    /// Whose it is, where it is somebody's.
    integration_id: Option<IntegrationId>,
}

/// Submits one capture, in its turn.
///
/// # Errors
/// The bytes are no capture.
async fn submit(
    services: &Services,
    caller: &Caller,
    request: CaptureStreamRequest,
    room: Option<OwnedSemaphorePermit>,
) -> Result<InFlight, Malformed> {
    let capture = request.capture()?;
    let capture_id = capture.as_ref().map(echo_id).unwrap_or_default();
    let correlation_id = request
        .correlation_id
        .chars()
        .take(MAX_CORRELATION_CHARS)
        .collect();
    let integration = services.integration(caller, &request.integration_id);
    let integration_id = integration.as_ref().ok().map(|found| found.id().clone());
    let prepared = prepare(services, caller, &request, integration, capture);
    // Its bytes are part of a buffer that is read into again once they are given back.
    drop(request);
    let submitted = match prepared {
        Ok(new) => {
            describe(&new.integration_id, &new.capture_id);
            let submitted = services.outbox.submit(vec![NewCapture { room, ..new }]);
            let submitted = submitted.instrument(step("enqueue")).await;
            submitted.map_err(RelayError::from)
        }
        Err(error) => {
            if matches!(error, RelayError::OutOfScope) {
                let (name, rpc) = (Some(caller.name.as_str()), "CaptureStream");
                services.audit.refused(name, None, rpc, error.reason());
            }
            Err(error)
        }
    };
    Ok(InFlight {
        correlation_id,
        capture_id,
        submitted,
        metrics: services.metrics.clone(),
        integration_id,
    })
}

impl InFlight {
    /// The result, once the capture is durable or refused.
    async fn result(self) -> CaptureStreamResponse {
        let answer = match self.submitted {
            Ok(receipt) => match receipt.wait().instrument(step("group commit")).await {
                Ok(all) => all
                    .into_iter()
                    .next()
                    .map_or(Err(RelayError::Draining), accepted),
                Err(error) => Err(error.into()),
            },
            Err(error) => Err(error),
        };
        let code = answer.as_ref().map_or_else(RelayError::code, |_| Code::Ok);
        spans::answered(&Span::current(), code);
        if let Some(id) = &self.integration_id {
            tally(&self.metrics, id, std::iter::once(&answer));
        }
        CaptureStreamResponse {
            correlation_id: self.correlation_id,
            result: Some(capture_result(&self.capture_id, &answer)),
        }
    }
}

fn prepare(
    services: &Services,
    caller: &Caller,
    request: &CaptureStreamRequest,
    integration: Result<Arc<Integration>, RelayError>,
    capture: Option<Capture<'_>>,
) -> Result<NewCapture, RelayError> {
    if request.correlation_id.chars().count() > MAX_CORRELATION_CHARS {
        let rule = format!("at most {MAX_CORRELATION_CHARS} characters");
        return Err(RelayError::invalid("correlation_id", "TOO_LONG", rule));
    }
    let integration = integration?;
    services.usage.capture(caller, integration.id(), 1)?;
    services.prepare(&integration, capture)
}
