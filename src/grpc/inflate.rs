//! Compressed requests: gzip, which many client libraries send by default. Services get their
//! messages plain.

use std::{io::Read, sync::Arc};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::bufread::GzDecoder;
use http::{HeaderMap, HeaderValue};
use tonic::Status;

use super::{Usage, body::HeldBytes};

/// What stands before a message: whether it is compressed, and its length.
const HEAD_BYTES: usize = 5;
/// The beginning of gzip (RFC 1952, "ID1", "ID2").
const MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Bytes at the end of gzip with the length of what was compressed (RFC 1952, "ISIZE").
const LENGTH_BYTES: usize = 4;
/// Bytes of one message of a stream, once inflated. It counts in no budget until it is read,
/// and holds one capture, whose events have 32 KiB at the most.
const MAX_STREAMED_BYTES: usize = 128 * 1024;

/// How the messages of a request are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Plain,
    Gzip,
    /// One that is not taken.
    Other,
}

impl Encoding {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        match headers.get("grpc-encoding").map(HeaderValue::as_bytes) {
            None | Some(b"identity") => Self::Plain,
            Some(b"gzip") => Self::Gzip,
            Some(_) => Self::Other,
        }
    }
}

/// Inflates the messages of one request.
pub(super) struct Inflater {
    input: BytesMut,
    /// Bytes of a message, compressed or not.
    limit: usize,
    /// Takes room for what is inflated, until the call ends.
    held: Option<(Arc<Usage>, Arc<HeldBytes>)>,
}

impl Inflater {
    /// For a call with one message of at most `limit` bytes.
    pub(super) fn unary(limit: usize, held: Option<(Arc<Usage>, Arc<HeldBytes>)>) -> Self {
        Self {
            input: BytesMut::new(),
            limit,
            held,
        }
    }

    /// For a stream of captures.
    pub(super) fn stream(limit: usize) -> Self {
        Self::unary(limit.min(MAX_STREAMED_BYTES), None)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.input.is_empty()
    }

    pub(super) fn feed(&mut self, data: &[u8]) {
        self.input.extend_from_slice(data);
    }

    /// The next message, plain and framed, once it is whole.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, Status> {
        let Some((&[flag, length @ ..], _)) = self.input.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(length) as usize;
        self.check(length)?;
        if self.input.len() < HEAD_BYTES + length {
            return Ok(None);
        }
        let framed = self.input.split_to(HEAD_BYTES + length).freeze();
        match flag {
            0 => Ok(Some(framed)),
            1 => self.inflated(&framed[HEAD_BYTES..]).map(Some),
            _ => Err(malformed("its flag is neither 0 nor 1")),
        }
    }

    fn inflated(&mut self, mut gzip: &[u8]) -> Result<Bytes, Status> {
        if !gzip.starts_with(&MAGIC) {
            return Err(malformed("it does not begin as one"));
        }
        let claimed = gzip.last_chunk::<LENGTH_BYTES>().copied();
        let claimed = claimed.ok_or_else(|| malformed("it is too short"))?;
        let length = u32::from_le_bytes(claimed) as usize;
        self.check(length)?;
        if let Some((usage, bytes)) = &self.held {
            bytes.add(usage.hold(length)?);
        }
        let mut frame = BytesMut::with_capacity(HEAD_BYTES + length);
        frame.put_u8(0);
        frame.put_u32(u32::try_from(length).map_err(|_| malformed("it is too long"))?);
        // One byte more shows that the length is a lie.
        let mut plain = GzDecoder::new(&mut gzip).take(length as u64 + 1);
        let copied = std::io::copy(&mut plain, &mut (&mut frame).writer());
        let copied = copied.map_err(|error| malformed(&error.to_string()))?;
        if copied != length as u64 || gzip.has_remaining() {
            return Err(malformed("its length is not as it says"));
        }
        Ok(frame.freeze())
    }

    fn check(&self, length: usize) -> Result<(), Status> {
        if length <= self.limit {
            return Ok(());
        }
        let limit = self.limit;
        Err(Status::out_of_range(format!(
            "the message is too large: {length} bytes, and at most {limit} are taken"
        )))
    }
}

fn malformed(rule: &str) -> Status {
    Status::invalid_argument(format!("the message is no gzip: {rule}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use tonic::Code;

    use super::*;

    const LIMIT: usize = 10_000;

    fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(plain).expect("written");
        encoder.finish().expect("finished")
    }

    fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
        let mut frame = vec![flag];
        frame.put_u32(u32::try_from(message.len()).expect("short"));
        frame.extend_from_slice(message);
        frame
    }

    fn one(frame: &[u8]) -> Result<Option<Bytes>, Code> {
        let mut inflater = Inflater::unary(LIMIT, None);
        inflater.feed(frame);
        inflater.next().map_err(|status| status.code())
    }

    #[test]
    fn messages_are_plain_afterwards_however_they_are_cut_and_mixed() {
        let messages = [vec![7_u8; 5_000], Vec::new(), (0..=255).collect()];
        let mut bytes = framed(1, &gzip(&messages[0]));
        bytes.extend(framed(0, &messages[1]));
        bytes.extend(framed(1, &gzip(&messages[2])));
        for size in [1, 2, 7, 100, bytes.len()] {
            let mut inflater = Inflater::unary(LIMIT, None);
            let mut found = Vec::new();
            for piece in bytes.chunks(size) {
                inflater.feed(piece);
                while let Some(message) = inflater.next().expect("sound") {
                    found.push(message);
                }
            }
            assert!(inflater.is_empty());
            let expected = messages.each_ref().map(|message| framed(0, message));
            assert_eq!(found, expected, "pieces of {size}");
        }
    }

    #[test]
    fn what_would_be_too_large_is_refused_before_it_is_inflated() {
        let bomb = framed(1, &gzip(&vec![0; 1_000_000]));
        assert_eq!(one(&bomb), Err(Code::OutOfRange));
        // One that says that it is small is inflated as far as it says.
        let mut liar = bomb;
        let length = liar.len();
        liar[length - LENGTH_BYTES..].copy_from_slice(&100_u32.to_le_bytes());
        assert_eq!(one(&liar), Err(Code::InvalidArgument));
        // A head is enough.
        let mut inflater = Inflater::stream(LIMIT);
        inflater.feed(&[1, 0, 0, 0x27, 0x11]);
        assert_eq!(
            inflater.next().expect_err("refused").code(),
            Code::OutOfRange
        );
    }

    #[test]
    fn what_is_no_gzip_is_refused() {
        let whole = gzip(b"a message");
        let mut two = whole.clone();
        two.extend_from_slice(&whole);
        let mut damaged = whole.clone();
        damaged[12] ^= 1;
        let cut = [&whole[..15], &9_u32.to_le_bytes()].concat();
        for bad in [
            &b"abc"[..],
            b"",
            b"no gzip at all",
            &cut[..],
            &two,
            &damaged,
        ] {
            assert_eq!(one(&framed(1, bad)), Err(Code::InvalidArgument), "{bad:?}");
        }
        assert_eq!(one(&framed(2, &whole)), Err(Code::InvalidArgument));
    }
}
