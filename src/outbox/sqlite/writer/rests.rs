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
        if let Some(rest) = rest(self.begun.elapsed(), self.shared.is_urgent()) {
            thread::sleep(rest);
        }
        self.begun = Instant::now();
    }
}

/// How long to rest after a piece that took so long; not at all where somebody waits.
fn rest(worked: Duration, urgent: bool) -> Option<Duration> {
    (!urgent).then(|| (worked * SHARE).min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_are_as_long_as_the_work_asks_for_and_none_while_somebody_waits() {
        let worked = Duration::from_micros(300);
        assert_eq!(rest(worked, false), Some(worked * SHARE));
        assert_eq!(rest(Duration::from_secs(1), false), Some(LONGEST));
        assert_eq!(rest(worked, true), None);
    }

    #[test]
    fn each_piece_has_so_many_rows() {
        let shared = Shared::default();
        shared.set_urgent(true);
        let mut rests = Rests::new(&shared);
        for row in 1..=2 * PIECE {
            rests.row();
            assert_eq!(rests.rows, row % PIECE);
        }
    }
}
