//! How many events a lane puts into a request: fewer after failures, more after successes.

/// Growth after a success where time-outs made batches smaller: by an eighth, so that most
/// requests fit into the time-out.
const SLOW_SHARE: usize = 8;

/// A lane's batch size.
#[derive(Clone, Copy, Debug)]
pub(super) struct BatchSize {
    most: usize,
    /// Fewer than that.
    narrowed: Option<usize>,
    slow: bool,
}

impl BatchSize {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            narrowed: None,
            slow: false,
        }
    }

    /// Events of the next request at the most.
    pub(super) fn get(self) -> usize {
        self.narrowed.unwrap_or(self.most)
    }

    /// Half of a request that failed. `slow`: it may have been too large for its time.
    pub(super) fn halve(&mut self, events: usize, slow: bool) {
        self.narrowed = Some(events.div_ceil(2).max(1));
        self.slow |= slow;
    }

    /// A single event is to blame, not the size.
    pub(super) fn suspect_found(&mut self) {
        self.slow = false;
    }

    /// Notes that a request was taken.
    pub(super) fn grow(&mut self) {
        let next = |narrow: usize| match self.slow {
            true => narrow + narrow.div_ceil(SLOW_SHARE),
            false => narrow.saturating_mul(2),
        };
        self.narrowed = self.narrowed.map(next).filter(|next| *next < self.most);
        self.slow &= self.narrowed.is_some();
    }

    pub(super) fn is_slow(self) -> bool {
        self.slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_halve_and_double_but_grow_slowly_after_time_outs() {
        let mut size = BatchSize::new(100);
        assert_eq!(size.get(), 100);
        size.halve(81, false);
        assert_eq!(size.get(), 41);
        size.grow();
        assert_eq!(size.get(), 82);
        size.grow();
        assert_eq!(size.get(), 100);
        size.halve(100, true);
        size.grow();
        assert_eq!((size.get(), size.is_slow()), (57, true));
        size.halve(1, false);
        assert_eq!(size.get(), 1);
        size.suspect_found();
        size.grow();
        assert_eq!((size.get(), size.is_slow()), (2, false));
    }

    #[test]
    fn an_endpoint_with_a_time_per_event_is_used_well() {
        // 200 events fit into the time-out, of 1,056.
        let mut size = BatchSize::new(1_056);
        let (mut taken, mut timed_out) = (0, 0);
        for _ in 0..400 {
            if size.get() > 200 {
                timed_out += 1;
                size.halve(size.get(), true);
            } else {
                taken += size.get();
                size.grow();
            }
        }
        assert!(taken > 400 * 90, "{taken}");
        assert!(timed_out < 400 / 5, "{timed_out}");
    }
}
