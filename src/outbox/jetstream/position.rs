//! Places in a queue: the sequence of a message, and a place in it, in one number.

/// Bits for the place in the message.
const INDEX_BITS: u32 = 10;
/// Places that a message has.
pub(super) const PLACES: usize = 1 << INDEX_BITS;

/// A place in a queue: the message's sequence, and the place in the message.
pub(super) fn position(sequence: u64, index: usize) -> u64 {
    (sequence << INDEX_BITS) | (index as u64 & (PLACES as u64 - 1))
}

/// The sequence and the place of a position.
pub(super) fn split(position: u64) -> (u64, usize) {
    let index = position & (PLACES as u64 - 1);
    (
        position >> INDEX_BITS,
        usize::try_from(index).unwrap_or_default(),
    )
}
