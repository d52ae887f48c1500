//! From columns to the outbox's types.

use crate::{
    integration::IntegrationId,
    outbox::{OutboxError, record},
    region::Region,
    status::CaptureRecord,
};

/// The number under which a region is stored.
pub(super) fn region_number(region: Region) -> i64 {
    match region {
        Region::NonEu => 1,
        Region::Eu => 2,
    }
}

/// The region of a number.
pub(super) fn region_of(number: i64) -> Region {
    if number == 2 {
        Region::Eu
    } else {
        Region::NonEu
    }
}

/// What SQLite said, as the outbox's error.
pub(super) fn unavailable(error: rusqlite::Error) -> OutboxError {
    OutboxError::Unavailable(error.to_string())
}

/// The record of a capture from the columns `status`, `capture_id`.
pub(super) fn record_of(
    integration_id: IntegrationId,
    capture_id: String,
    status: &[u8],
) -> Result<CaptureRecord, OutboxError> {
    record::decode(integration_id, capture_id, status)
        .map_err(|error| OutboxError::Unavailable(format!("a damaged record: {error}")))
}

/// The checksum of a stored payload.
pub(super) fn crc32(payload: &[u8]) -> u32 {
    crc32fast::hash(payload)
}
