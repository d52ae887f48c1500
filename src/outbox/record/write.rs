//! Writes fields of protobuf messages without making the messages first. As in proto3, a
//! field with its default value is left out.

use prost::encoding::{WireType, encode_key, encode_varint};

/// `bool`, `uint32`, `uint64`.
pub(in crate::outbox) fn number(tag: u32, value: u64, bytes: &mut Vec<u8>) {
    if value != 0 {
        encode_key(tag, WireType::Varint, bytes);
        encode_varint(value, bytes);
    }
}

/// `sint64`.
pub(in crate::outbox) fn signed(tag: u32, value: i64, bytes: &mut Vec<u8>) {
    number(tag, ((value << 1) ^ (value >> 63)).cast_unsigned(), bytes);
}

/// `int64`, and enumerations, which are `int32` and extended with their sign.
pub(in crate::outbox) fn plain(tag: u32, value: i64, bytes: &mut Vec<u8>) {
    number(tag, value.cast_unsigned(), bytes);
}

/// An enumeration's value.
pub(in crate::outbox) fn enumeration(tag: u32, value: i32, bytes: &mut Vec<u8>) {
    plain(tag, value.into(), bytes);
}

/// `string`, `bytes`.
pub(in crate::outbox) fn bytes(tag: u32, value: &[u8], bytes: &mut Vec<u8>) {
    if !value.is_empty() {
        encode_key(tag, WireType::LengthDelimited, bytes);
        encode_varint(value.len() as u64, bytes);
        bytes.extend_from_slice(value);
    }
}

/// A message in a field, also an empty one.
pub(in crate::outbox) fn nested(tag: u32, bytes: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    encode_key(tag, WireType::LengthDelimited, bytes);
    delimited(bytes, write);
}

/// A message after its length.
pub(in crate::outbox) fn delimited(bytes: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    bytes.push(0);
    write(bytes);
    let length = bytes.len() - start - 1;
    match u8::try_from(length) {
        Ok(short) if short < 0x80 => bytes[start] = short,
        _ => {
            let mut head = Vec::new();
            encode_varint(length as u64, &mut head);
            bytes.splice(start..=start, head);
        }
    }
}
