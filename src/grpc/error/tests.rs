use super::*;
use crate::{integration::IntegrationId, region::Region};

fn violation(index: usize) -> Violation {
    Violation {
        field: format!("capture.attributes[\"{index}\"]"),
        reason: "WRONG_TYPE",
        description: "d".repeat(200),
    }
}

#[test]
fn every_error_has_the_code_and_the_details_of_the_contract() {
    let id = || IntegrationId::new("acme").expect("valid");
    let fault = RelayError::Capture;
    for (error, code, reason) in [
        (
            RelayError::InvalidRequest(vec![violation(0)]),
            Code::InvalidArgument,
            "INVALID_REQUEST",
        ),
        (
            fault(CaptureFault::Invalid(vec![violation(0)])),
            Code::InvalidArgument,
            "INVALID_CAPTURE",
        ),
        (
            fault(CaptureFault::RegionNotConfigured(Region::Eu)),
            Code::FailedPrecondition,
            "REGION_NOT_CONFIGURED",
        ),
        (
            fault(CaptureFault::RegionAmbiguous),
            Code::FailedPrecondition,
            "REGION_AMBIGUOUS",
        ),
        (
            RelayError::CaptureIdReused,
            Code::AlreadyExists,
            "CAPTURE_ID_REUSED",
        ),
        (
            RelayError::CaptureNotFound("c".into()),
            Code::NotFound,
            "CAPTURE_NOT_FOUND",
        ),
        (
            RegistryError::NotFound("x".into()).into(),
            Code::NotFound,
            "INTEGRATION_NOT_FOUND",
        ),
        (
            RegistryError::StaleEtag(id()).into(),
            Code::Aborted,
            "STALE_ETAG",
        ),
        (
            RelayError::Full(Quota::IntegrationBytes),
            Code::ResourceExhausted,
            "INTEGRATION_BACKLOG_FULL",
        ),
        (RelayError::Draining, Code::Unavailable, "DRAINING"),
        (
            RelayError::UnknownService,
            Code::NotFound,
            "SERVICE_UNKNOWN",
        ),
        (
            RelayError::UnknownRpc("/a.B/C".into()),
            Code::Unimplemented,
            "RPC_UNKNOWN",
        ),
        (
            RelayError::MessageTooLarge("5 bytes".into()),
            Code::ResourceExhausted,
            "MESSAGE_TOO_LARGE",
        ),
        (
            RelayError::Malformed("no UTF-8".into()),
            Code::InvalidArgument,
            "MALFORMED_MESSAGE",
        ),
        (
            RelayError::CompressedFlag("flag".into()),
            Code::Internal,
            "MALFORMED_MESSAGE",
        ),
        (
            RelayError::Compressed("zstd".into()),
            Code::Unimplemented,
            "COMPRESSION_UNSUPPORTED",
        ),
        (
            OutboxError::Closed.into(),
            Code::Unavailable,
            "OUTBOX_UNAVAILABLE",
        ),
        (
            OutboxError::OutcomeUnknown("timed out".into()).into(),
            Code::Unavailable,
            "OUTCOME_UNKNOWN",
        ),
        (
            RegistryError::from(OutboxError::OutcomeUnknown("timed out".into())).into(),
            Code::Unavailable,
            "OUTCOME_UNKNOWN",
        ),
        (
            RelayError::PartlyDone {
                events: 500,
                action: "replayed",
                cause: OutboxError::OutcomeUnknown("timed out".into()),
            },
            Code::Unavailable,
            "OUTCOME_UNKNOWN",
        ),
        (
            RelayError::IntegrationChanging,
            Code::Unavailable,
            "INTEGRATION_CHANGING",
        ),
        (
            RelayError::DeadlineExceeded,
            Code::DeadlineExceeded,
            "DEADLINE_EXCEEDED",
        ),
    ] {
        let status = error.to_status();
        let details = status.get_error_details();
        assert_eq!(status.code(), code, "{error:?}");
        let info = details.error_info().expect("an ErrorInfo");
        assert_eq!(info.reason, reason);
        // No field is to blame, there is no resource, and another try is no help.
        if let RelayError::Malformed(_)
        | RelayError::MessageTooLarge(_)
        | RelayError::UnknownService = error
        {
            assert!(details.retry_info().is_none() && details.bad_request().is_none());
            continue;
        }
        assert_eq!(
            details.bad_request().is_some(),
            code == Code::InvalidArgument
        );
        assert_eq!(details.resource_info().is_some(), code == Code::NotFound);
        let again = matches!(code, Code::Unavailable | Code::ResourceExhausted);
        assert_eq!(details.retry_info().is_some(), again);
        assert_eq!(
            details.quota_failure().is_some(),
            code == Code::ResourceExhausted
        );
    }
}

#[test]
fn messages_say_what_was_done() {
    let unknown = || OutboxError::OutcomeUnknown("timed out".into());
    let partly = |cause| RelayError::PartlyDone {
        events: 500,
        action: "discarded",
        cause,
    };
    for (error, text) in [
        (unknown().into(), "may have been applied"),
        (RelayError::IntegrationChanging, "nothing was changed"),
        (OutboxError::Closed.into(), "nothing was changed"),
        (
            partly(OutboxError::Closed),
            "500 events were discarded, then",
        ),
        (
            partly(unknown()),
            "500 events were discarded, and perhaps more",
        ),
    ] {
        let message = error.message();
        assert!(message.contains(text), "{message}");
        assert_eq!(error.to_capture_error().message, message);
    }
}

#[test]
fn many_violations_fit_into_a_header_and_the_rest_is_counted() {
    let found: Vec<_> = (0..100).map(violation).collect();
    let status = RelayError::InvalidRequest(found.clone()).to_status();
    assert!(status.details().len() < 6_000, "{}", status.details().len());
    let details = status.get_error_details();
    let listed = &details.bad_request().expect("violations").field_violations;
    let last = listed.last().expect("at least one");
    assert_eq!(last.reason, "MORE_VIOLATIONS");
    let counted = format!("{} more", 100 - (listed.len() - 1));
    assert!(
        last.description.starts_with(&counted),
        "{}",
        last.description
    );
    assert_eq!(
        RelayError::InvalidRequest(found)
            .to_capture_error()
            .violations
            .len(),
        100
    );
}

/// Every rpc can fail with these, also those that store nothing.
#[test]
fn what_any_call_can_be_told_speaks_of_no_capture() {
    for error in [
        RelayError::Throttled(Throttle::OPEN_CALLS),
        RelayError::Busy("watchers"),
        RelayError::Draining,
        RelayError::IntegrationChanging,
        OutboxError::Closed.into(),
        RelayError::MessageTooLarge("5 bytes".into()),
        RelayError::Malformed("no UTF-8".into()),
    ] {
        let message = error.message();
        assert!(!message.contains("stored"), "{message}");
        assert!(!message.contains("store "), "{message}");
    }
}
