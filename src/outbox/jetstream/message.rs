//! The messages of the streams: protobuf, so that fields can be added.

use bytes::{Buf, Bytes};
use prost::Message;

use super::position::{position, split};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError, record},
    status::CaptureRecord,
};

/// Positions that are remembered of a capture that was replayed again and again.
const MAX_LEFT: usize = 16;

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
    /// Its position in a queue, if this is a later version; else 0, and the next two say it.
    #[prost(uint64, tag = "7")]
    pub(super) queued_at: u64,
    /// How many messages behind this one its payloads wait; 0: nowhere.
    #[prost(uint32, tag = "8")]
    pub(super) behind: u32,
    /// The place in that message.
    #[prost(uint32, tag = "9")]
    pub(super) index: u32,
    /// Whether its status is all there is; else the outcomes of its message may say more.
    #[prost(bool, tag = "10")]
    pub(super) own: bool,
    /// Earlier positions, whose messages may still have its payloads.
    #[prost(uint64, repeated, tag = "11")]
    pub(super) left: Vec<u64>,
    /// Of a first version: how long the servers keep it, Unix milliseconds.
    #[prost(sint64, tag = "12")]
    pub(super) kept_until: i64,
}

/// Captures of one lane that wait, in their order.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Chunk {
    /// [`Captures`], as LZ4 where `length` says so.
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) captures: Bytes,
    /// Bytes of the captures before they were compressed; 0 where they are not.
    #[prost(uint32, tag = "2")]
    pub(super) length: u32,
}

/// What a chunk holds.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Captures {
    #[prost(message, repeated, tag = "1")]
    pub(super) captures: Vec<Waiting>,
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
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) bytes: Bytes,
    /// CRC-32 of them.
    #[prost(fixed32, tag = "2")]
    pub(super) crc: u32,
}

/// What became of captures of one chunk that were settled together.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Outcomes {
    #[prost(message, repeated, tag = "1")]
    pub(super) outcomes: Vec<SharedOutcome>,
}

/// What became of neighbours in a chunk.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SharedOutcome {
    /// The place of the first.
    #[prost(uint32, tag = "1")]
    pub(super) first: u32,
    /// The place of the last.
    #[prost(uint32, tag = "2")]
    pub(super) last: u32,
    /// `outbox/record.rs`: of the first; its events and attempts are those of all.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) status: Vec<u8>,
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
    /// What lies before this position does not wait any more: live, replayed.
    #[prost(uint64, repeated, tag = "2")]
    pub(super) cursors: Vec<u64>,
    /// Up to this position the records have to be read: some were tried.
    #[prost(uint64, repeated, tag = "3")]
    pub(super) touched: Vec<u64>,
    /// How many behind the cursor do not wait any more.
    #[prost(uint64, repeated, tag = "4")]
    pub(super) beyond: Vec<u64>,
    /// How many were in messages before the cursor that may still be there.
    #[prost(uint64, tag = "5")]
    pub(super) unpurged: u64,
    /// Messages that may still have payloads of dead letters: sequence and, in the last bit, queue.
    #[prost(uint64, repeated, tag = "6")]
    pub(super) letters: Vec<u64>,
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
        Self {
            bytes: bytes.into(),
            crc,
        }
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

    /// From now on the record says itself what became of it.
    pub(super) fn set(&mut self, record: &CaptureRecord) {
        self.status = record::encode(record);
        self.own = true;
    }

    /// Says that the payloads wait at this position.
    pub(super) fn queue_at(&mut self, position: u64) {
        (self.queued_at, self.behind, self.index) = (position, 0, 0);
    }

    /// Says that the payloads wait elsewhere than where they did.
    pub(super) fn move_away(&mut self, revision: u64) {
        let before = self.position(revision);
        self.left.extend(before);
        let many = self.left.len().saturating_sub(MAX_LEFT);
        self.left.drain(..many);
        self.queue_at(0);
    }

    /// Nothing is left of it elsewhere, and nobody finds it as a person's any more.
    pub(super) fn forget_owner(&mut self) {
        self.subject = 0;
        self.left.clear();
        self.queue_at(0);
    }

    /// All positions at which payloads may be, the one where it waits first.
    pub(super) fn positions(&self, revision: u64) -> impl Iterator<Item = u64> {
        let now = self.position(revision).into_iter();
        now.chain(self.left.iter().copied())
    }

    /// The position at which the payloads wait or have waited, by the version's sequence.
    pub(super) fn position(&self, revision: u64) -> Option<u64> {
        match (self.queued_at, self.behind) {
            (0, 0) => None,
            (0, behind) => Some(position(
                revision + u64::from(behind),
                usize::try_from(self.index).ok()?,
            )),
            (position, _) => Some(position),
        }
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

    /// How many captures of the messages that are still there do not wait any more.
    pub(super) fn settled(&self) -> u64 {
        let passed = self.cursors.iter().map(|cursor| split(*cursor).1 as u64);
        passed.chain(self.beyond.iter().copied()).sum::<u64>() + self.unpurged
    }
}

pub(super) fn damaged(what: &str, error: &dyn std::fmt::Display) -> OutboxError {
    OutboxError::Unavailable(format!("a damaged {what} in JetStream: {error}"))
}

/// Decodes a message of a stream.
pub(super) fn decode<M: Message + Default>(what: &str, bytes: impl Buf) -> Result<M, OutboxError> {
    M::decode(bytes).map_err(|error| damaged(what, &error))
}
