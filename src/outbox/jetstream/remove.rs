//! Removes messages of queues of which nothing waits any more.

use std::time::Instant;

use super::{Shared, deleter::for_each, lanes::Hold, position::split, removal::passed_letters};
use crate::outbox::{LaneKey, OutboxError};

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
