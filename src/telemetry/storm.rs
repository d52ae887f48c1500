//! Keeps a storm of equal log lines from burying the others, and the disk.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};
use tracing::{Event, Level, Metadata, Subscriber, callsite::Identifier};
use tracing_subscriber::layer::{Context, Filter};

use crate::audit;

/// So many seconds' lines may come at once.
const BURST_SECONDS: u32 = 5;
/// How often is told what was left out.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

type Limiter<C> = RateLimiter<NotKeyed, InMemoryState, C, NoOpMiddleware<<C as Clock>::Instant>>;

/// Counts the lines of each place in the program. Their number is bounded, since
/// the program's places are.
#[derive(Debug)]
pub(super) struct Storm<C: Clock = DefaultClock> {
    quota: Quota,
    clock: C,
    places: Mutex<HashMap<Identifier, Lines<C>>>,
}

#[derive(Debug)]
struct Lines<C: Clock> {
    limiter: Limiter<C>,
    place: &'static Metadata<'static>,
    left_out: u64,
}

impl Storm<DefaultClock> {
    /// Lets so many lines of each place through in a second, on average.
    #[must_use]
    pub(super) fn new(max_lines_per_second: u32) -> Self {
        Self::with_clock(max_lines_per_second, DefaultClock::default())
    }
}

impl<C: Clock + Clone> Storm<C> {
    fn with_clock(max_lines_per_second: u32, clock: C) -> Self {
        let rate = NonZeroU32::new(max_lines_per_second).unwrap_or(NonZeroU32::MIN);
        let burst = rate.saturating_mul(NonZeroU32::MIN.saturating_add(BURST_SECONDS - 1));
        Self {
            quota: Quota::per_second(rate).allow_burst(burst),
            clock,
            places: Mutex::default(),
        }
    }

    /// Whether a line of this place may be written.
    fn admit(&self, place: &'static Metadata<'static>) -> bool {
        // Who asks for details wants all of them, and audits have a limit of their own.
        if *place.level() > Level::INFO || place.target() == audit::TARGET {
            return true;
        }
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = places.entry(place.callsite()).or_insert_with(|| Lines {
            limiter: RateLimiter::direct_with_clock(self.quota, self.clock.clone()),
            place,
            left_out: 0,
        });
        let admitted = lines.limiter.check().is_ok();
        lines.left_out += u64::from(!admitted);
        admitted
    }

    /// How many lines of each place were left out since the last call.
    fn take_left_out(&self) -> Vec<(&'static Metadata<'static>, u64)> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = places
            .values_mut()
            .map(|lines| (lines.place, std::mem::take(&mut lines.left_out)));
        counts.filter(|(_, count)| *count > 0).collect()
    }
}

/// Tells now and then what was left out. Never ends.
pub(super) async fn report(storm: &Storm) {
    loop {
        tokio::time::sleep(REPORT_INTERVAL).await;
        tell(storm);
    }
}

/// Tells what was left out since the last time.
pub(super) fn tell(storm: &Storm) {
    for (place, lines) in storm.take_left_out() {
        tracing::warn!(
            lines,
            level = %place.level(),
            from = place.target(),
            line = place.line(),
            "lines were left out of the log: there were too many of them"
        );
    }
}

/// The storm as a filter of a layer.
#[derive(Clone, Debug)]
pub(super) struct StormFilter(pub(super) Arc<Storm>);

impl<S: Subscriber> Filter<S> for StormFilter {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        self.0.admit(event.metadata())
    }
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;
    use tracing::{Callsite, callsite::DefaultCallsite, field::FieldSet, metadata::Kind};

    use super::*;

    macro_rules! place {
        ($level:expr, $target:expr) => {{
            static CALLSITE: DefaultCallsite = DefaultCallsite::new(&META);
            static META: Metadata<'static> = Metadata::new(
                "event",
                $target,
                $level,
                None,
                None,
                None,
                FieldSet::new(&[], Identifier(&CALLSITE)),
                Kind::EVENT,
            );
            CALLSITE.metadata()
        }};
    }

    fn admitted(storm: &Storm<FakeRelativeClock>, place: &'static Metadata<'static>) -> usize {
        (0..1_000).filter(|_| storm.admit(place)).count()
    }

    #[test]
    fn a_storm_of_one_line_leaves_room_for_the_others() {
        let clock = FakeRelativeClock::default();
        let storm = Storm::with_clock(20, clock.clone());
        let (loud, quiet) = (
            place!(Level::WARN, "segment_relay::a"),
            place!(Level::INFO, "segment_relay::b"),
        );
        assert_eq!(admitted(&storm, loud), 100);
        assert!(storm.admit(quiet));
        assert_eq!(admitted(&storm, loud), 0);
        clock.advance(Duration::from_secs(1));
        assert_eq!(admitted(&storm, loud), 20);
        let told: Vec<_> = storm
            .take_left_out()
            .into_iter()
            .map(|(place, count)| (place.target(), count))
            .collect();
        assert_eq!(told, [("segment_relay::a", 900 + 1_000 + 980)]);
        assert!(storm.take_left_out().is_empty());
    }

    #[test]
    fn details_that_were_asked_for_and_audits_are_all_written() {
        let storm = Storm::with_clock(1, FakeRelativeClock::default());
        let debug = place!(Level::DEBUG, "segment_relay::a");
        let audit = place!(Level::INFO, audit::TARGET);
        assert_eq!(admitted(&storm, debug), 1_000);
        assert_eq!(admitted(&storm, audit), 1_000);
    }
}
