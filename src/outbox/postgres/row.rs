//! Rows as the relay's types.

use tokio_postgres::Row;

use super::{database::region_of, error::damaged};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{
        OutboxError,
        record::{decode_attempts, decode_status},
    },
    status::CaptureRecord,
    time::UnixMillis,
    trace::TraceLink,
};

/// The columns of a record, of `captures c`.
pub(super) const RECORD_COLUMNS: &str = "c.capture_id, c.lane, c.mapping_version, \
    c.accept_millis, c.queue_millis, c.identify, c.track, c.attempts, c.trace";

/// A record from [`RECORD_COLUMNS`], which begin at `first`.
pub(super) fn record_of(
    id: IntegrationId,
    row: &Row,
    first: usize,
) -> Result<CaptureRecord, OutboxError> {
    let number = |place: usize| -> i64 { row.get(first + place) };
    let status = |place: usize| {
        let stored: &[u8] = row.get(first + place);
        decode_status(stored).map_err(|_| damaged("status"))
    };
    let attempts: Option<&[u8]> = row.get(first + 7);
    let attempts = decode_attempts(attempts.unwrap_or_default());
    let trace: Option<&[u8]> = row.get(first + 8);
    Ok(CaptureRecord {
        integration_id: id,
        capture_id: row.get(first),
        region: region_of(number(1)),
        mapping_version: number(2).cast_unsigned(),
        accept_time: UnixMillis(number(3)),
        queue_time: UnixMillis(number(4)),
        identify: status(5)?,
        track: status(6)?,
        attempts: attempts.map_err(|_| damaged("list of attempts"))?,
        trace: trace.and_then(TraceLink::from_bytes),
    })
}

/// An event as a number.
pub(super) fn event_number(event: EventType) -> i16 {
    match event {
        EventType::Identify => 1,
        EventType::Track => 2,
    }
}

/// The event of a number.
pub(super) fn event_of(number: i16) -> EventType {
    match number {
        1 => EventType::Identify,
        _ => EventType::Track,
    }
}
