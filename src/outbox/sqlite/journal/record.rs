//! What the journal's records say: a capture was accepted, or an attempt settled.

use std::{io, sync::Arc};

use bytes::Bytes;
use prost::Message;

use super::Record;
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{
        LaneKey, SettledCapture, Settlement,
        record::{self, write},
        sqlite::entry::{Entry, Origin, Payloads, key_of},
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

/// Writes an accepted capture, but for its payloads, which follow.
pub(in crate::outbox::sqlite) fn write_accepted(
    entry: &Entry,
    subject: Option<i64>,
    payload_bytes: [usize; 2],
    body: &mut Vec<u8>,
) {
    let record = &entry.record;
    write::delimited(body, |body| {
        write::plain(1, entry.sequence, body);
        write::bytes(2, record.integration_id.as_str().as_bytes(), body);
        write::bytes(3, record.capture_id.as_bytes(), body);
        write::bytes(4, &entry.digest, body);
        if let Some(subject) = subject {
            prost::encoding::sfixed64::encode(5, &subject, body);
        }
        if let Some(lane) = &entry.lane {
            prost::encoding::uint32::encode(6, &lane.shard.into(), body);
        }
        write::nested(7, body, |body| record::encode_into(record, body));
        write::number(8, payload_bytes[0] as u64, body);
        write::number(9, payload_bytes[1] as u64, body);
    });
}

/// Writes a settlement.
pub(in crate::outbox::sqlite) fn write_settled(settlement: &Settlement, body: &mut Vec<u8>) {
    let lane = &settlement.lane;
    write::delimited(body, |body| {
        write::bytes(1, lane.integration_id.as_str().as_bytes(), body);
        write::number(2, (lane.region == Region::Eu).into(), body);
        write::number(3, lane.shard.into(), body);
        for one in &settlement.captures {
            let changed = |event| u64::from(one.changed.contains(event));
            write::nested(4, body, |body| {
                write::plain(1, one.sequence, body);
                write::number(2, changed(EventType::Identify), body);
                write::number(3, changed(EventType::Track), body);
                write::nested(4, body, |body| record::encode_into(&one.record, body));
                write::bytes(5, one.record.capture_id.as_bytes(), body);
            });
        }
    });
}

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
    IntegrationId::stored(id).ok_or_else(|| damaged("an integration's id"))
}

fn decoded(id: IntegrationId, capture_id: String, status: &[u8]) -> io::Result<CaptureRecord> {
    record::decode(id, capture_id, status).map_err(damaged)
}

fn read_accepted(number: u64, mut body: &[u8]) -> io::Result<Entry> {
    let message = Accepted::decode_length_delimited(&mut body).map_err(damaged)?;
    let sizes = [message.identify_bytes, message.track_bytes].map(u64::from);
    if sizes.iter().sum::<u64>() != body.len() as u64 {
        return Err(damaged("a payload's length"));
    }
    let id = integration(&message.integration_id)?;
    let shard = message.shard.map(u16::try_from).transpose();
    let shard = shard.map_err(damaged)?;
    let payloads = || {
        Payloads::new(
            Bytes::copy_from_slice(body),
            message.identify_bytes as usize,
        )
    };
    let key = key_of(&id, &message.capture_id);
    let record = decoded(id, message.capture_id, &message.status)?;
    let lane = shard.map(|shard| LaneKey {
        integration_id: record.integration_id.clone(),
        region: record.region,
        shard,
    });
    Ok(Entry {
        sequence: message.sequence,
        key,
        record: Arc::new(record),
        digest: message
            .digest
            .try_into()
            .map_err(|_| damaged("a digest's length"))?,
        lane,
        waiting: sizes.map(|bytes| shard.map(|_| bytes)),
        origin: Origin::New {
            subject: message.subject,
            payloads: shard.map(|_| payloads()),
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
            record: Arc::new(decoded(id.clone(), one.capture_id, &one.status)?),
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
