//! What the capturing rpcs have in common: from a request's capture to what is
//! stored, and from the outbox's answer to a result.

use std::{collections::BTreeMap, sync::Arc};

use tonic::{Request, Status};
use tracing::{Instrument, Span};

use super::{RelayError, Services, access::Pass, convert, gate::Place};
use crate::{
    auth::AuthError,
    capture::{Capture, Malformed},
    event::EventType,
    intake,
    integration::{Integration, IntegrationId},
    mapping::{self, MAX_CAPTURE_ID_CHARS},
    metrics::Metrics,
    outbox::{NewCapture, Submitted},
    permission::Caller,
    proto::CaptureResult,
    status::CaptureRecord,
    text::first_chars,
    time::UnixMillis,
    trace::{TraceLink, step},
};

/// What became of one capture of a request: its record, and whether it is a duplicate.
pub(super) type Accepted = Result<(Arc<CaptureRecord>, bool), RelayError>;

impl Services {
    /// Lets a call in for as long as it has its place, and says whose it is. Where many
    /// bytes may come, it has its place already.
    pub(super) fn enter<T>(
        &self,
        request: &Request<T>,
    ) -> Result<(Arc<Caller>, Place), RelayError> {
        let pass = pass(request)?;
        let place = match &pass.place {
            Some(place) => place.clone(),
            None => self.gate.enter(pass.turn.clone())?,
        };
        Ok((Arc::clone(&pass.caller), place))
    }

    /// The integration of a request, if it is the caller's.
    pub(super) async fn integration(
        &self,
        caller: &Caller,
        id: &str,
    ) -> Result<Arc<Integration>, RelayError> {
        check_access(caller, id)?;
        Ok(self.registry.find(id).await?)
    }

    /// The integration of a capture, if it is the caller's and takes captures.
    pub(super) async fn open_integration(
        &self,
        caller: &Caller,
        id: &str,
    ) -> Result<Arc<Integration>, RelayError> {
        check_access(caller, id)?;
        Ok(self.registry.find_open(id).await?)
    }

    /// Validates a capture and builds its events.
    pub(super) fn prepare(
        &self,
        integration: &Integration,
        capture: Option<Capture<'_>>,
    ) -> Result<NewCapture, RelayError> {
        let (capture, received) = (required(capture)?, UnixMillis::now());
        self.find_room(integration, &capture)?;
        let trace = TraceLink::current();
        let digest = intake::digest(&capture);
        let mapped = step("validate").in_scope(|| mapping::map(integration, capture, received))?;
        let new = step("map").in_scope(|| intake::assemble(integration, mapped, digest, received));
        Ok(NewCapture { trace, ..new? })
    }

    /// Refuses a new capture for which there is certainly no room, unread: while the
    /// backlog is full, building events for nothing would be most of what the relay does.
    /// One that has nothing to send needs no room.
    pub(super) fn find_room(
        &self,
        integration: &Integration,
        capture: &Capture<'_>,
    ) -> Result<(), RelayError> {
        if capture.email.is_empty() || !integration.enabled {
            return Ok(());
        }
        let id = integration.id();
        match self.outbox.full(id) {
            Some(quota) if !self.outbox.may_know(id, &mapping::capture_id(capture)) => {
                Err(RelayError::Full(quota))
            }
            _ => Ok(()),
        }
    }

    /// Stores captures; one answer each, in their order.
    pub(super) async fn enqueue(
        &self,
        captures: Vec<NewCapture>,
    ) -> Result<Vec<Submitted>, RelayError> {
        let stored = async {
            let receipt = self.outbox.submit(captures).await?;
            Ok(receipt.wait().instrument(step("group commit")).await?)
        };
        stored.instrument(step("enqueue")).await
    }
}

/// Whether a caller may touch the integration of a request. First: no caller learns
/// which integrations others have.
pub(super) fn check_access(caller: &Caller, id: &str) -> Result<(), RelayError> {
    if id.is_empty() {
        let rule = "name the integration";
        return Err(RelayError::invalid("integration_id", "REQUIRED", rule));
    }
    if !caller.may_touch(id) {
        return Err(RelayError::OutOfScope);
    }
    Ok(())
}

/// Says on the call's span what it is about.
pub(super) fn describe(integration: &IntegrationId, capture_id: &str) {
    Span::current()
        .record("segment_relay.integration_id", integration.name())
        .record("segment_relay.capture_id", capture_id);
}

/// What is known of a call that was let in.
pub(super) fn pass<T>(request: &Request<T>) -> Result<&Pass, RelayError> {
    let pass = request.extensions().get::<Pass>();
    pass.ok_or(RelayError::Unauthenticated(AuthError::Missing))
}

/// The outbox's answer as the contract has it.
pub(super) fn accepted(submitted: Submitted) -> Accepted {
    match submitted {
        Submitted::Accepted(record) => Ok((record, false)),
        Submitted::Duplicate(record) => Ok((record, true)),
        Submitted::Conflict => Err(RelayError::CaptureIdReused),
        Submitted::Full(quota) => Err(RelayError::Full(quota)),
        Submitted::Stale => Err(RelayError::IntegrationChanging),
    }
}

/// Counts what became of captures: accepted, duplicates, and refusals by their reason.
pub(super) fn tally<'a>(
    metrics: &Metrics,
    integration: &IntegrationId,
    answers: impl Iterator<Item = &'a Accepted>,
) {
    if !metrics.are_read() {
        return;
    }
    let mut outcomes: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut queued = 0;
    for answer in answers {
        let outcome = match answer {
            Ok((_, true)) => "duplicate",
            Ok((record, false)) => {
                queued += u64::from(!record.is_final());
                "accepted"
            }
            Err(error) => error.reason(),
        };
        *outcomes.entry(outcome).or_default() += 1;
    }
    for (outcome, count) in outcomes {
        metrics.captures(integration, outcome, count);
    }
    if queued > 0 {
        for event in EventType::ALL {
            metrics.events(integration, event.name(), "queued", "", queued);
        }
    }
}

/// One result of a batch or a stream.
pub(super) fn capture_result(id: &str, answer: &Accepted) -> CaptureResult {
    match answer {
        Ok((record, duplicate)) => convert::capture_result(record, *duplicate),
        Err(error) => CaptureResult {
            capture_id: id.to_owned(),
            error: Some(error.to_capture_error()),
            ..CaptureResult::default()
        },
    }
}

/// The id that a refused capture is answered with, of bounded length.
pub(super) fn echo_id(capture: &Capture<'_>) -> String {
    first_chars(&mapping::capture_id(capture), MAX_CAPTURE_ID_CHARS).to_owned()
}

pub(super) fn required<T>(capture: Option<T>) -> Result<T, RelayError> {
    capture.ok_or_else(|| RelayError::invalid("capture", "REQUIRED", "give the capture"))
}

/// A capture that is read from its request once more.
pub(super) fn again<T>(capture: Result<T, Malformed>) -> Result<T, RelayError> {
    capture.map_err(|error| RelayError::invalid("capture", "MALFORMED", error.to_string()))
}

/// What bytes that are no message are refused with.
pub(super) fn malformed(error: Malformed) -> Status {
    RelayError::Malformed(error.to_string()).into()
}
