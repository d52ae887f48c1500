//! How often groups begin. A sync costs the same for few captures and for many, and wakes
//! whoever works beside it; so where many callers wait, a group gathers for a moment.

use std::time::{Duration, Instant};

/// From the beginning of a group of so many commands to that of the next one, at the least.
/// The largest is behind the most: there calls wait for the processor anyway.
const GAPS: [(usize, Duration); 2] = [
    (32, Duration::from_millis(2)),
    (8, Duration::from_millis(1)),
];

/// When the next group may begin.
#[derive(Debug, Default)]
pub(super) struct Pace {
    next: Option<Instant>,
}

impl Pace {
    /// Notes that a group of so many commands begins. A full one is followed at once:
    /// what waits behind it is a group already.
    pub(super) fn begin(&mut self, commands: usize, is_full: bool, now: Instant) {
        let gap = GAPS.into_iter().find(|(least, _)| commands >= *least);
        self.next = gap.filter(|_| !is_full).map(|(_, gap)| now + gap);
    }

    /// How long the next group has to wait.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        let left = self.next?.saturating_duration_since(now);
        Some(left).filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_wait_for_others_only_behind_a_large_one() {
        let start = Instant::now();
        let after = |micros| start + Duration::from_micros(micros);
        let mut pace = Pace::default();
        assert_eq!(pace.left(start), None);
        pace.begin(7, false, start);
        assert_eq!(pace.left(after(10)), None);
        pace.begin(8, true, start);
        assert_eq!(pace.left(after(10)), None);
        pace.begin(8, false, start);
        assert_eq!(pace.left(after(300)), Some(Duration::from_micros(700)));
        assert_eq!(pace.left(after(1_000)), None);
        assert_eq!(pace.left(after(5_000)), None);
        pace.begin(32, false, start);
        assert_eq!(pace.left(after(1_000)), Some(Duration::from_millis(1)));
        pace.begin(1, false, after(1_000));
        assert_eq!(pace.left(after(1_001)), None);
    }
}
