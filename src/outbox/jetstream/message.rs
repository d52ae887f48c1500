//! The messages of the streams: protobuf, so that fields can be added.

use prost::Message;

use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError, record},
    status::CaptureRecord,
};

/// One version of a capture's record.
#[derive(Clone, PartialEq, Message)]
pub(super) struct StoredRecord {
    #[prost(string, tag = "1")]
    pub(super) capture_id: String,
    /// Of the capture as it was sent, blinded.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) digest: Vec<u8>,
    /// `outbox/record.rs`.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) status: Vec<u8>,
    /// Whose data it is, blinded; 0 for nobody's.
    #[prost(sfixed64, tag = "4")]
    pub(super) subject: i64,
    /// Marks the submission that stored it.
    #[prost(fixed64, tag = "5")]
    pub(super) mark: u64,
    /// The lane's shard, if it ever waited in one.
    #[prost(uint32, optional, tag = "6")]
    pub(super) shard: Option<u32>,
    /// Where its payloads wait; 0: right behind this message.
    #[prost(uint64, tag = "7")]
    pub(super) queued_at: u64,
}

/// A capture that waits.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Waiting {
    /// The record at the time.
    #[prost(message, optional, tag = "1")]
    pub(super) record: Option<StoredRecord>,
    #[prost(message, optional, tag = "2")]
    pub(super) identify: Option<Payload>,
    #[prost(message, optional, tag = "3")]
    pub(super) track: Option<Payload>,
}

/// An event's bytes, JSON or sealed.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Payload {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) bytes: Vec<u8>,
    /// CRC-32 of them.
    #[prost(fixed32, tag = "2")]
    pub(super) crc: u32,
}

/// A dead letter.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Dead {
    #[prost(string, tag = "1")]
    pub(super) capture_id: String,
    /// `jebbit.segmentrelay.v1.EventType`.
    #[prost(int32, tag = "2")]
    pub(super) event: i32,
    #[prost(sint64, tag = "3")]
    pub(super) millis: i64,
    #[prost(message, optional, tag = "4")]
    pub(super) payload: Option<Payload>,
    /// The lane's shard.
    #[prost(uint32, tag = "5")]
    pub(super) shard: u32,
}

/// Who holds a lane, and up to where it is settled.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LaneRecord {
    /// Empty: nobody.
    #[prost(string, tag = "1")]
    pub(super) session: String,
    /// What lies before this sequence does not wait any more: live, replayed.
    #[prost(uint64, repeated, tag = "2")]
    pub(super) cursors: Vec<u64>,
    /// Up to this sequence the records have to be read: some were tried.
    #[prost(uint64, repeated, tag = "3")]
    pub(super) touched: Vec<u64>,
}

/// What relays tell each other: captures whose state has changed.
#[derive(Clone, PartialEq, Message)]
pub(super) struct News {
    #[prost(message, repeated, tag = "1")]
    pub(super) changes: Vec<NewState>,
    /// Lanes that may have something to do.
    #[prost(string, repeated, tag = "2")]
    pub(super) lanes: Vec<String>,
    /// The session that tells it.
    #[prost(string, tag = "3")]
    pub(super) session: String,
}

/// A capture whose state has changed.
#[derive(Clone, PartialEq, Message)]
pub(super) struct NewState {
    #[prost(string, tag = "1")]
    pub(super) integration_id: String,
    #[prost(string, tag = "2")]
    pub(super) capture_id: String,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) status: Vec<u8>,
    /// Bit 0: identify, bit 1: track.
    #[prost(uint32, tag = "4")]
    pub(super) events: u32,
    #[prost(sint64, tag = "5")]
    pub(super) millis: i64,
}

impl Payload {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        let crc = crc32fast::hash(&bytes);
        Self { bytes, crc }
    }

    pub(super) fn is_sound(&self) -> bool {
        crc32fast::hash(&self.bytes) == self.crc
    }
}

impl Waiting {
    pub(super) fn payload(&self, event: EventType) -> Option<&Payload> {
        match event {
            EventType::Identify => self.identify.as_ref(),
            EventType::Track => self.track.as_ref(),
        }
    }

    pub(super) fn payload_mut(&mut self, event: EventType) -> &mut Option<Payload> {
        match event {
            EventType::Identify => &mut self.identify,
            EventType::Track => &mut self.track,
        }
    }
}

impl StoredRecord {
    /// The record of a capture of this integration.
    pub(super) fn open(&self, id: &IntegrationId) -> Result<CaptureRecord, OutboxError> {
        record::decode(id.clone(), self.capture_id.clone(), &self.status)
            .map_err(|error| damaged("record", &error))
    }

    pub(super) fn set(&mut self, record: &CaptureRecord) {
        self.status = record::encode(record);
    }

    pub(super) fn lane(&self, record: &CaptureRecord) -> Option<LaneKey> {
        Some(LaneKey {
            integration_id: record.integration_id.clone(),
            region: record.region,
            shard: u16::try_from(self.shard?).ok()?,
        })
    }
}

impl LaneRecord {
    pub(super) fn cursor(&self, queue: usize) -> u64 {
        self.cursors.get(queue).copied().unwrap_or(0)
    }

    pub(super) fn touched(&self, queue: usize) -> u64 {
        self.touched.get(queue).copied().unwrap_or(0)
    }
}

pub(super) fn damaged(what: &str, error: &dyn std::fmt::Display) -> OutboxError {
    OutboxError::Unavailable(format!("a damaged {what} in JetStream: {error}"))
}

/// Decodes a message of a stream.
pub(super) fn decode<M: Message + Default>(what: &str, bytes: &[u8]) -> Result<M, OutboxError> {
    M::decode(bytes).map_err(|error| damaged(what, &error))
}
