//! How many events an integration may send in a second: Segment takes about 1,000
//! from a workspace and queues what is beyond, so the relay queues it instead.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use governor::{
    Quota,
    clock::{Clock, MonotonicClock},
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed, RateLimiter},
};

use crate::{integration::IntegrationId, region::Region, time::UnixMillis};

/// What an answer may ask for at the most, with some room for a slow clock.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

type Limiter<C> = RateLimiter<NotKeyed, InMemoryState, C, NoOpMiddleware<<C as Clock>::Instant>>;

/// A token bucket for each integration that sends.
#[derive(Debug)]
pub struct RateLimits<C: Clock = MonotonicClock> {
    quota: Quota,
    clock: C,
    buckets: Mutex<HashMap<IntegrationId, Arc<Limiter<C>>>>,
    /// Sources that Segment has asked to pause.
    paused: Mutex<HashMap<(IntegrationId, Region), UnixMillis>>,
}

impl RateLimits {
    /// `per_second` events on average and `burst` at once, for each integration.
    #[must_use]
    pub fn new(per_second: NonZeroU32, burst: NonZeroU32) -> Self {
        Self::with_clock(per_second, burst, MonotonicClock)
    }
}

impl<C: Clock + Clone> RateLimits<C> {
    pub(super) fn with_clock(per_second: NonZeroU32, burst: NonZeroU32, clock: C) -> Self {
        let quota = Quota::per_second(per_second).allow_burst(burst);
        Self {
            quota,
            clock,
            buckets: Mutex::default(),
            paused: Mutex::default(),
        }
    }

    /// Holds all lanes of a source back for a time.
    pub fn pause(&self, id: &IntegrationId, region: Region, now: UnixMillis, wait: Duration) {
        lock(&self.paused).insert((id.clone(), region), now.plus(wait));
    }

    fn pause_left(&self, id: &IntegrationId, region: Region, now: UnixMillis) -> Option<Duration> {
        let mut paused = lock(&self.paused);
        if paused.is_empty() {
            return None;
        }
        let key = (id.clone(), region);
        let left = paused.get(&key)?.since(now);
        if left.is_zero() || left > LONGEST_PAUSE {
            // It is over, or the clock was put back.
            paused.remove(&key);
            return None;
        }
        Some(left)
    }

    /// Takes tokens for `events`, all or none.
    ///
    /// # Errors
    /// How long to wait for them, or for the end of a pause. More than the burst can never be had; then the
    /// wait is a second, and the caller has to ask for less.
    pub fn take(
        &self,
        id: &IntegrationId,
        region: Region,
        events: u32,
        now: UnixMillis,
    ) -> Result<(), Duration> {
        if let Some(left) = self.pause_left(id, region, now) {
            return Err(left);
        }
        let Some(events) = NonZeroU32::new(events) else {
            return Ok(());
        };
        let bucket = {
            let mut buckets = lock(&self.buckets);
            let new = || {
                Arc::new(RateLimiter::direct_with_clock(
                    self.quota,
                    self.clock.clone(),
                ))
            };
            Arc::clone(buckets.entry(id.clone()).or_insert_with(new))
        };
        match bucket.check_n(events) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(until)) => Err(until.wait_time_from(self.clock.now())),
            Err(_) => Err(Duration::from_secs(1)),
        }
    }

    /// Forgets an integration that is no more.
    pub fn forget(&self, id: &IntegrationId) {
        lock(&self.buckets).remove(id);
        lock(&self.paused).retain(|(paused, _), _| paused != id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;

    use super::*;

    #[test]
    fn each_integration_has_a_burst_and_then_its_rate() {
        let clock = FakeRelativeClock::default();
        let number = |number| NonZeroU32::new(number).expect("not zero");
        let limits = RateLimits::with_clock(number(1_000), number(2_500), clock.clone());
        let acme = IntegrationId::new("acme").expect("valid");
        let other = IntegrationId::new("other").expect("valid");
        let take = |id: &IntegrationId, events| limits.take(id, Region::Eu, events, UnixMillis(0));
        assert_eq!(take(&acme, 2_500), Ok(()));
        assert_eq!(take(&acme, 1), Err(Duration::from_millis(1)));
        assert_eq!(take(&acme, 500), Err(Duration::from_millis(500)));
        assert_eq!(take(&other, 2_500), Ok(()));
        clock.advance(Duration::from_millis(500));
        assert_eq!(take(&acme, 500), Ok(()));
        assert!(take(&acme, 1).is_err());
        assert_eq!(take(&acme, 2_501), Err(Duration::from_secs(1)));
    }

    #[test]
    fn a_pause_holds_all_lanes_of_a_source_back_and_nobody_else() {
        let number = |number| NonZeroU32::new(number).expect("not zero");
        let limits = RateLimits::new(number(1_000), number(2_500));
        let acme = IntegrationId::new("acme").expect("valid");
        let other = IntegrationId::new("other").expect("valid");
        let now = UnixMillis(1_000_000);
        limits.pause(&acme, Region::Eu, now, Duration::from_secs(7));
        let later = now.plus(Duration::from_secs(5));
        assert_eq!(
            limits.take(&acme, Region::Eu, 1, later),
            Err(Duration::from_secs(2))
        );
        assert_eq!(limits.take(&acme, Region::NonEu, 1, later), Ok(()));
        assert_eq!(limits.take(&other, Region::Eu, 1, later), Ok(()));
        assert_eq!(
            limits.take(&acme, Region::Eu, 1, now.plus(Duration::from_secs(7))),
            Ok(())
        );
        limits.pause(&acme, Region::Eu, now, Duration::from_secs(7));
        let put_back = UnixMillis(0);
        assert_eq!(limits.take(&acme, Region::Eu, 1, put_back), Ok(()));
    }
}
