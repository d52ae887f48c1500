//! The one place where the relay's errors become gRPC statuses.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::Throttle;
use crate::{
    auth::AuthError,
    mapping::CaptureFault,
    outbox::{OutboxError, Quota},
    permission::Permission,
    proto,
    registry::RegistryError,
    violation::Violation,
};

/// `domain` of every ErrorInfo.
const DOMAIN: &str = "segment-relay.jebbit.com";
/// When to try again what is refused for now.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Details travel in a header, which clients bound (grpc-core: 8 KiB by
/// default, in base64): so much is filled with violations.
const MAX_DETAIL_BYTES: usize = 4_096;

/// Why a call failed.
#[derive(Clone, Debug)]
pub enum RelayError {
    /// The request breaks the schema's rules.
    InvalidRequest(Vec<Violation>),
    /// The capture breaks the schema's or the mapping's rules.
    Capture(CaptureFault),
    /// Its id was used for other content.
    CaptureIdReused,
    /// There is no such capture.
    CaptureNotFound(String),
    /// There is no room in the backlog.
    Full(Quota),
    /// More calls than the relay takes at once.
    Busy(&'static str),
    /// The relay is shutting down.
    Draining,
    /// The store failed.
    Outbox(OutboxError),
    /// It failed in the middle of a long change.
    PartlyDone {
        /// Events that were changed.
        events: u64,
        /// What was done with them.
        action: &'static str,
        /// Why it ended.
        cause: OutboxError,
    },
    /// Other relays keep changing the integration, or it moves to another database.
    IntegrationChanging,
    /// The integrations' store refused.
    Registry(RegistryError),
    /// Nobody knows who calls.
    Unauthenticated(AuthError),
    /// The caller lacks what the rpc needs.
    PermissionMissing(Permission),
    /// The integration is none of the caller's.
    OutOfScope,
    /// A caller, an integration or the relay uses as much as it may.
    Throttled(Throttle),
    /// The call was not answered in its time.
    DeadlineExceeded,
    /// Health was asked for of a service that is not watched.
    UnknownService,
    /// There is no such rpc; its path.
    UnknownRpc(String),
    /// A message is larger than may be.
    MessageTooLarge(String),
    /// The bytes are no message.
    Malformed(String),
    /// A message is compressed in a way that is not taken.
    Compressed(String),
    /// A message says that it is compressed, and the call does not say how.
    CompressedFlag(String),
}

impl From<CaptureFault> for RelayError {
    fn from(fault: CaptureFault) -> Self {
        Self::Capture(fault)
    }
}

impl From<OutboxError> for RelayError {
    fn from(error: OutboxError) -> Self {
        Self::Outbox(error)
    }
}

impl From<RegistryError> for RelayError {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Invalid(found) => Self::InvalidRequest(found),
            RegistryError::Outbox(error) => Self::Outbox(error),
            other => Self::Registry(other),
        }
    }
}

impl RelayError {
    /// One rule that one field of a request breaks.
    pub(super) fn invalid(
        field: &str,
        reason: &'static str,
        description: impl Into<String>,
    ) -> Self {
        let (field, description) = (field.to_owned(), description.into());
        Self::InvalidRequest(vec![Violation {
            field,
            reason,
            description,
        }])
    }

    /// The gRPC code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::InvalidRequest(_)
            | Self::Capture(CaptureFault::Invalid(_))
            | Self::Malformed(_) => Code::InvalidArgument,
            Self::UnknownRpc(_) | Self::Compressed(_) => Code::Unimplemented,
            Self::CompressedFlag(_) => Code::Internal,
            Self::Capture(_) => Code::FailedPrecondition,
            Self::CaptureIdReused => Code::AlreadyExists,
            Self::CaptureNotFound(_) | Self::UnknownService => Code::NotFound,
            Self::Full(_) | Self::Busy(_) | Self::Throttled(_) | Self::MessageTooLarge(_) => {
                Code::ResourceExhausted
            }
            Self::Draining
            | Self::Outbox(_)
            | Self::PartlyDone { .. }
            | Self::IntegrationChanging => Code::Unavailable,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::Unauthenticated(AuthError::NoKeys) => Code::Unavailable,
            Self::Unauthenticated(_) => Code::Unauthenticated,
            Self::PermissionMissing(_) | Self::OutOfScope => Code::PermissionDenied,
            Self::Registry(error) => match error {
                RegistryError::NotFound(_) | RegistryError::Removed(_) => Code::NotFound,
                RegistryError::Exists(_) => Code::AlreadyExists,
                RegistryError::TooMany(_) => Code::ResourceExhausted,
                RegistryError::StaleEtag(_) => Code::Aborted,
                RegistryError::ReadOnly(_) | RegistryError::EventsWaiting { .. } => {
                    Code::FailedPrecondition
                }
                RegistryError::Invalid(_) => Code::InvalidArgument,
                RegistryError::Outbox(_) => Code::Unavailable,
            },
        }
    }

    /// The stable word for programs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidRequest(_) => "INVALID_REQUEST",
            Self::Capture(CaptureFault::Invalid(_)) => "INVALID_CAPTURE",
            Self::Capture(CaptureFault::RegionNotConfigured(_)) => "REGION_NOT_CONFIGURED",
            Self::Capture(CaptureFault::RegionAmbiguous) => "REGION_AMBIGUOUS",
            Self::CaptureIdReused => "CAPTURE_ID_REUSED",
            Self::CaptureNotFound(_) => "CAPTURE_NOT_FOUND",
            Self::Full(Quota::Events | Quota::Bytes) => "BACKLOG_FULL",
            Self::Full(_) => "INTEGRATION_BACKLOG_FULL",
            Self::Busy(_) => "TOO_MANY_CALLS",
            Self::Draining => "DRAINING",
            Self::Outbox(cause) | Self::PartlyDone { cause, .. } => match cause {
                OutboxError::OutcomeUnknown(_) => "OUTCOME_UNKNOWN",
                _ => "OUTBOX_UNAVAILABLE",
            },
            Self::IntegrationChanging => "INTEGRATION_CHANGING",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::Unauthenticated(error) => error.reason(),
            Self::PermissionMissing(_) => "PERMISSION_MISSING",
            Self::OutOfScope => "INTEGRATION_OUT_OF_SCOPE",
            Self::UnknownService => "SERVICE_UNKNOWN",
            Self::UnknownRpc(_) => "RPC_UNKNOWN",
            Self::MessageTooLarge(_) => "MESSAGE_TOO_LARGE",
            Self::Malformed(_) | Self::CompressedFlag(_) => "MALFORMED_MESSAGE",
            Self::Compressed(_) => "COMPRESSION_UNSUPPORTED",
            Self::Throttled(throttle) => match throttle.subject {
                "caller" => "CALLER_LIMIT",
                "integration" => "INTEGRATION_LIMIT",
                "connection" => "CONNECTION_LIMIT",
                _ => "RELAY_LIMIT",
            },
            Self::Registry(error) => match error {
                RegistryError::NotFound(_) | RegistryError::Removed(_) => "INTEGRATION_NOT_FOUND",
                RegistryError::Exists(_) => "INTEGRATION_EXISTS",
                RegistryError::TooMany(_) => "TOO_MANY_INTEGRATIONS",
                RegistryError::StaleEtag(_) => "STALE_ETAG",
                RegistryError::ReadOnly(_) => "INTEGRATION_READ_ONLY",
                RegistryError::EventsWaiting { .. } => "EVENTS_WAITING",
                RegistryError::Invalid(_) => "INVALID_REQUEST",
                RegistryError::Outbox(_) => "OUTBOX_UNAVAILABLE",
            },
        }
    }

    /// What is wrong and what to do, for people.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::InvalidRequest(found) | Self::Capture(CaptureFault::Invalid(found)) => {
                match found.as_slice() {
                    [one] if one.field.is_empty() => one.description.clone(),
                    [one] => format!("{}: {}", one.field, one.description),
                    [first, rest @ ..] => format!(
                        "{}: {} (violations: {}, see the details)",
                        first.field,
                        first.description,
                        rest.len() + 1
                    ),
                    [] => "the request is invalid".to_owned(),
                }
            }
            Self::Capture(CaptureFault::RegionNotConfigured(region)) => format!(
                "the integration has no write key for the {region} region; add one, or name the \
                 region that it has"
            ),
            Self::Capture(CaptureFault::RegionAmbiguous) => {
                "the integration has both regions; name one in capture.data_region".to_owned()
            }
            Self::CaptureIdReused => "this capture_id was used for other content; \
                use a new capture_id for new content"
                .to_owned(),
            Self::CaptureNotFound(_) => {
                "there is no capture of this id in the integration, or it is forgotten by now"
                    .to_owned()
            }
            Self::Full(quota) => format!(
                "{}; nothing was stored, try again later",
                quota_text(*quota)
            ),
            Self::Busy(what) => format!("too many {what} at once; try again later"),
            Self::Draining => "the relay is shutting down; try again elsewhere".to_owned(),
            Self::Outbox(OutboxError::OutcomeUnknown(_)) => {
                "the outbox did not answer in time; the request may have been applied: repeat \
                it, captures with the same capture_id"
                    .to_owned()
            }
            Self::IntegrationChanging => {
                "the integration is being changed; nothing was changed by this call, try again"
                    .to_owned()
            }
            Self::Outbox(_) => {
                "the outbox cannot be read or written now; nothing was changed, try again later"
                    .to_owned()
            }
            Self::PartlyDone {
                events,
                action,
                cause,
            } => {
                let unknown = matches!(cause, OutboxError::OutcomeUnknown(_));
                let more = if unknown { ", and perhaps more" } else { "" };
                format!(
                    "{events} events were {action}{more}, then the outbox failed; repeat the call \
                     for the rest"
                )
            }
            Self::Registry(error) => error.to_string(),
            Self::Unauthenticated(error) => error.to_string(),
            Self::PermissionMissing(permission) => format!(
                "this caller lacks the permission `{permission}`; whoever runs the relay can give it"
            ),
            Self::OutOfScope => {
                "this caller may not touch this integration; name one that it may, \
                or have whoever runs the relay add it"
                    .to_owned()
            }
            Self::Throttled(throttle) => format!(
                "too many {}; nothing was done, try again after {:.1} s",
                throttle.what,
                throttle.wait.as_secs_f64()
            ),
            Self::UnknownRpc(path) => {
                format!("there is no rpc {path}; reflection lists those that there are")
            }
            Self::MessageTooLarge(why) => {
                format!("{why}; send smaller messages, or raise [server] max_message_bytes")
            }
            Self::Malformed(why) => {
                format!("the request is no message of this rpc: {why}; use the schema in proto/")
            }
            Self::Compressed(why) => format!("{why}; gzip and identity are taken"),
            Self::CompressedFlag(why) => why.clone(),
            Self::UnknownService => format!(
                "health is known of \"\" and of \"{}\" alone",
                super::RELAY_SERVICE
            ),
            Self::DeadlineExceeded => {
                "the call was not answered in its time (its own deadline, or \
                [server] request_timeout_ms); what it asked for may have been done: call again, \
                captures with the same capture_id"
                    .to_owned()
            }
        }
    }

    /// What a call fails with.
    #[must_use]
    pub fn to_status(&self) -> Status {
        let mut details = ErrorDetails::new();
        details.set_error_info(self.reason(), DOMAIN, HashMap::new());
        match self {
            Self::InvalidRequest(found) | Self::Capture(CaptureFault::Invalid(found)) => {
                details.set_bad_request(bounded(found));
            }
            Self::CaptureNotFound(id) => {
                details.set_resource_info("capture", id.as_str(), "", self.message());
            }
            Self::Registry(RegistryError::NotFound(id)) => {
                details.set_resource_info("integration", id.as_str(), "", self.message());
            }
            Self::Registry(RegistryError::Removed(id)) => {
                details.set_resource_info("integration", id.name(), "", self.message());
            }
            Self::Full(quota) => {
                details.set_retry_info(Some(RETRY_DELAY));
                let subject = match quota {
                    Quota::Events | Quota::Bytes => "relay",
                    Quota::IntegrationEvents | Quota::IntegrationBytes => "integration",
                };
                details.add_quota_failure_violation(subject, quota_text(*quota));
            }
            Self::Registry(RegistryError::TooMany(_)) => {
                let what = "integrations ([limits] max_integrations)";
                details.add_quota_failure_violation("relay", what);
            }
            Self::Busy(what) => {
                details.set_retry_info(Some(RETRY_DELAY));
                details.add_quota_failure_violation("relay", format!("{what} at once"));
            }
            Self::Throttled(throttle) => {
                details.set_retry_info(Some(throttle.wait));
                details.add_quota_failure_violation(throttle.subject, throttle.what);
            }
            Self::Draining
            | Self::Outbox(_)
            | Self::PartlyDone { .. }
            | Self::IntegrationChanging
            | Self::Unauthenticated(AuthError::NoKeys) => {
                details.set_retry_info(Some(RETRY_DELAY));
            }
            _ => {}
        }
        Status::with_error_details(self.code(), self.message(), details)
    }

    /// The same for one capture of a batch or a stream.
    #[must_use]
    pub fn to_capture_error(&self) -> proto::CaptureError {
        let violations = match self {
            Self::InvalidRequest(found) | Self::Capture(CaptureFault::Invalid(found)) => {
                found.iter().cloned().map(Into::into).collect()
            }
            _ => Vec::new(),
        };
        proto::CaptureError {
            code: self.code().into(),
            reason: self.reason().to_owned(),
            message: self.message(),
            violations,
        }
    }
}

impl From<RelayError> for Status {
    fn from(error: RelayError) -> Self {
        if let RelayError::Outbox(cause) | RelayError::PartlyDone { cause, .. } = &error {
            tracing::warn!(%cause, "a call failed");
        }
        error.to_status()
    }
}

fn quota_text(quota: Quota) -> &'static str {
    match quota {
        Quota::Events => "as many events wait as the relay may hold ([outbox] max_events)",
        Quota::Bytes => "as many bytes wait as the relay may hold ([outbox] max_bytes)",
        Quota::IntegrationEvents => {
            "as many events wait as one integration may have ([outbox] max_integration_events)"
        }
        Quota::IntegrationBytes => {
            "as many bytes wait as one integration may have ([outbox] max_integration_bytes)"
        }
    }
}

/// As many violations as a header can carry; the last one counts the others.
fn bounded(found: &[Violation]) -> Vec<FieldViolation> {
    let mut bytes = 0;
    let mut listed: Vec<_> = found
        .iter()
        .take_while(|one| {
            bytes += one.field.len() + one.reason.len() + one.description.len() + 8;
            bytes <= MAX_DETAIL_BYTES
        })
        .map(|one| FieldViolation {
            field: one.field.clone(),
            description: one.description.clone(),
            reason: one.reason.to_owned(),
            localized_message: None,
        })
        .collect();
    if listed.len() < found.len() {
        let more = format!(
            "{} more violations are not listed",
            found.len() - listed.len()
        );
        listed.push(FieldViolation {
            description: more,
            reason: "MORE_VIOLATIONS".to_owned(),
            ..FieldViolation::default()
        });
    }
    listed
}

#[cfg(test)]
mod tests;
