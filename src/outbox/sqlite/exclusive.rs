//! Pauses between what holds others up: changes for which nothing is accepted, and flushes that
//! a list needs.

use std::time::Duration;

use tokio::{sync::Mutex, time::Instant};

/// A change that takes this long is followed by a pause of the same length; a longer one by one
/// that grows with the square of it. So captures wait for changes one or two milliseconds on
/// average, however many changes callers ask for: `took` of `took + pause` is held up, and each
/// then waits for half of `took`.
const SHORT: Duration = Duration::from_millis(4);
/// Longest pause after a change.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Flushes for lists begin no more often.
const FLUSH_INTERVAL: Duration = Duration::from_millis(25);

/// Turns of the changes for which nothing is accepted or settled, in the order in which they
/// were asked for.
#[derive(Debug, Default)]
pub(super) struct Exclusive(Mutex<Option<Instant>>);

impl Exclusive {
    /// Makes a change in its turn. Until it has begun, it is given up with its caller.
    pub(super) async fn run<T>(&self, change: impl Future<Output = T>) -> T {
        let mut not_before = self.0.lock().await;
        if let Some(moment) = *not_before {
            tokio::time::sleep_until(moment).await;
        }
        let begun = Instant::now();
        let done = change.await;
        *not_before = Some(Instant::now() + pause_after(begun.elapsed()));
        done
    }

    #[cfg(test)]
    pub(super) fn has_run(&self) -> bool {
        self.0.try_lock().is_ok_and(|moment| moment.is_some())
    }
}

fn pause_after(took: Duration) -> Duration {
    took.mul_f64(took.as_secs_f64() / SHORT.as_secs_f64())
        .max(took)
        .min(LONGEST_PAUSE)
}

/// When a list may ask for a flush.
#[derive(Debug, Default)]
pub(super) struct FlushPace(Mutex<Option<Instant>>);

impl FlushPace {
    /// Waits until one may begin. Those that wait share the next ones.
    pub(super) async fn wait(&self) {
        let mut last = self.0.lock().await;
        if let Some(moment) = *last {
            tokio::time::sleep_until(moment + FLUSH_INTERVAL).await;
        }
        *last = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_grows_faster_than_what_it_follows() {
        let pause = |millis| pause_after(Duration::from_millis(millis)).as_millis();
        assert_eq!([0, 1, 4, 8, 20, 100].map(pause), [0, 1, 4, 16, 100, 1_000]);
    }

    #[tokio::test(start_paused = true)]
    async fn changes_leave_time_to_others_and_one_whose_caller_goes_is_not_made() {
        let (exclusive, begun) = (Exclusive::default(), Instant::now());
        let change = || exclusive.run(async { tokio::time::sleep(Duration::from_millis(8)).await });
        let mut made = 0;
        change().await;
        for _ in 0..10 {
            // Given up while it waits.
            let gone = tokio::time::timeout(Duration::from_millis(1), change()).await;
            assert!(gone.is_err());
        }
        for _ in 0..10 {
            change().await;
            made += 1;
        }
        assert_eq!(made, 10);
        // The clock of tokio counts whole milliseconds.
        let took = begun.elapsed().as_millis();
        assert!(
            (8 + 10 * (16 + 8)..8 + 10 * (18 + 8)).contains(&took),
            "{took}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn flushes_are_paced() {
        let (pace, begun) = (FlushPace::default(), Instant::now());
        for _ in 0..5 {
            pace.wait().await;
        }
        assert_eq!(begun.elapsed(), 4 * FLUSH_INTERVAL);
    }
}
