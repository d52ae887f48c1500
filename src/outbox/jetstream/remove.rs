//! Removes messages of queues of which nothing waits any more.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{
    Shared,
    chunk::split,
    deleter::for_each,
    lanes::{Hold, Leased},
    message::LaneRecord,
};
use crate::outbox::{LaneKey, OutboxError};

/// Between two removals of a busy lane: servers look through many messages for each.
const GAP: Duration = Duration::from_millis(250);
/// Messages with payloads of dead letters that a lane's record names.
const MAX_LETTERS: usize = 256;

/// What is to be removed of a lane.
#[derive(Default)]
pub(super) struct Removal {
    /// When all that was passed had been removed; `None` where that is not known.
    done_at: Option<Instant>,
    /// Up to which sequences that was.
    done_to: [u64; 2],
    idle: bool,
    /// Letters' messages that were overwritten, and may still be in the lane's record.
    overwritten: BTreeSet<u64>,
}

impl Removal {
    /// Whether the lane has nothing else to do: then nothing is left for later.
    pub(super) fn set_idle(&mut self, idle: bool) {
        self.idle = idle;
    }

    fn is_due(&self) -> bool {
        self.idle || self.done_at.is_none_or(|at| at.elapsed() >= GAP)
    }

    /// Notes in a lane's record what is left for later: captures that were passed, unless their messages
    /// are removed as soon as it is stored, and the messages of new dead letters.
    pub(super) fn note<'a>(&self, record: &mut LaneRecord, dead: impl Iterator<Item = &'a Leased>) {
        for letter in dead.map(|one| letter(split(one.position).0, one.queue)) {
            if !record.letters.contains(&letter) {
                record.letters.push(letter);
            }
        }
        record.letters.retain(|one| !self.overwritten.contains(one));
        let many = record.letters.len().saturating_sub(MAX_LETTERS);
        record.letters.drain(..many);
        if self.is_due() || !record.letters.is_empty() {
            record.unpurged = 0;
        }
    }
}

fn letter(sequence: u64, queue: usize) -> u64 {
    (sequence << 1) | queue as u64
}

/// The letters whose messages a lane has passed.
fn passed_letters(record: &LaneRecord) -> impl Iterator<Item = u64> {
    let letters = record.letters.iter().copied();
    letters.filter(|letter| {
        let queue = usize::from(letter & 1 == 1);
        letter >> 1 < split(record.cursor(queue)).0
    })
}

impl Shared {
    /// Removes what was passed, unless the lane's record counts it for later; at the first time of a
    /// holder, also what one before it has left.
    pub(super) async fn remove_settled(&self, lane: &LaneKey, hold: &mut Hold) {
        let to = [0, 1].map(|queue| split(hold.record.cursor(queue)).0);
        let is_done = hold.removal.done_at.is_some() && hold.removal.done_to == to;
        if hold.record.unpurged > 0 || is_done {
            return;
        }
        hold.removal.done_at = match self.remove(lane, hold).await {
            Ok(()) => {
                hold.removal.done_to = to;
                Some(Instant::now())
            }
            Err(error) => {
                tracing::warn!(%lane, %error, "what is settled was not removed; it is tried again");
                None
            }
        };
    }

    /// A dead letter has the payload now, so its erasure has to find no other copy: the servers
    /// overwrite it. That costs them milliseconds for each message, so the others are purged.
    async fn remove(&self, lane: &LaneKey, hold: &mut Hold) -> Result<(), OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let letters: Vec<u64> = passed_letters(&hold.record).collect();
        let mut removals = Vec::new();
        for letter in &letters {
            removals.push(self.wire.delete(&stream, letter >> 1, true));
        }
        for_each(removals).await?;
        hold.removal.overwritten = letters.into_iter().collect();
        for queue in 0..2 {
            let (before, _) = split(hold.record.cursor(queue));
            if before == 0 {
                continue;
            }
            let subjects = self.layout.chunks(lane, queue);
            self.wire.purge_before(&stream, &subjects, before).await?;
            while let Some(sequence) = hold.replaced[queue].first().filter(|it| **it < before) {
                let subjects = self.layout.replaced_at(lane, *sequence);
                while let Some((stored, _)) = self.wire.last(&stream, &subjects).await? {
                    self.wire.delete(&stream, stored.sequence, true).await?;
                }
                hold.replaced[queue].pop_first();
            }
        }
        Ok(())
    }
}
