//! Removes messages of queues of which nothing waits any more.

use std::collections::BTreeSet;

use super::{Shared, chunk::split, deleter::for_each, lanes::Hold};
use crate::{
    event::EventType,
    outbox::{LaneKey, OutboxError},
    status::State,
};

impl Shared {
    /// Removes what was passed since the last time; at the first time of a holder, also what one
    /// before it has left.
    pub(super) async fn remove_settled(&self, lane: &LaneKey, hold: &mut Hold) {
        let (mut passed, mut letters) = (false, BTreeSet::new());
        for one in &hold.leased {
            let (sequence, cursor) = (split(one.position).0, hold.record.cursor(one.queue));
            let dead = |event| matches!(one.record.event(event).state, State::DeadLettered { .. });
            if sequence < split(cursor).0 {
                passed = true;
                if EventType::ALL.into_iter().any(dead) {
                    letters.insert(sequence);
                }
            }
        }
        if !passed && !hold.unpurged {
            return;
        }
        hold.unpurged = match self.remove(lane, hold, letters).await {
            Ok(()) => false,
            Err(error) => {
                tracing::warn!(%lane, %error, "what is settled was not removed; it is tried again");
                true
            }
        };
    }

    /// A dead letter has the payload now, so its erasure has to find no other copy: the servers
    /// overwrite it. That costs them milliseconds for each message, so the others are purged.
    async fn remove(
        &self,
        lane: &LaneKey,
        hold: &mut Hold,
        letters: BTreeSet<u64>,
    ) -> Result<(), OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let mut removals = Vec::new();
        for sequence in &letters {
            removals.push(self.wire.delete(&stream, *sequence, true));
        }
        for_each(removals).await?;
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
