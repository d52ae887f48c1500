//! Rests between the pieces of a flush. Callers wait for the threads beside the writer, not
//! for the writer, as long as the journal has room.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::outbox::sqlite::overlay::Shared;

/// Rows of one piece: a fraction of a millisecond.
const PIECE: usize = 64;
/// A rest is so many times as long as the piece before it.
const SHARE: u32 = 2;
/// But no longer than this.
const LONGEST: Duration = Duration::from_millis(4);

/// Counts rows, and rests after each piece unless the flush is waited for.
pub(super) struct Rests<'a> {
    shared: &'a Shared,
    rows: usize,
    begun: Instant,
}

impl<'a> Rests<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            rows: 0,
            begun: Instant::now(),
        }
    }

    /// Notes that a row was written.
    pub(super) fn row(&mut self) {
        self.rows += 1;
        if self.rows >= PIECE {
            self.end_piece();
        }
    }

    /// Ends a piece of work, whatever was done in it.
    #[expect(clippy::disallowed_methods, reason = "the thread is its own")]
    pub(super) fn end_piece(&mut self) {
        self.rows = 0;
        if !self.shared.is_urgent() {
            thread::sleep((self.begun.elapsed() * SHARE).min(LONGEST));
        }
        self.begun = Instant::now();
    }
}
