//! How many events an integration may send in a second: Segment takes about 1,000
//! from a workspace and queues what is beyond, so the relay queues it instead.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use governor::{
    Quota,
    clock::{Clock, MonotonicClock},
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed, RateLimiter},
};

use crate::integration::IntegrationId;

type Limiter<C> = RateLimiter<NotKeyed, InMemoryState, C, NoOpMiddleware<<C as Clock>::Instant>>;

/// A token bucket for each integration that sends.
#[derive(Debug)]
pub struct RateLimits<C: Clock = MonotonicClock> {
    quota: Quota,
    clock: C,
    buckets: Mutex<HashMap<IntegrationId, Arc<Limiter<C>>>>,
}

impl RateLimits {
    /// `per_second` events on average and `burst` at once, for each integration.
    #[must_use]
    pub fn new(per_second: NonZeroU32, burst: NonZeroU32) -> Self {
        Self::with_clock(per_second, burst, MonotonicClock)
    }
}

impl<C: Clock + Clone> RateLimits<C> {
    fn with_clock(per_second: NonZeroU32, burst: NonZeroU32, clock: C) -> Self {
        let quota = Quota::per_second(per_second).allow_burst(burst);
        Self {
            quota,
            clock,
            buckets: Mutex::default(),
        }
    }

    /// Takes tokens for `events`, all or none.
    ///
    /// # Errors
    /// How long to wait for them. More than the burst can never be had; then the
    /// wait is a second, and the caller has to ask for less.
    pub fn take(&self, id: &IntegrationId, events: u32) -> Result<(), Duration> {
        let Some(events) = NonZeroU32::new(events) else {
            return Ok(());
        };
        let bucket = {
            let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
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
        self.buckets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
    }
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
        assert_eq!(limits.take(&acme, 2_500), Ok(()));
        assert_eq!(limits.take(&acme, 1), Err(Duration::from_millis(1)));
        assert_eq!(limits.take(&acme, 500), Err(Duration::from_millis(500)));
        assert_eq!(limits.take(&other, 2_500), Ok(()));
        clock.advance(Duration::from_millis(500));
        assert_eq!(limits.take(&acme, 500), Ok(()));
        assert!(limits.take(&acme, 1).is_err());
        assert_eq!(limits.take(&acme, 2_501), Err(Duration::from_secs(1)));
    }
}
