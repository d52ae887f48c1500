//! What the journal's records say: a capture was accepted, or an attempt settled.

use std::{io, sync::Arc};

use prost::Message;

use super::Record;
use crate::{
    event::{EventPair, EventType},
    integration::IntegrationId,
    outbox::{
        LaneKey, SettledCapture, Settlement, record,
        sqlite::overlay::{Entry, Origin},
    },
    region::Region,
    status::CaptureRecord,
};

/// Kinds of records.
pub(in crate::outbox::sqlite) const PROBE: u8 = 0;
pub(in crate::outbox::sqlite) const ACCEPTED: u8 = 1;
pub(in crate::outbox::sqlite) const SETTLED: u8 = 2;

/// Both payloads follow it.
#[derive(Clone, PartialEq, Message)]
struct Accepted {
    #[prost(int64, tag = "1")]
    sequence: i64,
    #[prost(string, tag = "2")]
    integration_id: String,
    #[prost(string, tag = "3")]
    capture_id: String,
    #[prost(bytes = "vec", tag = "4")]
    digest: Vec<u8>,
    #[prost(sfixed64, optional, tag = "5")]
    subject: Option<i64>,
    #[prost(uint32, optional, tag = "6")]
    shard: Option<u32>,
    #[prost(bytes = "vec", tag = "7")]
    status: Vec<u8>,
    #[prost(uint32, tag = "8")]
    identify_bytes: u32,
    #[prost(uint32, tag = "9")]
    track_bytes: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Settled {
    #[prost(string, tag = "1")]
    integration_id: String,
    #[prost(bool, tag = "2")]
    eu: bool,
    #[prost(uint32, tag = "3")]
    shard: u32,
    #[prost(message, repeated, tag = "4")]
    captures: Vec<SettledOne>,
}

#[derive(Clone, PartialEq, Message)]
struct SettledOne {
    #[prost(int64, tag = "1")]
    sequence: i64,
    #[prost(bool, tag = "2")]
    identify: bool,
    #[prost(bool, tag = "3")]
    track: bool,
    #[prost(bytes = "vec", tag = "4")]
    status: Vec<u8>,
    #[prost(string, tag = "5")]
    capture_id: String,
}

/// What a record says.
#[derive(Debug)]
pub(in crate::outbox::sqlite) enum Said {
    Accepted(Box<Entry>),
    Settled(Settlement),
    /// Nothing: it was written to see whether that works.
    Probe,
}

/// Writes an accepted capture.
pub(in crate::outbox::sqlite) fn write_accepted(entry: &Entry, body: &mut Vec<u8>) {
    let Origin::New { subject, payloads } = &entry.origin else {
        return;
    };
    let [identify, track] = match payloads {
        Some(pair) => [pair.identify.as_slice(), pair.track.as_slice()],
        None => [&[][..], &[][..]],
    };
    // An event has at most 32 KB.
    let length = |payload: &[u8]| u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let message = Accepted {
        sequence: entry.sequence,
        integration_id: entry.record.integration_id.as_str().to_owned(),
        capture_id: entry.record.capture_id.clone(),
        digest: entry.digest.to_vec(),
        subject: *subject,
        shard: entry.shard.map(u32::from),
        status: record::encode(&entry.record),
        identify_bytes: length(identify),
        track_bytes: length(track),
    };
    message.encode_raw_delimited(body);
    body.extend_from_slice(identify);
    body.extend_from_slice(track);
}

/// Writes a settlement.
pub(in crate::outbox::sqlite) fn write_settled(settlement: &Settlement, body: &mut Vec<u8>) {
    let captures = settlement.captures.iter().map(|one| SettledOne {
        sequence: one.sequence,
        identify: one.changed.contains(&EventType::Identify),
        track: one.changed.contains(&EventType::Track),
        status: record::encode(&one.record),
        capture_id: one.record.capture_id.clone(),
    });
    let message = Settled {
        integration_id: settlement.lane.integration_id.as_str().to_owned(),
        eu: settlement.lane.region == Region::Eu,
        shard: settlement.lane.shard.into(),
        captures: captures.collect(),
    };
    message.encode_raw_delimited(body);
}

trait Delimited: Message + Sized {
    fn encode_raw_delimited(&self, body: &mut Vec<u8>) {
        // Memory is the only bound of a vector.
        let _ = self.encode_length_delimited(body);
    }
}

impl<M: Message> Delimited for M {}

fn damaged(what: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

/// Reads a record back.
///
/// # Errors
/// Its checksum is right and yet it can't be read: a later version wrote it.
pub(in crate::outbox::sqlite) fn read(record: &Record) -> io::Result<Said> {
    match record.kind {
        PROBE => Ok(Said::Probe),
        ACCEPTED => read_accepted(record.number, &record.body)
            .map(Box::new)
            .map(Said::Accepted),
        SETTLED => read_settled(&record.body).map(Said::Settled),
        kind => Err(damaged(format!("a record of the unknown kind {kind}"))),
    }
}

fn integration(id: &str) -> io::Result<IntegrationId> {
    IntegrationId::new(id).ok_or_else(|| damaged("an integration's id"))
}

fn decoded(id: IntegrationId, capture_id: String, status: &[u8]) -> io::Result<CaptureRecord> {
    record::decode(id, capture_id, status).map_err(damaged)
}

fn read_accepted(number: u64, mut body: &[u8]) -> io::Result<Entry> {
    let message = Accepted::decode_length_delimited(&mut body).map_err(damaged)?;
    let (identify, track) = body
        .split_at_checked(message.identify_bytes as usize)
        .filter(|(_, track)| track.len() == message.track_bytes as usize)
        .ok_or_else(|| damaged("a payload's length"))?;
    let id = integration(&message.integration_id)?;
    let shard = message.shard.map(u16::try_from).transpose();
    let shard = shard.map_err(damaged)?;
    let bytes = |payload: &[u8]| shard.map(|_| payload.len() as u64);
    Ok(Entry {
        sequence: message.sequence,
        record: decoded(id, message.capture_id, &message.status)?,
        digest: message
            .digest
            .try_into()
            .map_err(|_| damaged("a digest's length"))?,
        shard,
        waiting: [bytes(identify), bytes(track)],
        origin: Origin::New {
            subject: message.subject,
            payloads: shard.map(|_| {
                Arc::new(EventPair {
                    identify: identify.to_vec(),
                    track: track.to_vec(),
                })
            }),
        },
        since: number,
    })
}

fn read_settled(mut body: &[u8]) -> io::Result<Settlement> {
    let message = Settled::decode_length_delimited(&mut body).map_err(damaged)?;
    let id = integration(&message.integration_id)?;
    let one = |one: SettledOne| {
        let changed = [
            (one.identify, EventType::Identify),
            (one.track, EventType::Track),
        ];
        Ok(SettledCapture {
            sequence: one.sequence,
            record: decoded(id.clone(), one.capture_id, &one.status)?,
            changed: changed
                .into_iter()
                .filter_map(|(changed, event)| changed.then_some(event))
                .collect(),
        })
    };
    let captures = message.captures.into_iter().map(one);
    let captures = captures.collect::<io::Result<_>>()?;
    Ok(Settlement {
        lane: LaneKey {
            integration_id: id.clone(),
            region: if message.eu {
                Region::Eu
            } else {
                Region::NonEu
            },
            shard: u16::try_from(message.shard).map_err(damaged)?,
        },
        captures,
    })
}
