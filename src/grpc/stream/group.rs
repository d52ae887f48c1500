//! Captures of a stream that have come together: they are submitted in one command, become
//! durable together, and are answered together.

use std::{collections::BTreeMap, mem, sync::Arc};

use tokio::sync::OwnedSemaphorePermit;
use tonic::{Code, Status};
use tracing::Span;

use crate::{
    capture::Capture,
    grpc::{
        RelayError, Services,
        accept::{Accepted, accepted, again, capture_result, describe, echo_id, malformed, tally},
        spans::{self, StreamTrace},
        stale::is_stale,
    },
    integration::{Integration, IntegrationId},
    metrics::Metrics,
    outbox::{NewCapture, OutboxError, Submitted},
    permission::Caller,
    proto::{CaptureStreamResponse, raw::CaptureStreamRequest},
    text::first_chars,
    trace::step,
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
    /// Captures that break rules of an integration which another relay may have changed.
    doubtful: Vec<(Member, RelayError)>,
    /// Those of its captures, where other relays may change them: all captures of one are
    /// mapped with the same revision.
    pub(super) integrations: Vec<Arc<Integration>>,
}

/// A capture between its request and its result.
pub(super) struct Member {
    correlation_id: String,
    capture_id: String,
    /// Among all captures of its group.
    place: usize,
    /// Whose it is, where it is somebody's.
    integration_id: Option<IntegrationId>,
    /// Where the capture may have to be mapped again.
    request: Option<CaptureStreamRequest>,
    span: Span,
}

/// What the outbox has answered to a group.
#[derive(Default)]
pub(super) struct Answered {
    pub(super) answers: Vec<CaptureStreamResponse>,
    /// Captures to be mapped and submitted again, in their order.
    pub(super) stale: Vec<Member>,
}

impl Group {
    /// The integration of a request, if it is the caller's.
    pub(super) async fn integration(
        &mut self,
        services: &Services,
        caller: &Caller,
        id: &str,
    ) -> Result<Arc<Integration>, RelayError> {
        let known = self.integrations.iter().find(|one| one.id().name() == id);
        if let Some(known) = known {
            return Ok(Arc::clone(known));
        }
        let found = services.open_integration(caller, id).await?;
        if services.registry.is_shared() {
            self.integrations.push(Arc::clone(&found));
        }
        Ok(found)
    }

    /// Adds the capture of a request, with its room, or its refusal.
    ///
    /// # Errors
    /// The bytes are no capture.
    pub(super) fn add(
        &mut self,
        services: &Services,
        caller: &Caller,
        trace: &StreamTrace,
        request: CaptureStreamRequest,
        integration: Result<Arc<Integration>, RelayError>,
        room: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Status> {
        let span = spans::message(services.traces, trace);
        let _entered = span.enter();
        let capture = request.capture().map_err(malformed)?;
        let capture_id = capture.as_ref().map(echo_id).unwrap_or_default();
        let mut member = Member {
            correlation_id: first_chars(&request.correlation_id, MAX_CORRELATION_CHARS).to_owned(),
            capture_id,
            place: self.taken(),
            integration_id: integration.as_ref().ok().map(|found| found.id().clone()),
            request: None,
            span: span.clone(),
        };
        match prepare(services, caller, &request, integration, capture) {
            Ok(new) => {
                describe(&new.integration_id, &new.capture_id);
                self.captures.push(NewCapture { room, ..new });
                member.request = services.registry.is_shared().then_some(request);
                self.members.push(member);
            }
            Err(error @ RelayError::Capture(_)) if services.registry.is_shared() => {
                member.request = Some(request);
                self.doubtful.push((member, error));
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
        self.members.len() + self.refused.len() + self.doubtful.len()
    }

    /// Captures that are not answered yet.
    pub(super) fn len(&self) -> usize {
        self.members.len() + self.doubtful.len()
    }

    /// Refuses captures that break rules, unless another relay has changed the integration:
    /// then they are mapped again, like stale ones.
    pub(super) async fn settle_doubts(&mut self, services: &Services) {
        let mut changed = BTreeMap::new();
        for (member, error) in mem::take(&mut self.doubtful) {
            let Some(id) = member.integration_id.clone() else {
                continue;
            };
            if !changed.contains_key(&id) {
                let now = services.registry.confirm(&id).await;
                let now = now.ok().flatten().map(|now| now.revision.etag.clone());
                let used = self.integrations.iter().find(|used| *used.id() == id);
                changed.insert(
                    id.clone(),
                    used.map(|used| &used.revision.etag) != now.as_ref(),
                );
            }
            if changed[&id] {
                self.doubtful.push((member, error));
            } else {
                let refused = member.answer(Err(error), &services.metrics);
                self.refused.push(refused);
            }
        }
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
        Option<impl Future<Output = Answered> + use<>>,
    ) {
        if self.len() == 0 {
            return (self.refused, None);
        }
        let enqueued = steps(&self.members, "enqueue");
        let submitted = match self.members.is_empty() {
            true => None,
            false => Some(services.outbox.submit(self.captures).await),
        };
        drop(enqueued);
        let metrics = services.metrics.clone();
        let answers = async move {
            let committed = steps(&self.members, "group commit");
            let submitted = match submitted {
                Some(Ok(receipt)) => receipt.wait().await,
                Some(Err(error)) => Err(error),
                None => Ok(Vec::new()),
            };
            drop(committed);
            let mut answered = answers(self.members, submitted, &metrics);
            let doubtful = self.doubtful.into_iter().map(|(member, _)| member);
            answered.stale.extend(doubtful);
            answered.stale.sort_unstable_by_key(|member| member.place);
            answered
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
) -> Answered {
    let (mut submitted, error) = match submitted {
        Ok(all) => (all.into_iter(), RelayError::Draining),
        Err(error) => (Vec::new().into_iter(), error.into()),
    };
    let mut answered = Answered::default();
    answered.answers.reserve_exact(members.len());
    for member in members {
        // The outbox answers one for one.
        let answer = submitted.next().map(accepted);
        let answer = answer.unwrap_or_else(|| Err(error.clone()));
        if is_stale(&answer) && member.request.is_some() {
            answered.stale.push(member);
        } else {
            answered.answers.push(member.answer(answer, metrics));
        }
    }
    answered
}

/// Maps and submits stale captures again, in their order; one answer each.
pub(super) async fn submit_again(
    members: Vec<Member>,
    services: &Services,
) -> Vec<CaptureStreamResponse> {
    let stale = |_: &Member| Err(RelayError::IntegrationChanging);
    let mut answers: Vec<Accepted> = members.iter().map(stale).collect();
    let owner = |place: usize| members[place].integration_id.clone();
    let map = |place: usize, current: &Integration| {
        let Member { request, span, .. } = &members[place];
        let capture = request.as_ref().map(CaptureStreamRequest::capture);
        let capture = again(capture.transpose())?.flatten();
        span.in_scope(|| services.prepare(current, capture))
    };
    services
        .submit_again(answers.iter_mut().collect(), owner, map)
        .await;
    let answered = members.into_iter().zip(answers);
    answered
        .map(|(member, answer)| member.answer(answer, &services.metrics))
        .collect()
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
