//! What of a lane is to be removed, and when.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{message::LaneRecord, position::split};

/// Between two removals of a busy lane: servers look through many messages for each.
const GAP: Duration = Duration::from_millis(250);
/// Messages with payloads of dead letters that a lane's record names.
const MAX_LETTERS: usize = 256;

/// What is to be removed of a lane.
#[derive(Default)]
pub(super) struct Removal {
    /// When all that was passed had been removed; `None` where that is not known.
    pub(super) done_at: Option<Instant>,
    /// Up to which sequences that was.
    pub(super) done_to: [u64; 2],
    /// Letters' messages that were overwritten, and may still be in the lane's record.
    pub(super) overwritten: BTreeSet<u64>,
}

impl Removal {
    fn is_due(&self) -> bool {
        self.done_at.is_none_or(|at| at.elapsed() >= GAP)
    }

    /// Notes in a lane's record what is left for later: captures that were passed, unless their messages
    /// are removed as soon as it is stored, and the messages of new dead letters, given by
    /// position and queue. Where the lane is idle, nothing is left for later.
    pub(super) fn note(
        &self,
        record: &mut LaneRecord,
        dead: impl Iterator<Item = (u64, usize)>,
        idle: bool,
    ) {
        for letter in dead.map(|(position, queue)| letter(split(position).0, queue)) {
            if !record.letters.contains(&letter) {
                record.letters.push(letter);
            }
        }
        record.letters.retain(|one| !self.overwritten.contains(one));
        let many = record.letters.len().saturating_sub(MAX_LETTERS);
        record.letters.drain(..many);
        if idle || self.is_due() || !record.letters.is_empty() {
            record.unpurged = 0;
        }
    }
}

fn letter(sequence: u64, queue: usize) -> u64 {
    (sequence << 1) | queue as u64
}

/// The letters whose messages a lane has passed.
pub(super) fn passed_letters(record: &LaneRecord) -> impl Iterator<Item = u64> {
    let letters = record.letters.iter().copied();
    letters.filter(|letter| {
        let queue = usize::from(letter & 1 == 1);
        letter >> 1 < split(record.cursor(queue)).0
    })
}
