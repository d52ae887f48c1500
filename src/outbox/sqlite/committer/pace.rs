//! How often groups begin. A sync costs the same for few captures and for many, and wakes
//! whoever works beside it; so where many callers wait, a group gathers for a moment.

use std::time::{Duration, Instant};

/// A group of so many commands says that many callers wait.
const MANY: usize = 8;
/// From the beginning of such a group to that of the next one, at the least.
const GAP: Duration = Duration::from_millis(1);

/// When the last group began.
#[derive(Debug, Default)]
pub(super) struct Pace {
    many_since: Option<Instant>,
}

impl Pace {
    /// Notes that a group of so many commands begins. A full one is followed at once:
    /// what waits behind it is a group already.
    pub(super) fn begin(&mut self, commands: usize, is_full: bool, now: Instant) {
        self.many_since = (commands >= MANY && !is_full).then_some(now);
    }

    /// How long the next group has to wait.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        let over = now.saturating_duration_since(self.many_since?);
        GAP.checked_sub(over).filter(|left| !left.is_zero())
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
        pace.begin(MANY - 1, false, start);
        assert_eq!(pace.left(after(10)), None);
        pace.begin(MANY, true, start);
        assert_eq!(pace.left(after(10)), None);
        pace.begin(MANY, false, start);
        assert_eq!(pace.left(after(300)), Some(Duration::from_micros(700)));
        assert_eq!(pace.left(after(1_000)), None);
        assert_eq!(pace.left(after(5_000)), None);
        pace.begin(1, false, after(1_000));
        assert_eq!(pace.left(after(1_001)), None);
    }
}
