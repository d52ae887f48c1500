//! Rows as the relay's types.

use tokio_postgres::Row;

use super::{database::region_of, error::damaged};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{
        EventSet, OutboxError,
        record::{decode_attempts, decode_status},
    },
    status::CaptureRecord,
    time::UnixMillis,
    trace::TraceLink,
};

/// The columns of a record, of [`RECORDS`].
pub(super) const RECORD_COLUMNS: &str = "i.integration_id, c.capture_id, c.lane, \
    c.mapping_version, c.accept_millis, c.queue_millis, c.identify, c.track, c.attempts, c.trace";
/// Captures with their integrations.
pub(super) const RECORDS: &str = "captures c JOIN integrations i ON i.key = c.integration";

/// The name of an integration, as the index `integrations_name` has it.
pub(super) const NAME: &str = "split_part(integration_id, '@', 1)";

/// The id of an integration.
pub(super) fn id_of(row: &Row, column: usize) -> Result<IntegrationId, OutboxError> {
    IntegrationId::stored(row.get(column)).ok_or_else(|| damaged("integration"))
}

/// A record from [`RECORD_COLUMNS`], which begin at `first`.
pub(super) fn record_of(row: &Row, first: usize) -> Result<CaptureRecord, OutboxError> {
    let number = |place: usize| -> i64 { row.get(first + place) };
    let status = |place: usize| {
        let stored: &[u8] = row.get(first + place);
        decode_status(stored).map_err(|_| damaged("status"))
    };
    let attempts: Option<&[u8]> = row.get(first + 8);
    let attempts = decode_attempts(attempts.unwrap_or_default());
    let trace: Option<&[u8]> = row.get(first + 9);
    Ok(CaptureRecord {
        integration_id: id_of(row, first)?,
        capture_id: row.get(first + 1),
        region: region_of(number(2)),
        mapping_version: number(3).cast_unsigned(),
        accept_time: UnixMillis(number(4)),
        queue_time: UnixMillis(number(5)),
        identify: status(6)?,
        track: status(7)?,
        attempts: attempts.map_err(|_| damaged("list of attempts"))?,
        trace: trace.and_then(TraceLink::from_bytes),
    })
}

/// An event as a bit.
pub(super) fn bit(event: EventType) -> i16 {
    match event {
        EventType::Identify => 1,
        EventType::Track => 2,
    }
}

pub(super) fn bits(events: EventSet) -> i16 {
    events.iter().map(bit).sum()
}

/// The events of a number.
pub(super) fn events_of(bits: i16) -> EventSet {
    let is_set = |event: &EventType| bits & bit(*event) != 0;
    EventType::ALL.into_iter().filter(is_set).collect()
}
