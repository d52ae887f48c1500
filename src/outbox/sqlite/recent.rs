//! The keys of new captures in memory: what the database does not have in `capture_key` yet
//! (`writer/ids`). Whoever looks for an id looks here first, then into the database.

use std::{
    collections::BTreeSet,
    ops::Bound,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// A key and the sequence of its capture: a place in the index of ids.
pub(super) type Place = (i64, i64);

/// Keys that are put here while others wait: a fraction of a millisecond.
const PIECE: usize = 256;

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Recent {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    places: BTreeSet<Place>,
    departures: u64,
}

/// What stands here of a key.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Captures that may be meant, oldest first.
    pub(super) sequences: Vec<i64>,
    /// How often keys have left. A snapshot of the database that is older than the last time
    /// does not have what left then.
    pub(super) departures: u64,
}

impl Recent {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.lock().places.len()
    }

    pub(super) fn find(&self, key: i64) -> Found {
        let state = self.lock();
        let places = state.places.range((key, i64::MIN)..=(key, i64::MAX));
        Found {
            sequences: places.map(|place| place.1).collect(),
            departures: state.departures,
        }
    }

    /// Adds keys, and calls `rest` between pieces of them.
    pub(super) fn add(&self, places: &[Place], mut rest: impl FnMut()) {
        for piece in places.chunks(PIECE) {
            self.lock().places.extend(piece);
            rest();
        }
    }

    /// The first `most` behind a place, in order.
    pub(super) fn behind(&self, place: Place, most: usize) -> Vec<Place> {
        let range = (Bound::Excluded(place), Bound::Unbounded);
        let state = self.lock();
        state.places.range(range).take(most).copied().collect()
    }

    /// Takes out the key of a capture that is forgotten; returns whether it stood here.
    pub(super) fn forget(&self, place: Place) -> bool {
        self.lock().places.remove(&place)
    }

    /// Takes out keys that the database has in its index by now.
    pub(super) fn depart(&self, places: &[Place]) {
        for piece in places.chunks(PIECE) {
            let mut state = self.lock();
            for place in piece {
                state.places.remove(place);
            }
            state.departures += 1;
        }
    }

    /// Stands for these from now on.
    pub(super) fn replace(&self, places: BTreeSet<Place>) {
        let mut state = self.lock();
        state.places = places;
        state.departures += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_with_all_its_captures_until_it_departs() {
        let recent = Recent::default();
        let places: Vec<Place> = (0..1_000).map(|number| (number / 2, number)).collect();
        let mut rests = 0;
        recent.add(&places, || rests += 1);
        assert_eq!(rests, 4);
        assert_eq!(recent.len(), 1_000);
        let before = recent.find(7);
        assert_eq!(before.sequences, [14, 15]);
        assert!(recent.find(500).sequences.is_empty());

        recent.depart(&[(7, 14)]);
        let after = recent.find(7);
        assert_eq!(after.sequences, [15]);
        assert_ne!(after.departures, before.departures);
        assert!(recent.forget((7, 15)));
        assert!(!recent.forget((7, 15)));
        // Nobody is to be told: a forgotten capture is nowhere.
        assert_eq!(recent.find(7).departures, after.departures);
    }

    #[test]
    fn the_next_keys_are_those_behind_a_place() {
        let recent = Recent::default();
        recent.replace(BTreeSet::from([(1, 5), (1, 6), (2, 1), (3, 9)]));
        assert_eq!(recent.behind((1, 5), 2), [(1, 6), (2, 1)]);
        assert_eq!(recent.behind((3, 9), 2), []);
        assert_eq!(recent.behind((i64::MIN, i64::MIN), 10).len(), 4);
    }
}
