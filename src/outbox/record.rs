//! The form in which a capture's status is stored: a protobuf message, so that
//! fields can be added and old records stay readable.

use std::time::Duration;

use prost::Message;

pub(super) mod write;

use crate::{
    event::EventType,
    integration::IntegrationId,
    proto::{DeliveryReason, DeliveryState},
    region::Region,
    status::{Attempt, CaptureRecord, EventStatus, State},
    time::UnixMillis,
    trace::TraceLink,
};

#[derive(Clone, PartialEq, Message)]
struct StoredCapture {
    #[prost(bool, tag = "1")]
    eu: bool,
    #[prost(uint64, tag = "2")]
    mapping_version: u64,
    #[prost(sint64, tag = "3")]
    accept_millis: i64,
    #[prost(message, optional, tag = "4")]
    identify: Option<StoredEvent>,
    #[prost(message, optional, tag = "5")]
    track: Option<StoredEvent>,
    #[prost(message, repeated, tag = "6")]
    attempts: Vec<StoredAttempt>,
    /// 0: as accept_millis.
    #[prost(sint64, tag = "7")]
    queue_millis: i64,
    /// As [`TraceLink::to_bytes`] has it; empty where the call was not traced.
    #[prost(bytes = "vec", tag = "8")]
    trace: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct StoredEvent {
    #[prost(enumeration = "DeliveryState", tag = "1")]
    state: i32,
    #[prost(enumeration = "DeliveryReason", tag = "2")]
    reason: i32,
    /// When it was delivered or given up, or the next attempt.
    #[prost(sint64, tag = "3")]
    state_millis: i64,
    #[prost(uint32, tag = "4")]
    attempt_count: u32,
    #[prost(uint32, tag = "5")]
    last_http_status: u32,
    #[prost(string, tag = "6")]
    last_error: String,
    /// 0: it does not fail by itself.
    #[prost(sint64, tag = "7")]
    failing_millis: i64,
}

#[derive(Clone, PartialEq, Message)]
struct StoredAttempt {
    /// Bit 0: identify, bit 1: track.
    #[prost(uint32, tag = "1")]
    carried: u32,
    #[prost(sint64, tag = "2")]
    millis: i64,
    #[prost(uint32, tag = "3")]
    http_status: u32,
    #[prost(uint32, tag = "4")]
    latency_millis: u32,
    #[prost(enumeration = "DeliveryReason", tag = "5")]
    reason: i32,
    #[prost(string, tag = "6")]
    error: String,
}

/// Encodes all of a record but its key.
pub(super) fn encode(record: &CaptureRecord) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    encode_into(record, &mut bytes);
    bytes
}

/// Appends all of a record but its key, as [`StoredCapture`]: without making one, since
/// every capture is encoded a few times.
pub(super) fn encode_into(record: &CaptureRecord, bytes: &mut Vec<u8>) {
    write::number(1, (record.region == Region::Eu).into(), bytes);
    write::number(2, record.mapping_version, bytes);
    write::signed(3, record.accept_time.0, bytes);
    for (tag, event) in [(4, EventType::Identify), (5, EventType::Track)] {
        write::nested(tag, bytes, |bytes| encode_event(record.event(event), bytes));
    }
    for attempt in &record.attempts {
        write::nested(6, bytes, |bytes| encode_attempt(attempt, bytes));
    }
    if record.queue_time != record.accept_time {
        write::signed(7, record.queue_time.0, bytes);
    }
    if let Some(trace) = &record.trace {
        write::bytes(8, &trace.to_bytes(), bytes);
    }
}

/// Encodes the status of one event.
pub(super) fn encode_status(event: &EventStatus) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    encode_event(event, &mut bytes);
    bytes
}

/// Decodes the status of one event.
///
/// # Errors
/// What is wrong with the bytes.
pub(super) fn decode_status(bytes: &[u8]) -> Result<EventStatus, String> {
    decode_event(StoredEvent::decode(bytes).map_err(|error| error.to_string())?)
}

/// Encodes attempts.
pub(super) fn encode_attempts(attempts: &[Attempt]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24 * attempts.len());
    for attempt in attempts {
        write::nested(6, &mut bytes, |bytes| encode_attempt(attempt, bytes));
    }
    bytes
}

/// Decodes attempts.
///
/// # Errors
/// What is wrong with the bytes.
pub(super) fn decode_attempts(bytes: &[u8]) -> Result<Vec<Attempt>, String> {
    let stored = StoredCapture::decode(bytes).map_err(|error| error.to_string())?;
    Ok(stored.attempts.into_iter().map(decode_attempt).collect())
}

/// Decodes a record.
///
/// # Errors
/// What is wrong with the bytes.
pub(super) fn decode(
    integration_id: IntegrationId,
    capture_id: String,
    bytes: &[u8],
) -> Result<CaptureRecord, String> {
    let stored = StoredCapture::decode(bytes).map_err(|error| error.to_string())?;
    let event = |event: Option<StoredEvent>| decode_event(event.unwrap_or_default());
    Ok(CaptureRecord {
        integration_id,
        capture_id,
        region: if stored.eu { Region::Eu } else { Region::NonEu },
        mapping_version: stored.mapping_version,
        accept_time: UnixMillis(stored.accept_millis),
        queue_time: UnixMillis(match stored.queue_millis {
            0 => stored.accept_millis,
            millis => millis,
        }),
        identify: event(stored.identify)?,
        track: event(stored.track)?,
        attempts: stored.attempts.into_iter().map(decode_attempt).collect(),
        trace: TraceLink::from_bytes(&stored.trace),
    })
}

/// For fuzzing: whatever is decoded encodes to the same record again.
#[doc(hidden)]
pub fn check_stored_record(bytes: &[u8]) {
    let Some(id) = IntegrationId::new("fuzz") else {
        return;
    };
    if let Ok(record) = decode(id.clone(), String::new(), bytes) {
        assert_eq!(decode(id, String::new(), &encode(&record)), Ok(record));
    }
}

/// For fuzzing: encoded records of each kind, with their names.
#[doc(hidden)]
#[must_use]
pub fn sample_records() -> Vec<(&'static str, Vec<u8>)> {
    let event = |state| EventStatus {
        attempt_count: 2,
        ..EventStatus::new(state)
    };
    let (at, reason) = (UnixMillis(1_800_000_000_000), DeliveryReason::Timeout);
    let attempt = Attempt {
        identify: true,
        track: false,
        time: at,
        http_status: 503,
        latency: Duration::from_millis(12),
        reason,
        error: "HTTP 503 Service Unavailable".to_owned(),
    };
    let states = [
        ("queued", State::Queued),
        (
            "retrying",
            State::Retrying {
                reason,
                next_attempt: at,
            },
        ),
        ("delivered", State::Delivered { at }),
        ("skipped", State::Skipped { reason }),
        ("dead", State::DeadLettered { reason, at }),
    ];
    let Some(integration_id) = IntegrationId::new("fuzz") else {
        return Vec::new();
    };
    let sample = |state| CaptureRecord {
        integration_id: integration_id.clone(),
        capture_id: String::new(),
        region: Region::Eu,
        mapping_version: 3,
        accept_time: at,
        queue_time: at,
        identify: event(state),
        track: event(State::Queued),
        attempts: vec![attempt.clone()],
        trace: TraceLink::from_bytes(&[7; TraceLink::BYTES]),
    };
    states
        .into_iter()
        .map(|(name, state)| (name, encode(&sample(state))))
        .collect()
}

fn encode_event(event: &EventStatus, bytes: &mut Vec<u8>) {
    write::enumeration(1, event.state.to_proto().into(), bytes);
    write::enumeration(2, event.state.reason().into(), bytes);
    let millis = match event.state {
        State::Queued | State::Skipped { .. } => 0,
        State::Retrying { next_attempt, .. } => next_attempt.0,
        State::Delivered { at } | State::DeadLettered { at, .. } => at.0,
    };
    write::signed(3, millis, bytes);
    write::number(4, event.attempt_count.into(), bytes);
    write::number(5, event.last_http_status.into(), bytes);
    write::bytes(6, event.last_error.as_bytes(), bytes);
    write::signed(7, event.failing_since.map_or(0, |since| since.0), bytes);
}

fn decode_event(event: StoredEvent) -> Result<EventStatus, String> {
    let (reason, at) = (event.reason(), UnixMillis(event.state_millis));
    let state = match event.state() {
        DeliveryState::Queued => State::Queued,
        DeliveryState::Retrying => State::Retrying {
            reason,
            next_attempt: at,
        },
        DeliveryState::Delivered => State::Delivered { at },
        DeliveryState::Skipped => State::Skipped { reason },
        DeliveryState::DeadLettered => State::DeadLettered { reason, at },
        DeliveryState::Unspecified => return Err("an event without a state".to_owned()),
    };
    Ok(EventStatus {
        state,
        attempt_count: event.attempt_count,
        last_http_status: u16::try_from(event.last_http_status).unwrap_or(0),
        last_error: event.last_error,
        failing_since: (event.failing_millis != 0).then_some(UnixMillis(event.failing_millis)),
    })
}

fn encode_attempt(attempt: &Attempt, bytes: &mut Vec<u8>) {
    let carried = u64::from(attempt.identify) | (u64::from(attempt.track) << 1);
    let latency = u32::try_from(attempt.latency.as_millis()).unwrap_or(u32::MAX);
    write::number(1, carried, bytes);
    write::signed(2, attempt.time.0, bytes);
    write::number(3, attempt.http_status.into(), bytes);
    write::number(4, latency.into(), bytes);
    write::enumeration(5, attempt.reason.into(), bytes);
    write::bytes(6, attempt.error.as_bytes(), bytes);
}

fn decode_attempt(attempt: StoredAttempt) -> Attempt {
    Attempt {
        identify: attempt.carried & 1 != 0,
        track: attempt.carried & 2 != 0,
        time: UnixMillis(attempt.millis),
        http_status: u16::try_from(attempt.http_status).unwrap_or(0),
        latency: Duration::from_millis(attempt.latency_millis.into()),
        reason: attempt.reason(),
        error: attempt.error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_event() -> impl Strategy<Value = EventStatus> {
        let state = (0..5_u8, any::<i64>(), 0..=12_i32).prop_map(|(kind, millis, reason)| {
            let reason = DeliveryReason::try_from(reason).unwrap_or_default();
            let at = UnixMillis(millis);
            match kind {
                0 => State::Queued,
                1 => State::Retrying {
                    reason,
                    next_attempt: at,
                },
                2 => State::Delivered { at },
                3 => State::Skipped { reason },
                _ => State::DeadLettered { reason, at },
            }
        });
        let failing_since = prop::option::of((1..i64::MAX).prop_map(UnixMillis));
        let counts = (any::<u32>(), any::<u16>());
        (state, counts, any::<String>(), failing_since).prop_map(
            |(state, (attempt_count, last_http_status), last_error, failing_since)| EventStatus {
                state,
                attempt_count,
                last_http_status,
                last_error,
                failing_since,
            },
        )
    }

    #[test]
    fn a_skipped_state_begins_as_sql_expects_it() {
        let status = |reason| encode_status(&EventStatus::new(State::Skipped { reason }));
        let erased = status(DeliveryReason::Erased);
        assert_eq!(erased, [0x08, 0x04, 0x10, 0x0e]);
        assert_eq!(status(DeliveryReason::NoEmail), [0x08, 0x04, 0x10, 0x01]);
        assert_ne!(encode_status(&EventStatus::new(State::Queued))[1], 4);
    }

    proptest! {
        #[test]
        fn a_record_comes_back_as_it_was_stored(
            identify in any_event(),
            track in any_event(),
            eu in any::<bool>(),
            queue_millis in prop_oneof![Just(-5), 1..i64::MAX],
            trace in prop::collection::vec(any::<u8>(), 23..26),
            carried in prop::collection::vec((any::<bool>(), any::<bool>(), any::<u16>(), any::<u32>()), 0..5),
        ) {
            let id = IntegrationId::new("acme").expect("valid");
            let record = CaptureRecord {
                integration_id: id.clone(),
                capture_id: "c".into(),
                region: if eu { Region::Eu } else { Region::NonEu },
                mapping_version: 7,
                accept_time: UnixMillis(-5),
                queue_time: UnixMillis(queue_millis),
                identify,
                track,
                attempts: carried
                    .into_iter()
                    .map(|(identify, track, http_status, latency)| Attempt {
                        identify,
                        track,
                        time: UnixMillis(9),
                        http_status,
                        latency: Duration::from_millis(latency.into()),
                        reason: DeliveryReason::Timeout,
                        error: "e".into(),
                    })
                    .collect(),
                trace: TraceLink::from_bytes(&trace),
            };
            let bytes = encode(&record);
            // As the message itself would be written.
            let message = StoredCapture::decode(bytes.as_slice()).expect("a message");
            prop_assert_eq!(&message.encode_to_vec(), &bytes);
            let status = encode_status(&record.identify);
            prop_assert_eq!(decode_status(&status), Ok(record.identify.clone()));
            // The state stands where SQL looks for it.
            prop_assert_eq!(i32::from(status[1]), record.identify.state.to_proto() as i32);
            let attempts = encode_attempts(&record.attempts);
            prop_assert_eq!(decode_attempts(&attempts), Ok(record.attempts.clone()));
            prop_assert_eq!(decode(id, "c".into(), &bytes), Ok(record));
        }

        #[test]
        fn damaged_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let id = IntegrationId::new("acme").expect("valid");
            let _ = decode(id, "c".into(), &bytes);
        }
    }
}
