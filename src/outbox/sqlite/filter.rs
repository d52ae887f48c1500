//! Which ids may be known: a Bloom filter that never misses one. A new capture's id is
//! not in it, but for a few of a thousand, and needs no look-up then.

use std::sync::atomic::{AtomicU64, Ordering};

/// Words of a block: a line of the processor's cache, so that an id touches one.
const BLOCK_WORDS: usize = 8;
/// Ids for which a block has room: 16 bits each, which leaves 2 to 3 in a thousand unknown
/// ones to look up. With half of the bits it is 2 to 3 in a hundred.
const BLOCK_KEYS: u64 = 32;
/// Bits that an id sets.
const PROBES: u32 = 6;
/// Bits that choose a bit of a block.
const PLACE_BITS: u32 = 9;
/// Room for half a million ids, in 1 MiB.
const MIN_BLOCKS: u64 = 16_384;
/// Room for 16 million ids, in 32 MiB. With more it only lets more unknown ones through.
const MAX_BLOCKS: u64 = 524_288;

/// See the module's description. Shared by threads without a lock.
#[derive(Debug)]
pub(super) struct Filter {
    words: Box<[AtomicU64]>,
    /// Number of blocks less one; they are a power of two.
    mask: u64,
}

impl Filter {
    /// An empty one with room for so many ids, within the bounds of its size.
    pub(super) fn with_room_for(keys: u64) -> Self {
        let blocks = keys.div_ceil(BLOCK_KEYS).clamp(MIN_BLOCKS, MAX_BLOCKS);
        let blocks = blocks.next_power_of_two();
        let words = (0..blocks).flat_map(|_| [const { AtomicU64::new(0) }; BLOCK_WORDS]);
        Self {
            words: words.collect(),
            mask: blocks - 1,
        }
    }

    /// How many ids it has room for.
    pub(super) fn room(&self) -> u64 {
        (self.mask + 1) * BLOCK_KEYS
    }

    /// Notes an id, by the part of its key that the database has.
    pub(super) fn add(&self, key: i64) {
        for (word, bit) in self.places(key) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Whether an id may have been noted; if it was, then always.
    pub(super) fn may_hold(&self, key: i64) -> bool {
        self.places(key)
            .all(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn places(&self, key: i64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        // A key is a hash already; its other bits choose the places in the block.
        let key = key.cast_unsigned();
        let block = usize::try_from(key & self.mask).unwrap_or(0) * BLOCK_WORDS;
        let spread = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (1..=PROBES).map(move |probe| {
            let place = (spread >> (u64::BITS - PLACE_BITS * probe)) & ((1 << PLACE_BITS) - 1);
            let word = usize::try_from(place / 64).unwrap_or(0);
            (&self.words[block + word], 1 << (place % 64))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: i64) -> i64 {
        use sha2::{Digest, Sha256};
        let hash = Sha256::digest(number.to_le_bytes());
        let mut key = [0; 8];
        key.copy_from_slice(&hash[..8]);
        i64::from_le_bytes(key)
    }

    #[test]
    fn what_was_added_is_always_found_and_of_the_others_few() {
        let filter = Filter::with_room_for(0);
        let room = i64::try_from(filter.room()).expect("small");
        assert_eq!(room, 524_288);
        for number in 0..room {
            filter.add(key(number));
        }
        assert!((0..room).all(|number| filter.may_hold(key(number))));
        let wrong = (room..2 * room).filter(|number| filter.may_hold(key(*number)));
        let share = wrong.count() as f64 / room as f64;
        assert!(share < 0.006, "{share}");
    }

    #[test]
    fn its_size_is_bounded() {
        assert_eq!(Filter::with_room_for(2_000_000).room(), 2_097_152);
        assert_eq!(Filter::with_room_for(u64::MAX).room(), 16_777_216);
    }
}
