//! The journal: what has been acknowledged and is not in the database yet.
//!
//! # Files
//! Three segments, `relay.journal-0` to `-2`, used in turn. While one is written and the
//! one before it rests, what stands in the third goes into the database; then it is
//! free. A free segment is written over from its start, or with zeros where nothing
//! comes.
//!
//! # Layout
//! A head: magic (8 bytes), number of the first record (8), CRC-32 of both (4). Then
//! records without gaps: length of the body (4), CRC-32 of all that follows (4),
//! number (8), records of its group before it (4), kind (1), body. Integers are
//! little-endian. Numbers count up by one and never repeat, so what an earlier use has
//! left behind is known by its numbers. The former layout (magic `SegRjnl1`) does not have
//! the records before it in its group; it is read, and written no more.
//!
//! # Damage
//! All whole records are found, also behind one that is damaged. Where one is missing that
//! was acknowledged, the journal is not opened ([`JournalError`]), unless that is asked for:
//! then the files are kept beside the new ones, and all other records count.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
};

use bytes::{Bytes, BytesMut};

mod files;
mod read;
pub(super) mod record;

pub use files::JournalError;
pub(super) use files::{OnDamage, look, prepare, sync_directory};
use files::{keep, open_private};

const HEAD_BYTES: usize = 20;
const RECORD_HEAD_BYTES: usize = Layout::Present.record_head_bytes();
/// A longer record is none: it is damaged.
const MAX_RECORD_BYTES: u32 = 256 * 1024 * 1024;
/// Groups share pieces of memory of this size.
const BUFFER_BYTES: usize = 256 * 1024;
/// Zeros are written in pieces of this size.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// How records are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// As described above.
    Present,
    /// Without the place in the group.
    Former,
}

impl Layout {
    const fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Present => b"SegRjnl2",
            Self::Former => b"SegRjnl1",
        }
    }

    const fn record_head_bytes(self) -> usize {
        match self {
            Self::Present => 21,
            Self::Former => 17,
        }
    }
}

/// A record as it stands in the journal.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Its place in the order of all records.
    pub(super) number: u64,
    /// What it is; `journal` does not care.
    pub(super) kind: u8,
    /// Its content.
    pub(super) body: Vec<u8>,
}

#[derive(Debug)]
struct Segment {
    file: File,
    /// Where the next record goes.
    end: u64,
    /// Where the file's cursor stands, if that is known.
    cursor: Option<u64>,
    /// Behind this nothing has been written since it was zeroed.
    used: u64,
    /// Number of the last record.
    last: u64,
}

const SEGMENTS: usize = 3;
const NAMES: [&str; SEGMENTS] = ["relay.journal-0", "relay.journal-1", "relay.journal-2"];

/// The segments, one of which is written.
#[derive(Debug)]
pub(super) struct Journal {
    segments: [Segment; SEGMENTS],
    active: usize,
    /// All records up to this number are in the database.
    applied: u64,
    /// Number of the next record.
    next: u64,
    /// The group. Payloads of captures that wait stay in its memory.
    buffer: BytesMut,
    staged: u64,
    broken: bool,
    /// Longer segments are cut back to this, in bytes.
    kept_bytes: u64,
}

impl Journal {
    /// Opens the segments, and hands over all whole records after `applied` in order.
    /// Nothing is written until [`Self::restart`].
    pub(super) fn open(
        directory: &Path,
        applied: u64,
        kept_bytes: u64,
        on_damage: OnDamage,
        mut each: impl FnMut(Record) -> io::Result<()>,
    ) -> Result<Self, JournalError> {
        let open = |name| -> io::Result<Segment> {
            let file = open_private(&directory.join(name))?;
            let used = file.metadata()?.len();
            Ok(Segment {
                file,
                end: 0,
                cursor: None,
                used,
                last: 0,
            })
        };
        let [first, second, third] = NAMES;
        let mut segments = [open(first)?, open(second)?, open(third)?];
        let mut firsts = [0; SEGMENTS];
        for (segment, first) in segments.iter_mut().zip(&mut firsts) {
            *first = segment.first()?.unwrap_or(u64::MAX);
        }
        let mut order = [0, 1, 2];
        order.sort_by_key(|index| firsts[*index]);
        let mut content = read::Content::default();
        for index in order {
            content.read(&mut segments[index].file, applied)?;
        }
        match (content.missing(applied), on_damage) {
            (0, _) => {}
            (missing, OnDamage::Refuse) => return Err(JournalError::Damaged(missing)),
            (missing, OnDamage::Accept) => {
                tracing::error!(missing, "acknowledged records of the journal are lost");
                keep(directory)?;
            }
        }
        let cut_off = content.cut_off(applied);
        if cut_off > 0 {
            tracing::warn!(
                records = cut_off,
                "the last write of the journal was cut off: these were not acknowledged, unless \
                 the disk is damaged"
            );
        }
        let mut next = applied + 1;
        for (number, record) in content.records {
            each(record)?;
            next = number + 1;
        }
        Ok(Self {
            segments,
            active: 0,
            applied,
            next,
            buffer: BytesMut::new(),
            staged: 0,
            broken: false,
            kept_bytes,
        })
    }

    /// Begins anew, with all segments free: all records are in the database.
    pub(super) fn restart(&mut self) {
        self.broken = false;
        self.applied = self.last();
        self.active = (self.active + 1) % SEGMENTS;
        self.begin();
    }

    /// Goes on in the next segment, if it is free.
    pub(super) fn rotate(&mut self) -> bool {
        let next = (self.active + 1) % SEGMENTS;
        let free = self.is_free(next) && !self.broken;
        if free {
            self.active = next;
            self.begin();
        }
        free
    }

    /// Number of the last record before the segment that is written and the one before
    /// it.
    pub(super) fn settled_through(&self) -> u64 {
        self.segments[(self.active + 1) % SEGMENTS].last
    }

    /// Notes that all records up to this number are in the database.
    pub(super) fn note_applied(&mut self, through: u64) {
        self.applied = self.applied.max(through);
    }

    /// All records up to this number are in the database.
    pub(super) fn applied(&self) -> u64 {
        self.applied
    }

    /// Whether the database has all records.
    pub(super) fn is_applied(&self) -> bool {
        self.last() <= self.applied
    }

    fn is_free(&self, index: usize) -> bool {
        index != self.active && self.segments[index].last <= self.applied
    }

    fn begin(&mut self) {
        let segment = &mut self.segments[self.active];
        (segment.end, segment.last) = (0, self.next - 1);
        self.buffer.clear();
        self.staged = 0;
        self.buffer.extend_from_slice(Layout::Present.magic());
        self.buffer.extend_from_slice(&self.next.to_le_bytes());
        let crc = crc32fast::hash(&self.buffer);
        self.buffer.extend_from_slice(&crc.to_le_bytes());
    }

    /// Makes room for a group of about so many bytes.
    pub(super) fn reserve(&mut self, bytes: usize) {
        if self.buffer.capacity() - self.buffer.len() < bytes {
            self.buffer.reserve(bytes.max(BUFFER_BYTES));
        }
    }

    /// Adds a record to the group that the next [`Self::commit`] makes durable. Its body
    /// is put together from parts. Returns where it ends in the group.
    pub(super) fn push(&mut self, kind: u8, body: &[&[u8]]) -> usize {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&[0; RECORD_HEAD_BYTES]);
        self.buffer[start + 8..start + 16].copy_from_slice(&self.next.to_le_bytes());
        // At most as many as fit into the memory of a group.
        let place = u32::try_from(self.staged).unwrap_or(u32::MAX);
        self.buffer[start + 16..start + 20].copy_from_slice(&place.to_le_bytes());
        self.buffer[start + 20] = kind;
        for part in body {
            self.buffer.extend_from_slice(part);
        }
        let length = self.buffer.len() - start - RECORD_HEAD_BYTES;
        // A group is far smaller than 4 GiB.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let crc = crc32fast::hash(&self.buffer[start + 8..]);
        self.buffer[start..start + 4].copy_from_slice(&length.to_le_bytes());
        self.buffer[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
        self.next += 1;
        self.staged += 1;
        self.buffer.len()
    }

    /// Makes the group durable with one write and one sync; returns its bytes.
    ///
    /// # Errors
    /// What the system said. Nothing of the group counts then, and since a failed sync
    /// says nothing about what is on the disk, nothing more is taken until
    /// [`Self::restart`].
    pub(super) fn commit(&mut self) -> io::Result<Bytes> {
        if self.broken {
            self.forget_group();
            return Err(io::Error::other("the journal is broken"));
        }
        if self.staged == 0 {
            return Ok(Bytes::new());
        }
        let segment = &mut self.segments[self.active];
        if let Err(error) = segment.append(&self.buffer) {
            // So that a restart does not find what was refused.
            if segment.file.set_len(segment.end).is_ok() {
                segment.used = segment.end;
            }
            self.broken = true;
            self.forget_group();
            return Err(error);
        }
        segment.last = self.next - 1;
        self.staged = 0;
        Ok(self.buffer.split().freeze())
    }

    /// Takes back what was pushed since the last [`Self::commit`].
    pub(super) fn forget_group(&mut self) {
        self.next -= self.staged;
        self.staged = 0;
        let head = match self.segments[self.active].end {
            0 => HEAD_BYTES,
            _ => 0,
        };
        self.buffer.truncate(head);
    }

    /// Whether a write has failed since the last restart.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Number of the last record.
    pub(super) fn last(&self) -> u64 {
        self.next - 1
    }

    /// Bytes in the segment that is written.
    pub(super) fn active_bytes(&self) -> u64 {
        self.segments[self.active].end
    }

    /// Whether a segment that is free, or in which nothing stands yet, still holds what
    /// was written once.
    pub(super) fn has_leftovers(&self) -> bool {
        (0..SEGMENTS).any(|index| self.is_left_over(index))
    }

    fn is_left_over(&self, index: usize) -> bool {
        let segment = &self.segments[index];
        let empty = index == self.active && segment.end == 0;
        segment.used > 0 && (empty || self.is_free(index))
    }

    /// Writes zeros over what is left there.
    pub(super) fn erase_free(&mut self) -> io::Result<()> {
        for index in 0..SEGMENTS {
            if self.is_left_over(index) {
                self.segments[index].erase(self.kept_bytes)?;
            }
        }
        Ok(())
    }

    /// Writes zeros over all segments, waits until they are on the disk, and gives
    /// the space back. Needs a restart afterwards.
    pub(super) fn erase(&mut self) -> io::Result<()> {
        for segment in &mut self.segments {
            segment.erase(0)?;
        }
        Ok(())
    }
}

impl Segment {
    /// Number of the first record.
    fn first(&mut self) -> io::Result<Option<u64>> {
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(0))?;
        let head = HEAD_BYTES as u64;
        Read::by_ref(&mut self.file)
            .take(head)
            .read_to_end(&mut bytes)?;
        Ok(read::head(&bytes).map(|(_, first)| first))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let end = self.end + bytes.len() as u64;
        self.used = self.used.max(end);
        if self.cursor.take() != Some(self.end) {
            self.file.seek(SeekFrom::Start(self.end))?;
        }
        self.file.write_all(bytes)?;
        self.file.sync_data()?;
        (self.end, self.cursor) = (end, Some(end));
        Ok(())
    }

    fn erase(&mut self, kept_bytes: u64) -> io::Result<()> {
        self.cursor = None;
        self.file.seek(SeekFrom::Start(0))?;
        let mut left = self.used;
        while left > 0 {
            let piece = left.min(ZEROS.len() as u64);
            // At most as long as the array.
            self.file
                .write_all(&ZEROS[..usize::try_from(piece).unwrap_or(0)])?;
            left -= piece;
        }
        if self.file.metadata()?.len() > kept_bytes {
            // Zeros that are only in memory would be cut off with what they cover.
            self.file.sync_data()?;
            self.file.set_len(kept_bytes)?;
        }
        self.used = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
