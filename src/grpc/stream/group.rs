//! Captures of a stream that have come together: they are submitted in one command, become
//! durable together, and are answered together.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tonic::{Code, Status};
use tracing::Span;

use crate::{
    capture::Capture,
    grpc::{
        RelayError, Services,
        accept::{Accepted, accepted, capture_result, describe, echo_id, malformed, tally},
        spans,
    },
    integration::{Integration, IntegrationId},
    metrics::Metrics,
    outbox::{NewCapture, OutboxError, Submitted},
    permission::Caller,
    proto::{CaptureStreamResponse, raw::CaptureStreamRequest},
    text::first_chars,
    trace::{TraceLink, step},
};

/// Captures of a group at the most: a fraction of a millisecond of work.
pub(super) const MAX_GROUP: usize = 32;
/// Longest correlation id, in characters.
const MAX_CORRELATION_CHARS: usize = 256;

/// See the module's description.
#[derive(Default)]
pub(super) struct Group {
    captures: Vec<NewCapture>,
    /// For each of the captures, in their order.
    members: Vec<Member>,
    refused: Vec<CaptureStreamResponse>,
}

/// A capture between its request and its result.
struct Member {
    correlation_id: String,
    capture_id: String,
    /// Whose it is, where it is somebody's.
    integration_id: Option<IntegrationId>,
    span: Span,
}

impl Group {
    /// Adds the capture of a request, with its room, or its refusal.
    ///
    /// # Errors
    /// The bytes are no capture.
    pub(super) fn add(
        &mut self,
        services: &Services,
        caller: &Caller,
        stream: Option<TraceLink>,
        request: CaptureStreamRequest,
        room: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Status> {
        let span = spans::message(services.traces, stream);
        let _entered = span.enter();
        let capture = request.capture().map_err(malformed)?;
        let capture_id = capture.as_ref().map(echo_id).unwrap_or_default();
        let integration = services.integration(caller, &request.integration_id);
        let member = Member {
            correlation_id: first_chars(&request.correlation_id, MAX_CORRELATION_CHARS).to_owned(),
            capture_id,
            integration_id: integration.as_ref().ok().map(|found| found.id().clone()),
            span: span.clone(),
        };
        match prepare(services, caller, &request, integration, capture) {
            Ok(new) => {
                describe(&new.integration_id, &new.capture_id);
                self.captures.push(NewCapture { room, ..new });
                self.members.push(member);
            }
            Err(error) => {
                if matches!(error, RelayError::OutOfScope) {
                    let (name, rpc) = (Some(caller.name.as_str()), "CaptureStream");
                    services.audit.refused(name, None, rpc, error.reason());
                }
                self.refused
                    .push(member.answer(Err(error), &services.metrics));
            }
        }
        Ok(())
    }

    /// Requests that it has taken.
    pub(super) fn taken(&self) -> usize {
        self.members.len() + self.refused.len()
    }

    /// Captures that are to be submitted.
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Hands the captures to the outbox. Comes back with the answers to those that were
    /// refused, and with a future of the others' answers, one for each, where there are others.
    ///
    /// There is no other way to the refusals: a client that does not read them must not keep
    /// the room of captures that were not handed over.
    pub(super) async fn submit(
        self,
        services: &Services,
    ) -> (
        Vec<CaptureStreamResponse>,
        Option<impl Future<Output = Vec<CaptureStreamResponse>> + use<>>,
    ) {
        if self.members.is_empty() {
            return (self.refused, None);
        }
        let enqueued = steps(&self.members, "enqueue");
        let submitted = services.outbox.submit(self.captures).await;
        drop(enqueued);
        let metrics = services.metrics.clone();
        let answers = async move {
            let committed = steps(&self.members, "group commit");
            let submitted = match submitted {
                Ok(receipt) => receipt.wait().await,
                Err(error) => Err(error),
            };
            drop(committed);
            answers(self.members, submitted, &metrics)
        };
        (self.refused, Some(answers))
    }
}

/// A step of each capture that is traced.
fn steps(members: &[Member], name: &'static str) -> Vec<Span> {
    let spans = members.iter().map(|member| &member.span);
    let traced = spans.filter(|span| !span.is_disabled());
    traced.map(|span| span.in_scope(|| step(name))).collect()
}

/// What is said of captures after what the outbox says of them.
fn answers(
    members: Vec<Member>,
    submitted: Result<Vec<Submitted>, OutboxError>,
    metrics: &Metrics,
) -> Vec<CaptureStreamResponse> {
    let (mut submitted, error) = match submitted {
        Ok(all) => (all.into_iter(), RelayError::Draining),
        Err(error) => (Vec::new().into_iter(), error.into()),
    };
    let members = members.into_iter();
    // The outbox answers one for one.
    let answers = members.map(|member| {
        let answer = submitted.next().map(accepted);
        member.answer(answer.unwrap_or_else(|| Err(error.clone())), metrics)
    });
    answers.collect()
}

impl Member {
    fn answer(self, answer: Accepted, metrics: &Metrics) -> CaptureStreamResponse {
        let code = answer.as_ref().map_or_else(RelayError::code, |_| Code::Ok);
        spans::answered(&self.span, code);
        if let Some(id) = &self.integration_id {
            tally(metrics, id, std::iter::once(&answer));
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
