//! Reads a segment from its file.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

use super::{HEAD_BYTES, MAGIC, MAX_RECORD_BYTES, RECORD_HEAD_BYTES, Record};

/// Number of the first record; `None` where the segment holds none.
pub(super) fn head(file: &mut File) -> io::Result<Option<u64>> {
    let mut head = [0; HEAD_BYTES];
    file.seek(SeekFrom::Start(0))?;
    match file.read_exact(&mut head) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let sound = head[..8] == MAGIC && crc32fast::hash(&head[..16]) == u32_at(&head, 16);
    Ok(sound.then(|| u64_at(&head, 8)))
}

/// Reads what follows the head; returns the number after the last whole record.
pub(super) fn records(
    file: &mut File,
    first: u64,
    mut each: impl FnMut(Record) -> io::Result<()>,
) -> io::Result<u64> {
    let mut left = file.metadata()?.len().saturating_sub(HEAD_BYTES as u64);
    let mut file = io::BufReader::with_capacity(1024 * 1024, file);
    let mut next = first;
    while let Some(rest) = left.checked_sub(RECORD_HEAD_BYTES as u64) {
        let mut head = [0; RECORD_HEAD_BYTES];
        file.read_exact(&mut head)?;
        let length = u32_at(&head, 0);
        if length > MAX_RECORD_BYTES || u64::from(length) > rest || u64_at(&head, 8) != next {
            break;
        }
        let mut body = vec![0; length as usize];
        file.read_exact(&mut body)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&head[8..]);
        crc.update(&body);
        if crc.finalize() != u32_at(&head, 4) {
            break;
        }
        let kind = head[16];
        each(Record {
            number: next,
            kind,
            body,
        })?;
        next += 1;
        left = rest - u64::from(length);
    }
    Ok(next)
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
