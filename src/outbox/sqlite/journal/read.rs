//! Reads the segments' files, and tells damage from a write that was cut off.
//!
//! A power loss leaves the last group in pieces: some of its blocks are on the disk, in any
//! order. It was not acknowledged. All groups before it were synced. So a record that is missing
//! before the last group's first one was acknowledged, and has been damaged since.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

use super::{HEAD_BYTES, Layout, MAX_RECORD_BYTES, Record};

/// A number that lies further ahead is none: the bytes look like a record by chance.
const MAX_AHEAD: u64 = 1 << 32;

/// What all segments hold.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// Whole records by their numbers, wherever they stand.
    pub(super) records: BTreeMap<u64, Record>,
    /// Records before this one were synced.
    synced_before: u64,
}

impl Content {
    /// Reads a segment for records after `applied`. Segments are read in the order of their
    /// first records: of two with one number the later one counts.
    pub(super) fn read(&mut self, file: &mut File, applied: u64) -> io::Result<()> {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut bytes)?;
        let (layout, mut at) = match head(&bytes) {
            Some((layout, _)) => (layout, HEAD_BYTES),
            None => (Layout::Present, 0),
        };
        while at < bytes.len() {
            let Some((record, place, length)) = record_at(&bytes[at..], layout, applied) else {
                at += 1;
                continue;
            };
            self.synced_before = self.synced_before.max(record.number - place);
            self.records.insert(record.number, record);
            at += length;
        }
        Ok(())
    }

    /// How many records after `applied` were acknowledged and are missing.
    pub(super) fn missing(&self, applied: u64) -> u64 {
        let there = self.records.range(..self.synced_before).count() as u64;
        (self.synced_before.saturating_sub(applied + 1)).saturating_sub(there)
    }

    /// How many records are missing in the last group, which need not have been acknowledged.
    pub(super) fn cut_off(&self, applied: u64) -> u64 {
        let first = self.synced_before.max(applied + 1);
        let Some((last, _)) = self.records.last_key_value() else {
            return 0;
        };
        let there = self.records.range(first..).count() as u64;
        (last + 1).saturating_sub(first).saturating_sub(there)
    }
}

/// The layout and the number of the first record; `None` where it holds none, or is damaged.
pub(super) fn head(bytes: &[u8]) -> Option<(Layout, u64)> {
    let head = bytes.get(..HEAD_BYTES)?;
    let layout = [Layout::Present, Layout::Former]
        .into_iter()
        .find(|layout| head.starts_with(layout.magic()))?;
    (crc32fast::hash(&head[..16]) == u32_at(head, 16)).then(|| (layout, u64_at(head, 8)))
}

/// A record after `applied`, its place in its group, and its length with its head.
fn record_at(bytes: &[u8], layout: Layout, applied: u64) -> Option<(Record, u64, usize)> {
    let head = bytes.get(..layout.record_head_bytes())?;
    let number = u64_at(head, 8);
    if number <= applied || number - applied > MAX_AHEAD {
        return None;
    }
    let length = u32_at(head, 0);
    if length > MAX_RECORD_BYTES {
        return None;
    }
    let body = bytes.get(head.len()..)?.get(..length as usize)?;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head[8..]);
    crc.update(body);
    if crc.finalize() != u32_at(head, 4) {
        return None;
    }
    let place = match layout {
        Layout::Present => u64::from(u32_at(head, 16)),
        // Not known: it may belong to the first group of all.
        Layout::Former => number - applied - 1,
    };
    let record = Record {
        number,
        kind: *head.last()?,
        body: body.to_vec(),
    };
    (place < number).then_some((record, place, head.len() + body.len()))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}
