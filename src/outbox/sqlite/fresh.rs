//! Which captures of a lane wait in memory, in their order.

use std::collections::VecDeque;

/// So many that have left are kept before anything is tidied up.
const GONE: usize = 64;

/// Captures by their sequence, ascending. They come in that order and mostly leave in it. One
/// that leaves out of its turn keeps its place until it is at the front or most are like it;
/// whether one is still meant is for the owner to say.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    sequences: VecDeque<i64>,
    /// Of these have left.
    gone: usize,
}

impl Fresh {
    /// Adds one that is not there.
    pub(super) fn add(&mut self, sequence: i64) {
        if self.sequences.back().is_none_or(|last| *last < sequence) {
            self.sequences.push_back(sequence);
        } else if let Err(place) = self.sequences.binary_search(&sequence) {
            self.sequences.insert(place, sequence);
        }
    }

    /// Takes one away that is there. `is_meant` says which of the others still are.
    pub(super) fn remove(&mut self, sequence: i64, is_meant: impl Fn(i64) -> bool) {
        if self.sequences.front() == Some(&sequence) {
            self.sequences.pop_front();
        } else {
            self.gone += 1;
        }
        while self.gone > 0
            && let Some(front) = self.sequences.front()
            && !is_meant(*front)
        {
            self.sequences.pop_front();
            self.gone -= 1;
        }
        if self.gone > GONE.max(self.sequences.len() / 2) {
            self.sequences.retain(|sequence| is_meant(*sequence));
            self.gone = 0;
        }
    }

    /// All of them, and some that have left.
    pub(super) fn iter(&self) -> impl Iterator<Item = i64> {
        self.sequences.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What is in both after each step, and how much more the queue holds.
    fn same(fresh: &Fresh, model: &BTreeSet<i64>) -> usize {
        let all: Vec<i64> = fresh.iter().collect();
        assert!(all.is_sorted_by(|a, b| a < b), "{all:?}");
        let meant = all.iter().copied().filter(|one| model.contains(one));
        assert!(meant.eq(model.iter().copied()));
        assert_eq!(all.len() - model.len(), fresh.gone);
        fresh.gone
    }

    #[test]
    fn in_any_order_it_holds_what_a_set_holds_and_not_much_more() {
        let orders: [fn(i64) -> i64; 4] = [
            |turn| turn,
            |turn| 999 - turn,
            |turn| (turn * 367) % 1_000,
            // Pieces of 100, the last first, each from its beginning.
            |turn| (9 - turn / 100) * 100 + turn % 100,
        ];
        for order in orders {
            let (mut fresh, mut model) = (Fresh::default(), BTreeSet::new());
            for sequence in 0..1_000 {
                fresh.add(sequence);
                model.insert(sequence);
            }
            for turn in 0..1_000 {
                model.remove(&order(turn));
                fresh.remove(order(turn), |one| model.contains(&one));
                let gone = same(&fresh, &model);
                assert!(gone <= GONE.max(fresh.sequences.len() / 2), "{gone}");
            }
            assert_eq!(fresh.sequences.len(), 0);
        }
    }

    #[test]
    fn one_that_comes_late_stands_in_its_place() {
        let mut fresh = Fresh::default();
        for sequence in [1, 5, 9, 3, 0] {
            fresh.add(sequence);
        }
        assert!(fresh.iter().eq([0, 1, 3, 5, 9]));
    }
}
