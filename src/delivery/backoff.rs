//! Exponential backoff with full jitter.

use std::time::Duration;

/// Bounds of the waits between attempts.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// Upper bound of the first wait.
    pub base: Duration,
    /// Upper bound of every wait.
    pub max: Duration,
}

impl Backoff {
    /// The wait after the `failures`-th failure in a row (from 1): a share of
    /// `base * 2^(failures - 1)`, at most of `max`. `jitter` is that share,
    /// from 0 to 1, drawn by the caller.
    #[must_use]
    pub fn wait(&self, failures: u32, jitter: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let bound = self.base.saturating_mul(1 << doublings).min(self.max);
        bound.mul_f64(jitter.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_maximum_and_jitter_takes_a_share() {
        let backoff = Backoff {
            base: Duration::from_millis(500),
            max: Duration::from_secs(60),
        };
        let millis = |failures, jitter| backoff.wait(failures, jitter).as_millis();
        assert_eq!(millis(1, 1.0), 500);
        assert_eq!(millis(2, 1.0), 1_000);
        assert_eq!(millis(7, 1.0), 32_000);
        assert_eq!(millis(8, 1.0), 60_000);
        assert_eq!(millis(u32::MAX, 1.0), 60_000);
        assert_eq!(millis(3, 0.25), 500);
        assert_eq!(millis(3, 0.0), 0);
    }
}
