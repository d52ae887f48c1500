//! SegmentRelay: captures in, status out.

use std::{sync::Arc, time::Duration};

use prost::Message;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

use super::{
    RelayError, Services,
    accept::{
        Accepted, accepted, again, capture_result, check_access, describe, echo_id, malformed,
        pass, required, tally,
    },
    convert,
    pieces::in_pieces,
    spans::StreamTrace,
    stream, watch,
};
use crate::{
    capture::{self, Capture},
    event::{self, EventType, message_id},
    intake,
    integration::Integration,
    mapping::{self, CaptureFault, MAX_CAPTURE_ID_CHARS},
    outbox::NewCapture,
    proto::{
        self, CaptureBatchResponse, CaptureResponse, CaptureStreamResponse, GetCaptureRequest,
        GetCaptureResponse, PreviewCaptureRequest, PreviewCaptureResponse, PreviewedEvent, WaitFor,
        WatchDeliveriesRequest, WatchDeliveriesResponse,
        raw::{CaptureBatchRequest, CaptureRequest, CaptureStreamRequest},
        server::segment_relay_server::SegmentRelay,
    },
    status::CaptureRecord,
    text::first_chars,
    time::UnixMillis,
    trace::{TraceLink, number, step},
};

/// Captures of one batch at the most.
const MAX_BATCH: usize = 1_000;
/// Share of the time to the deadline that is kept for the way back: a tenth,
/// within these bounds.
const ANSWER_MARGIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

pub(super) struct Relay(pub(super) Services);

#[tonic::async_trait]
impl SegmentRelay for Relay {
    async fn capture(
        &self,
        request: Request<CaptureRequest>,
    ) -> Result<Response<CaptureResponse>, Status> {
        let (caller, _permit) = self.0.enter(&request)?;
        let deadline = pass(&request)?.deadline;
        let request = request.into_inner();
        let capture = request.capture().map_err(malformed)?;
        let wait_for = wait_for(request.wait_for)?;
        let integration = self
            .0
            .open_integration(&caller, &request.integration_id)
            .await?;
        self.0.usage.capture(&caller, integration.id(), 1)?;
        let answer = self.accept(&integration, &request, capture).await;
        tally(&self.0.metrics, integration.id(), std::iter::once(&answer));
        let (mut record, duplicate) = answer?;
        if wait_for == WaitFor::Delivered {
            record = self.until_final(record, self.answer_by(deadline)).await?;
        }
        let result = Some(convert::capture_result(&record, duplicate));
        Ok(Response::new(CaptureResponse { result }))
    }

    async fn capture_batch(
        &self,
        request: Request<CaptureBatchRequest>,
    ) -> Result<Response<CaptureBatchResponse>, Status> {
        let (caller, _permit) = self.0.enter(&request)?;
        let deadline = pass(&request)?.deadline;
        let request = request.into_inner();
        let captures = request.captures().map_err(malformed)?;
        let wait_for = wait_for(request.wait_for)?;
        if captures.is_empty() || captures.len() > MAX_BATCH {
            let rule = format!("1 to {MAX_BATCH} captures; split a larger batch");
            return Err(RelayError::invalid("captures", "OUT_OF_RANGE", rule).into());
        }
        let integration = self
            .0
            .open_integration(&caller, &request.integration_id)
            .await?;
        let count = captures.len();
        Span::current()
            .record("segment_relay.integration_id", integration.id().name())
            .record("segment_relay.captures", number(count));
        self.0.usage.capture(&caller, integration.id(), count)?;
        let mut answers = self.accept_batch(&integration, captures).await?;
        if answers.iter().any(|(_, answer)| self.0.maps_again(answer)) {
            self.accept_again(&integration, &request, &mut answers)
                .await;
        }
        let outcomes = answers.iter().map(|(_, answer)| answer);
        tally(&self.0.metrics, integration.id(), outcomes);
        if wait_for == WaitFor::Delivered {
            let deadline = self.answer_by(deadline);
            for (record, _) in answers.iter_mut().flat_map(|answer| &mut answer.1) {
                *record = self.until_final(Arc::clone(record), deadline).await?;
            }
        }
        let results = answers
            .iter()
            .map(|(id, answer)| capture_result(id, answer))
            .collect();
        Ok(Response::new(CaptureBatchResponse { results }))
    }

    type CaptureStreamStream = ReceiverStream<Result<CaptureStreamResponse, Status>>;

    async fn capture_stream(
        &self,
        request: Request<Streaming<CaptureStreamRequest>>,
    ) -> Result<Response<Self::CaptureStreamStream>, Status> {
        let (caller, permit) = self.0.enter(&request)?;
        let headers = request.metadata().clone().into_headers();
        Ok(Response::new(stream::serve(
            self.0.clone(),
            caller,
            StreamTrace::current(&headers),
            request.into_inner(),
            permit,
        )))
    }

    async fn preview_capture(
        &self,
        request: Request<PreviewCaptureRequest>,
    ) -> Result<Response<PreviewCaptureResponse>, Status> {
        let (caller, _permit) = self.0.enter(&request)?;
        let held = Arc::clone(&pass(&request)?.bytes);
        let request = request.into_inner();
        let id = &request.integration_id;
        check_access(&caller, id)?;
        let found = self.0.registry.find_stored_open(id).await;
        let integration = found.map_err(RelayError::from)?;
        let capture = required(request.capture)?;
        // It costs what a capture costs, but for the disk.
        self.0.usage.capture(&caller, integration.id(), 1)?;
        let answer = match preview(&integration, &capture) {
            Ok(events) => PreviewCaptureResponse {
                events,
                violations: Vec::new(),
            },
            Err(CaptureFault::Invalid(found)) => PreviewCaptureResponse {
                events: Vec::new(),
                violations: found.into_iter().map(Into::into).collect(),
            },
            Err(other) => return Err(RelayError::from(other).into()),
        };
        self.0.usage.hold_answer(&held, answer.encoded_len())?;
        Ok(Response::new(answer))
    }

    async fn get_capture(
        &self,
        request: Request<GetCaptureRequest>,
    ) -> Result<Response<GetCaptureResponse>, Status> {
        let (caller, _permit) = self.0.enter(&request)?;
        let request = request.into_inner();
        let integration = self.0.integration(&caller, &request.integration_id).await?;
        let id = request.capture_id;
        if id.is_empty() {
            return Err(RelayError::invalid("capture_id", "REQUIRED", "name the capture").into());
        }
        let found = self
            .0
            .outbox
            .find(integration.id(), &id)
            .await
            .map_err(RelayError::from)?;
        let record = found.ok_or_else(|| {
            RelayError::CaptureNotFound(first_chars(&id, MAX_CAPTURE_ID_CHARS).to_owned())
        })?;
        Ok(Response::new(GetCaptureResponse {
            result: Some(convert::capture_result(&record, false)),
            attempts: convert::attempts(&record),
        }))
    }

    type WatchDeliveriesStream = ReceiverStream<Result<WatchDeliveriesResponse, Status>>;

    async fn watch_deliveries(
        &self,
        request: Request<WatchDeliveriesRequest>,
    ) -> Result<Response<Self::WatchDeliveriesStream>, Status> {
        let caller = Arc::clone(&pass(&request)?.caller);
        // What is wrong with the request is said before what there is too much of.
        let filter = watch::Filter::new(&self.0, &caller, request.get_ref()).await?;
        let own = self.0.usage.enter_watcher(&caller)?;
        let place = self.0.gate.enter_watcher()?;
        Ok(Response::new(watch::serve(&self.0, filter, (own, place))))
    }
}

impl Relay {
    /// Validates and stores one capture.
    async fn accept(
        &self,
        integration: &Integration,
        request: &CaptureRequest,
        capture: Option<Capture<'_>>,
    ) -> Accepted {
        let mut answer = match self.0.prepare(integration, capture) {
            Ok(new) => {
                describe(integration.id(), &new.capture_id);
                let submitted = self.0.enqueue(vec![new]).await?;
                let submitted = submitted.into_iter().next();
                submitted.map_or(Err(RelayError::Draining), accepted)
            }
            Err(error) => Err(error),
        };
        if self.0.maps_again(&answer) {
            let owner = |_| Some(integration.id().clone());
            let map = |_, current: &Integration| self.0.prepare(current, again(request.capture())?);
            let stale = vec![&mut answer];
            Box::pin(self.0.submit_again(stale, owner, map)).await;
        }
        answer
    }

    /// Maps captures of a batch again.
    async fn accept_again(
        &self,
        integration: &Integration,
        request: &CaptureBatchRequest,
        answers: &mut [(String, Accepted)],
    ) {
        let trace = TraceLink::current();
        let map = |place: usize, current: &Integration| {
            let capture = again(capture::decode([&*request.captures[place]]))?;
            let new = intake::prepare(current, capture, UnixMillis::now())?;
            let trace = trace.clone();
            Ok(NewCapture { trace, ..new })
        };
        let owner = |_| Some(integration.id().clone());
        let answers = answers.iter_mut().map(|(_, answer)| answer).collect();
        Box::pin(self.0.submit_again(answers, owner, map)).await;
    }

    /// Each capture of a batch with its id; those that can't be taken fail alone.
    async fn accept_batch(
        &self,
        integration: &Integration,
        captures: Vec<Capture<'_>>,
    ) -> Result<Vec<(String, Accepted)>, RelayError> {
        let mut answers = Vec::with_capacity(captures.len());
        let mut taken = Vec::with_capacity(captures.len());
        let trace = TraceLink::current();
        // One step for all of them: a trace of thousands of steps tells nobody anything.
        let prepared = in_pieces(captures, |capture| {
            let id = echo_id(&capture);
            let new = self.0.find_room(integration, &capture).and_then(|()| {
                let new = intake::prepare(integration, capture, UnixMillis::now());
                new.map_err(RelayError::from)
            });
            match new {
                Ok(new) => {
                    answers.push((id, None));
                    let trace = trace.clone();
                    taken.push(NewCapture { trace, ..new });
                }
                Err(error) => answers.push((id, Some(Err(error)))),
            }
        });
        prepared.instrument(step("validate and map")).await;
        let submitted = if taken.is_empty() {
            Vec::new()
        } else {
            self.0.enqueue(taken).await?
        };
        let mut submitted = submitted.into_iter();
        let filled = answers.into_iter().map(|(id, answer)| {
            // The outbox answers one for one.
            let answer = answer.or_else(|| submitted.next().map(accepted));
            (id, answer.unwrap_or(Err(RelayError::Draining)))
        });
        Ok(filled.collect())
    }

    /// Until when a call waits for its events that has to be answered until `deadline`.
    fn answer_by(&self, deadline: Instant) -> Instant {
        let now = Instant::now();
        let left = deadline.saturating_duration_since(now);
        let (least, most) = ANSWER_MARGIN;
        let margin = (left / 10).clamp(least, most);
        now + left.saturating_sub(margin).min(self.0.limits.max_wait)
    }

    /// The record once both events are final; the state so far where the
    /// deadline is near or the relay drains.
    async fn until_final(
        &self,
        mut record: Arc<CaptureRecord>,
        deadline: Instant,
    ) -> Result<Arc<CaptureRecord>, RelayError> {
        let signals = self.0.outbox.signals();
        let expectation = signals.expect(&record.integration_id, &record.capture_id);
        while !record.is_final() {
            let change = expectation.next_change();
            let current = self
                .0
                .outbox
                .find(&record.integration_id, &record.capture_id)
                .await?;
            let Some(current) = current else { break };
            record = Arc::new(current);
            if record.is_final() {
                break;
            }
            tokio::select! {
                () = change => {}
                () = tokio::time::sleep_until(deadline) => break,
                () = self.0.gate.draining() => break,
            }
        }
        // What happened until the deadline belongs to the answer.
        if !record.is_final() {
            let current = self
                .0
                .outbox
                .find(&record.integration_id, &record.capture_id)
                .await?;
            record = current.map_or(record, Arc::new);
        }
        Ok(record)
    }
}

fn wait_for(value: i32) -> Result<WaitFor, RelayError> {
    WaitFor::try_from(value).map_err(|_| {
        let rule = "WAIT_FOR_ACCEPTED or WAIT_FOR_DELIVERED";
        RelayError::invalid("wait_for", "UNKNOWN_VALUE", rule)
    })
}

fn preview(
    integration: &Integration,
    capture: &proto::Capture,
) -> Result<Vec<PreviewedEvent>, CaptureFault> {
    let mapped = mapping::map(integration, capture.into(), UnixMillis::now())?;
    let events = event::build(integration.id(), &mapped).map_err(CaptureFault::Invalid)?;
    let Some(events) = events.filter(|_| integration.enabled) else {
        return Ok(Vec::new());
    };
    let previewed = EventType::ALL.map(|event| PreviewedEvent {
        r#type: event.to_proto().into(),
        message_id: message_id(integration.id(), &mapped.capture_id, event),
        json: String::from_utf8_lossy(events.get(event)).into_owned(),
    });
    Ok(previewed.into())
}
