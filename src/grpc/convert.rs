//! From the relay's types to the schema's.

use crate::{
    event::{EventType, message_id, message_ids},
    proto,
    status::{CaptureRecord, State},
};

/// What became of a capture.
pub(super) fn capture_result(record: &CaptureRecord, duplicate: bool) -> proto::CaptureResult {
    let ids = message_ids(&record.integration_id, &record.capture_id);
    let events = EventType::ALL.into_iter().zip(ids);
    proto::CaptureResult {
        capture_id: record.capture_id.clone(),
        duplicate,
        events: events
            .map(|(event, id)| delivery(record, event, id))
            .collect(),
        error: None,
    }
}

/// What became of one event.
pub(super) fn event_delivery(record: &CaptureRecord, event: EventType) -> proto::EventDelivery {
    let id = message_id(&record.integration_id, &record.capture_id, event);
    delivery(record, event, id)
}

fn delivery(record: &CaptureRecord, event: EventType, message_id: String) -> proto::EventDelivery {
    let status = record.event(event);
    proto::EventDelivery {
        message_id,
        r#type: event.to_proto().into(),
        state: status.state.to_proto().into(),
        attempt_count: status.attempt_count,
        last_http_status: status.last_http_status.into(),
        last_error: status.last_error.clone(),
        mapping_version: record.mapping_version,
        accept_time: Some(record.accept_time.to_proto()),
        deliver_time: match status.state {
            State::Delivered { at } => Some(at.to_proto()),
            _ => None,
        },
        next_attempt_time: match status.state {
            State::Retrying { next_attempt, .. } => Some(next_attempt.to_proto()),
            _ => None,
        },
        reason: status.state.reason().into(),
    }
}

/// The history of a capture's attempts, event by event.
pub(super) fn attempts(record: &CaptureRecord) -> Vec<proto::DeliveryAttempt> {
    let mut listed = Vec::with_capacity(record.attempts.len() * 2);
    for attempt in &record.attempts {
        for event in EventType::ALL
            .into_iter()
            .filter(|event| attempt.carried(*event))
        {
            listed.push(proto::DeliveryAttempt {
                message_id: message_id(&record.integration_id, &record.capture_id, event),
                attempt_time: Some(attempt.time.to_proto()),
                http_status: attempt.http_status.into(),
                latency: prost_types::Duration::try_from(attempt.latency).ok(),
                error: attempt.error.clone(),
                reason: attempt.reason.into(),
            });
        }
    }
    listed
}
