//! How far the round has come in which keys leave for the index.

use crate::outbox::sqlite::recent::Place;

pub(super) const FIRST: Place = (i64::MIN, i64::MIN);

/// All keys up to this place have left in this lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    pub(super) lap: i64,
    pub(super) place: Place,
}

impl Turn {
    /// When a key leaves that came at this turn.
    fn leaves(self, place: Place) -> Self {
        let lap = self.lap + i64::from(place <= self.place);
        Self { lap, place }
    }

    /// Whether a key that came at this turn has left by now.
    pub(super) fn has_left(self, place: Place, now: Self) -> bool {
        self.leaves(place) <= now
    }

    /// Whether all keys that came at this turn have left by now.
    pub(super) fn have_all_left(self, now: Self) -> bool {
        self.leaves(self.place) <= now
    }

    /// The lap has come to its end.
    pub(super) fn next_lap(self) -> Self {
        Self {
            lap: self.lap + 1,
            place: FIRST,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_leaves_when_the_round_has_come_to_it_after_it_came() {
        let came = Turn {
            lap: 3,
            place: (10, 1),
        };
        let at = |lap, key| Turn {
            lap,
            place: (key, 0),
        };
        // Behind the place: in the same lap.
        assert!(!came.has_left((20, 5), at(3, 20)));
        assert!(came.has_left((20, 5), at(3, 21)));
        // Before it: a lap later.
        assert!(!came.has_left((5, 5), at(3, 21)));
        assert!(!came.has_left((5, 5), came.next_lap()));
        assert!(came.has_left((5, 5), at(4, 6)));
        // What is left of a lap has left where the next begins.
        assert!(came.has_left((i64::MAX, i64::MAX), came.next_lap()));

        assert!(!came.have_all_left(at(4, 10)));
        assert!(came.have_all_left(at(4, 11)));
    }
}
