//! From the journal into the database: when, and what happens to the journal then.

use std::time::{Duration, Instant};

use super::{Committer, Reply, failed};
use crate::outbox::{
    OutboxError,
    sqlite::writer::{Done, FlushJob, WriteCommand},
};

/// A segment of this size goes into the database, in bytes.
pub(in crate::outbox::sqlite) const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;
/// So do this many captures.
const MAX_ENTRIES: usize = 32_000;
/// With so much in a segment, or so many captures, callers wait until the database has
/// caught up.
const PATIENCE_BYTES: u64 = SEGMENT_BYTES * 3 / 2;
const PATIENCE_ENTRIES: usize = 3 * MAX_ENTRIES;
/// With so much in a segment the flush under way has to come to its end, in bytes.
const URGENT_BYTES: u64 = SEGMENT_BYTES / 2;
/// After a segment that was full so soon no flush has time for rests.
const QUICK: Duration = Duration::from_millis(300);
/// So long after a change a segment is full, however little it holds.
const MAX_AGE: Duration = Duration::from_millis(500);
/// Captures that leave the overlay at once: a fraction of a millisecond.
const RETIRE: usize = 1_000;
/// A free segment that is not needed for so long is written over with zeros.
const ERASE_AFTER: Duration = Duration::from_millis(500);

/// Where the journal's way into the database stands.
pub(super) struct Flushing {
    running: bool,
    /// The one that is in the database by now, with what of it has not left the overlay.
    retiring: Option<FlushJob>,
    /// The last one failed.
    failed: bool,
    /// Since when something is to be put into the database.
    due_since: Option<Instant>,
    ended: Instant,
    /// When the journal went on in another segment, and whether that was soon.
    turned: Instant,
    quick: bool,
    /// Who waits for the one that is running, and for the one after it.
    waiting: Vec<Reply<()>>,
    next: Vec<Reply<()>>,
}

impl Default for Flushing {
    fn default() -> Self {
        Self {
            running: false,
            retiring: None,
            failed: false,
            due_since: None,
            ended: Instant::now(),
            turned: Instant::now(),
            quick: false,
            waiting: Vec::new(),
            next: Vec::new(),
        }
    }
}

impl Flushing {
    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    /// Whether there is something to do that should not wait.
    pub(super) fn is_retiring(&self) -> bool {
        self.retiring.is_some()
    }

    pub(super) fn note_change(&mut self) {
        self.due_since.get_or_insert_with(Instant::now);
    }

    fn note_turn(&mut self, now: Instant) {
        self.quick = now.duration_since(self.turned) < QUICK;
        self.turned = now;
    }

    fn is_over(&self) -> bool {
        self.ended.elapsed() >= ERASE_AFTER
    }

    fn is_old(&self) -> bool {
        self.due_since
            .is_some_and(|since| since.elapsed() >= MAX_AGE)
    }
}

impl Committer {
    pub(super) fn has_leftovers(&self) -> bool {
        self.journal.has_leftovers()
    }

    /// What is due beside the commands.
    pub(super) fn keep_house(&mut self) {
        if let Ok(done) = self.done.1.try_recv() {
            self.note(done);
        }
        let lookup = &mut self.lookup;
        self.known.tend(|| lookup.ids());
        self.retire();
        if self.flushing.running {
            if self.is_urgent() {
                self.shared.set_urgent(true);
            }
            return;
        }
        self.start_flush_if_due();
        let calm = !self.flushing.running && !self.flushing.failed && !self.journal.is_broken();
        if calm
            && self.journal.is_applied()
            && self.journal.active_bytes() > 0
            && self.flushing.is_over()
        {
            // So that it can be erased.
            self.journal.rotate();
        }
        if calm
            && self.has_leftovers()
            && self.flushing.ended.elapsed() >= ERASE_AFTER
            && let Err(error) = self.journal.erase_free()
        {
            tracing::warn!(%error, "the outbox's journal is not erased; trying again");
            self.flushing.ended = Instant::now();
        }
    }

    /// Goes on in the next segment, and has what stands in the last but one put into
    /// the database: most of it is delivered by then, so that its payload never is.
    pub(super) fn start_flush_if_due(&mut self) {
        if self.flushing.running {
            return;
        }
        let entries = self.shared.lock().len();
        let due = self.journal.active_bytes() >= SEGMENT_BYTES
            || entries >= 2 * MAX_ENTRIES
            || (!self.journal.is_applied() && self.flushing.is_old());
        if due {
            self.turn();
        }
    }

    fn turn(&mut self) {
        if self.journal.rotate() {
            self.flushing.note_turn(Instant::now());
        } else if !self.flushing.failed {
            return;
        }
        let through = self.journal.settled_through();
        if through > self.journal.applied() || self.flushing.failed {
            self.start_flush(through);
        } else {
            self.flushing.due_since = Some(Instant::now());
        }
    }

    /// Hands what differs from the database since a record up to `through` to the writer.
    fn start_flush(&mut self, through: u64) {
        let entries = self.shared.lock().changed_through(through);
        self.flushing.running = true;
        self.flushing.due_since = None;
        self.shared.set_urgent(self.is_urgent());
        let job = FlushJob {
            entries,
            through,
            done: self.done.0.clone(),
        };
        if let Err(unsent) = self.store.blocking_send(WriteCommand::Flush(job))
            && let WriteCommand::Flush(job) = unsent.0
        {
            self.note(Done::Flushed(job, Err(OutboxError::Closed)));
        }
    }

    /// Whether somebody waits for the flush under way, or soon will.
    fn is_urgent(&self) -> bool {
        self.flushing.quick
            || !self.flushing.waiting.is_empty()
            || !self.flushing.next.is_empty()
            || self.journal.active_bytes() >= URGENT_BYTES
    }

    fn note(&mut self, done: Done) {
        let Done::Flushed(job, result) = done else {
            return;
        };
        match result {
            Ok(()) => self.flushing.retiring = Some(job),
            Err(error) => {
                tracing::error!(%error, "the journal cannot be put into the database; trying again");
                self.end_flush(&Err(error));
            }
        }
    }

    /// Takes some of what is in the database out of the overlay: in pieces, since callers
    /// wait meanwhile, and the first captures first, since a lease takes what stands in the
    /// database alone before what stands here.
    fn retire(&mut self) {
        let Some(job) = &mut self.flushing.retiring else {
            return;
        };
        let piece = job.entries.len().min(RETIRE);
        let hold = self.shared.hold();
        self.shared
            .lock()
            .flushed(&job.entries[..piece], job.through);
        drop(hold);
        job.entries.drain(..piece);
        if job.entries.is_empty() {
            self.journal.note_applied(job.through);
            self.flushing.retiring = None;
            self.end_flush(&Ok(()));
        }
    }

    fn end_flush(&mut self, result: &Result<(), OutboxError>) {
        self.flushing.running = false;
        self.flushing.failed = result.is_err();
        self.flushing.ended = Instant::now();
        if !self.journal.is_applied() {
            self.flushing.note_change();
        }
        for reply in self.flushing.waiting.drain(..) {
            let _ = reply.send(result.clone());
        }
        if !self.flushing.next.is_empty() {
            self.flushing.waiting = std::mem::take(&mut self.flushing.next);
            self.start_flush(self.journal.last());
        }
    }

    /// Puts the journal into the database: all of it, or as much as is due when a segment
    /// is full.
    pub(super) fn flush_for(&mut self, whole: bool, reply: Reply<()>) {
        if !whole && !self.flushing.running {
            self.turn();
            if self.flushing.running {
                return self.flushing.waiting.push(reply);
            }
            let _ = reply.send(Ok(()));
        } else if self.flushing.running {
            self.flushing.next.push(reply);
        } else if self.journal.is_applied() && !self.flushing.failed {
            let _ = reply.send(Ok(()));
        } else {
            self.flushing.waiting.push(reply);
            self.start_flush(self.journal.last());
        }
    }

    /// Waits until nothing is missing in the database.
    fn flush_all(&mut self) -> Result<(), OutboxError> {
        self.wait_for_flush()?;
        if !self.journal.is_applied() || self.flushing.failed {
            self.start_flush(self.journal.last());
            self.wait_for_flush()?;
        }
        if self.flushing.failed {
            let why = "the journal cannot be put into the database";
            return Err(OutboxError::Unavailable(why.to_owned()));
        }
        Ok(())
    }

    fn wait_for_flush(&mut self) -> Result<(), OutboxError> {
        self.shared.set_urgent(true);
        while self.flushing.running {
            if self.flushing.is_retiring() {
                self.retire();
            } else {
                let done = self.done.1.recv().map_err(|_| OutboxError::Closed)?;
                self.note(done);
            }
        }
        Ok(())
    }

    /// Makes sure that the journal can take a group.
    pub(super) fn ready(&mut self) -> Result<(), OutboxError> {
        if self.journal.is_broken() {
            self.flush_all()?;
            self.journal.restart();
        }
        let long = |this: &Self| {
            this.journal.active_bytes() >= PATIENCE_BYTES
                || this.shared.lock().len() >= PATIENCE_ENTRIES
        };
        if long(self) {
            self.wait_for_flush()?;
            self.start_flush_if_due();
        }
        if long(self) {
            self.flush_all()?;
            self.journal.restart();
        }
        Ok(())
    }

    /// Has the writer do something while nothing is accepted or settled.
    pub(super) fn alone(&mut self, command: WriteCommand) {
        if !self.signals.is_writable()
            && let Err(error) = self.probe()
        {
            return command.refuse(&error);
        }
        let prepared = self.flush_all().and_then(|()| {
            if command.erases() {
                // The person's bytes leave the journal too.
                self.journal.erase().map_err(failed)?;
                self.journal.restart();
            }
            Ok(())
        });
        if let Err(error) = prepared {
            return command.refuse(&error);
        }
        let command = WriteCommand::Alone(Box::new(command), self.done.0.clone());
        if self.store.blocking_send(command).is_ok() {
            let _ = self.done.1.recv();
        }
        self.lookup.refresh();
        self.tally = self.shared.lock().tally.clone();
    }

    /// Nothing is left to the next start.
    pub(super) fn end(mut self) {
        let ended = self
            .flush_all()
            .and_then(|()| self.journal.erase().map_err(failed));
        if let Err(error) = ended {
            tracing::error!(%error, "the journal is kept for the next start");
        }
        drop(self.lookup);
        self.known.end();
        let _ = self.store.blocking_send(WriteCommand::Close);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_segment_that_was_full_soon_leaves_no_time_for_rests() {
        let mut flushing = Flushing::default();
        let start = flushing.turned;
        flushing.note_turn(start + QUICK - Duration::from_millis(1));
        assert!(flushing.quick);
        let second = flushing.turned;
        flushing.note_turn(second + QUICK);
        assert!(!flushing.quick);
    }
}
