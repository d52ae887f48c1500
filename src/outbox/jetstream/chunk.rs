//! Waiting captures of a lane share a message: they are put together here, and taken apart.
//! A message costs the servers more than its bytes do, so that this is most of the throughput.

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message;

use super::{
    Layout, OutboxError,
    message::{Captures, Chunk, StoredRecord, Waiting, damaged, decode},
    position,
    wire::ToStore,
};
use crate::{integration::IntegrationId, outbox::LaneKey};

/// Captures of one message at the most.
const MAX_CAPTURES: usize = position::PLACES;
/// Bytes of events after which the next message begins: far below the megabyte that servers
/// take by default, and little to read for a lease that needs only a part of it.
const MAX_BYTES: usize = 128 * 1024;
/// Bytes from which compression is worth it: a few captures.
const MIN_PACKED: usize = 4 * 1024;
/// Bytes of a message after it was unpacked, at the most.
const MAX_UNPACKED: usize = 8 * 1024 * 1024;

/// Puts captures into one message.
pub(super) fn pack(captures: Vec<Waiting>) -> Bytes {
    let plain = Captures { captures }.encode_to_vec();
    let packed = (plain.len() >= MIN_PACKED).then(|| lz4_flex::block::compress(&plain));
    // What is encrypted does not get smaller.
    let packed = packed.filter(|packed| packed.len() < plain.len() / 8 * 7);
    let chunk = match (packed, u32::try_from(plain.len())) {
        (Some(packed), Ok(length)) => Chunk {
            captures: packed.into(),
            length,
        },
        _ => Chunk {
            captures: plain.into(),
            length: 0,
        },
    };
    chunk.encode_to_vec().into()
}

/// Takes the captures out of a message.
pub(super) fn unpack(message: Bytes) -> Result<Vec<Waiting>, OutboxError> {
    let chunk: Chunk = decode("chunk", message)?;
    let plain = match chunk.length as usize {
        0 => chunk.captures,
        length if length > MAX_UNPACKED => {
            return Err(damaged("chunk", &format!("it has {length} bytes")));
        }
        length => lz4_flex::block::decompress(&chunk.captures, length)
            .map_err(|error| damaged("chunk", &error))?
            .into(),
    };
    Ok(decode::<Captures>("chunk", plain)?.captures)
}

/// A capture that is to be stored.
pub(super) struct ToPack {
    pub(super) id: IntegrationId,
    pub(super) stored: StoredRecord,
    /// The sequence of its record's last version; 0 for none.
    pub(super) expected: u64,
    pub(super) keep: Option<std::time::Duration>,
    /// In which queue it waits, with its payloads.
    pub(super) waiting: Option<(LaneKey, usize, Waiting)>,
}

/// The messages of one batch: records, then what waits, then what else there is.
pub(super) struct Packer<'a> {
    layout: &'a Layout,
    records: Vec<(ToPack, Option<Place>)>,
    chunks: Vec<Open>,
    /// The chunk of a queue that may get more.
    open: HashMap<(LaneKey, usize), usize>,
    rest: Vec<ToStore>,
}

/// A capture's chunk, and its place in it.
#[derive(Clone, Copy)]
struct Place {
    chunk: usize,
    index: usize,
}

struct Open {
    lane: LaneKey,
    queue: usize,
    captures: Vec<Waiting>,
    bytes: usize,
}

impl<'a> Packer<'a> {
    pub(super) fn new(layout: &'a Layout) -> Self {
        Self {
            layout,
            records: Vec::new(),
            chunks: Vec::new(),
            open: HashMap::new(),
            rest: Vec::new(),
        }
    }

    /// Adds a capture; those of one queue keep their order.
    pub(super) fn add(&mut self, mut capture: ToPack) {
        let waiting = capture.waiting.take();
        let bytes = capture.stored.status.len();
        let place = waiting.map(|waiting| self.place(waiting, bytes));
        self.records.push((capture, place));
    }

    /// Adds a message that belongs to the batch.
    pub(super) fn add_message(&mut self, message: ToStore) {
        self.rest.push(message);
    }

    fn place(
        &mut self,
        (lane, queue, waiting): (LaneKey, usize, Waiting),
        record_bytes: usize,
    ) -> Place {
        let payloads = [&waiting.identify, &waiting.track];
        let sizes = payloads.map(|one| one.as_ref().map_or(0, |payload| payload.bytes.len()));
        let bytes = sizes.iter().sum::<usize>() + record_bytes;
        let key = (lane, queue);
        let with_room = self.open.get(&key).copied().filter(|chunk| {
            let open = &self.chunks[*chunk];
            open.captures.len() < MAX_CAPTURES && open.bytes + bytes <= MAX_BYTES
        });
        let chunk = with_room.unwrap_or_else(|| {
            self.chunks.push(Open {
                lane: key.0.clone(),
                queue,
                captures: Vec::new(),
                bytes: 0,
            });
            self.open.insert(key, self.chunks.len() - 1);
            self.chunks.len() - 1
        });
        let open = &mut self.chunks[chunk];
        open.bytes += bytes;
        open.captures.push(waiting);
        Place {
            chunk,
            index: open.captures.len() - 1,
        }
    }

    /// The messages, in the order in which they are to be stored.
    pub(super) fn finish(mut self) -> Vec<ToStore> {
        let count = self.records.len();
        let mut messages = Vec::with_capacity(count + self.chunks.len() + self.rest.len());
        for (number, (capture, place)) in self.records.into_iter().enumerate() {
            let mut stored = capture.stored;
            if let Some(Place { chunk, index }) = place {
                stored.queued_at = 0;
                stored.behind = u32::try_from(count - number + chunk).unwrap_or(u32::MAX);
                stored.index = u32::try_from(index).unwrap_or(u32::MAX);
            }
            messages.push(ToStore {
                subject: self.layout.record(&capture.id, &stored.capture_id),
                payload: stored.encode_to_vec().into(),
                expected: Some(capture.expected),
                keep: capture.keep,
            });
            if let Some(Place { chunk, index }) = place {
                self.chunks[chunk].captures[index].record = Some(stored);
            }
        }
        messages.extend(self.chunks.into_iter().map(|chunk| {
            ToStore {
                subject: self
                    .layout
                    .chunk(&chunk.lane, chunk.queue, chunk.captures.len()),
                payload: pack(chunk.captures),
                expected: None,
                keep: None,
            }
        }));
        messages.extend(self.rest);
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::{super::position::split, *};
    use crate::outbox::{conformance, jetstream::message::Payload};

    fn lane(shard: u16) -> LaneKey {
        LaneKey {
            shard,
            ..conformance::lane("acme")
        }
    }

    fn capture(number: usize, waits: Option<(u16, usize)>) -> ToPack {
        let stored = StoredRecord {
            capture_id: format!("c-{number}"),
            ..StoredRecord::default()
        };
        let waiting = waits.map(|(shard, bytes)| {
            let waiting = Waiting {
                track: Some(Payload::new(vec![b'x'; bytes])),
                ..Waiting::default()
            };
            (lane(shard), 0, waiting)
        });
        ToPack {
            id: IntegrationId::new("acme").expect("valid"),
            stored,
            expected: 0,
            keep: None,
            waiting,
        }
    }

    fn layout() -> Layout {
        Layout {
            prefix: "relay".to_owned(),
            partitions: 1,
            replicas: 1,
            max_bytes: None,
            cluster: None,
            tags: Vec::new(),
        }
    }

    #[test]
    fn each_record_says_where_its_payloads_wait() {
        let layout = layout();
        let mut packer = Packer::new(&layout);
        let big = MAX_BYTES / 2 + 1;
        let waits = [
            Some((0, 10)),
            Some((1, big)),
            None,
            Some((1, big)),
            Some((0, 10)),
        ];
        for (number, waits) in waits.into_iter().enumerate() {
            packer.add(capture(number, waits));
        }
        let messages = packer.finish();
        // Five records, one chunk of two for one lane, two of one for the other.
        let subjects: Vec<_> = messages[5..]
            .iter()
            .map(|one| one.subject.as_str())
            .collect();
        assert_eq!(
            subjects,
            [
                "relay.0.q.acme.non_eu.0.l.2",
                "relay.0.q.acme.non_eu.1.l.1",
                "relay.0.q.acme.non_eu.1.l.1"
            ]
        );
        let first = 1_000;
        for (number, message) in messages[..5].iter().enumerate() {
            let stored: StoredRecord = decode("record", message.payload.clone()).expect("sound");
            let Some(found) = stored.position(first + number as u64) else {
                assert_eq!(number, 2, "the one that waits nowhere");
                continue;
            };
            let (sequence, index) = split(found);
            let place = usize::try_from(sequence - first).expect("small");
            let captures = unpack(messages[place].payload.clone()).expect("sound");
            assert_eq!(captures[index].record.as_ref(), Some(&stored));
        }
    }

    #[test]
    fn captures_come_out_as_they_went_in_and_what_is_damaged_is_an_error() {
        let captures: Vec<Waiting> = (0..300)
            .filter_map(|number| capture(number, Some((0, 500))).waiting)
            .map(|(_, _, waiting)| waiting)
            .collect();
        let packed = pack(captures.clone());
        assert!(packed.len() < 300 * 500 / 10, "{}", packed.len());
        assert_eq!(unpack(packed.clone()).expect("sound"), captures);
        unpack(packed.slice(..packed.len() / 2)).expect_err("cut off");
        let bomb = Chunk {
            captures: packed,
            length: u32::MAX,
        };
        let error = unpack(bomb.encode_to_vec().into()).expect_err("too long");
        assert!(error.to_string().contains("4294967295 bytes"), "{error}");
    }
}
