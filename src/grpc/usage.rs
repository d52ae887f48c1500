//! What callers and integrations use of the relay, and where it ends.

use std::{
    hash::Hash,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use foldhash::HashMap;
use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock, MonotonicClock},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

use super::{RelayError, body::HeldBytes, rpcs::Cost};
use crate::{
    config::{self, Config, Limits},
    integration::IntegrationId,
    permission::Caller,
};

/// Callers and integrations that are remembered: beyond, those without a call in
/// hand are forgotten, which fills their buckets.
const KEPT: usize = 10_000;
/// Bytes are counted in units of this size.
const UNIT_BYTES: u64 = 1_024;

/// Look-ups and the like of one caller that are done at once; more wait for their turn.
const CALLER_LOOK_UPS: usize = 16;

/// Counts what is used.
pub struct Usage {
    limits: Limits,
    shares: Shares,
    callers: Mutex<HashMap<String, Arc<CallerUse>>>,
    integrations: Mutex<HashMap<IntegrationId, Arc<Bucket>>>,
    memory: Arc<Semaphore>,
}

type Bucket = DefaultDirectRateLimiter;

/// What one caller may have of what all share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shares {
    calls: usize,
    watchers: usize,
}

impl Shares {
    /// At most half of all, so that one caller leaves room for others. Where callers are not
    /// told apart, there is but one.
    fn new(limits: &Limits, server: &config::Server, told_apart: bool) -> Self {
        let half = |all: usize| all.div_ceil(2);
        match told_apart {
            true => Self {
                calls: limits
                    .caller_calls_in_flight
                    .min(half(server.max_calls_in_flight)),
                watchers: limits.caller_watchers.min(half(server.max_watchers)),
            },
            false => Self {
                calls: limits.caller_calls_in_flight,
                watchers: server.max_watchers,
            },
        }
    }
}

struct CallerUse {
    calls: Arc<Semaphore>,
    watchers: Arc<Semaphore>,
    look_ups: Arc<Semaphore>,
    costly: Arc<Semaphore>,
    captures: Bucket,
}

/// Something that a caller has of its share.
#[derive(Debug)]
pub(super) struct CallerPermit {
    _permit: OwnedSemaphorePermit,
    /// Its caller is remembered for as long.
    _use: Arc<CallerUse>,
}

impl std::fmt::Debug for CallerUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallerUse").finish_non_exhaustive()
    }
}

/// A bound that was reached, whose it is, and when there is room again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttle {
    /// `caller`, `integration`, `connection` or `relay`.
    pub subject: &'static str,
    /// What there is too much of, and the setting that bounds it.
    pub what: &'static str,
    /// How long to wait.
    pub wait: Duration,
}

/// Wait where nobody can know when a call will end.
const SHORT_WAIT: Duration = Duration::from_millis(500);

impl Throttle {
    /// Too many calls that anybody may make.
    pub(super) const OPEN_CALLS: Self = Self {
        subject: "connection",
        what: "health calls at once on one connection",
        wait: SHORT_WAIT,
    };
}

impl Usage {
    /// Nothing is used.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let limits = config.limits.clone();
        let units = limits.request_bytes_in_flight / UNIT_BYTES;
        Self {
            memory: Arc::new(Semaphore::new(usize::try_from(units).unwrap_or(usize::MAX))),
            shares: Shares::new(&limits, &config.server, config.authenticates()),
            limits,
            callers: Mutex::default(),
            integrations: Mutex::default(),
        }
    }

    /// Counts a call for as long as the permit lives.
    pub(super) fn enter(&self, caller: &Caller) -> Result<CallerPermit, RelayError> {
        let own = self.caller(caller);
        let permit = Arc::clone(&own.calls).try_acquire_owned();
        held(
            own,
            permit,
            "calls at once ([limits] caller_calls_in_flight)",
        )
    }

    /// Counts a watcher for as long as the permit lives.
    pub(super) fn enter_watcher(&self, caller: &Caller) -> Result<CallerPermit, RelayError> {
        let own = self.caller(caller);
        let permit = Arc::clone(&own.watchers).try_acquire_owned();
        held(own, permit, "watchers at once ([limits] caller_watchers)")
    }

    /// Waits until fewer calls of the caller are at work that cost as much. Who goes meanwhile
    /// has asked for nothing.
    pub(super) async fn turn(&self, caller: &Caller, cost: Cost) -> Option<CallerPermit> {
        let own = self.caller(caller);
        let queue = match cost {
            Cost::Metered => return None,
            Cost::LookUp => &own.look_ups,
            Cost::Costly => &own.costly,
        };
        // Never closed.
        let permit = Arc::clone(queue).acquire_owned().await.ok()?;
        Some(CallerPermit {
            _permit: permit,
            _use: own,
        })
    }

    /// Counts captures.
    pub(super) fn capture(
        &self,
        caller: &Caller,
        integration: &IntegrationId,
        captures: usize,
    ) -> Result<(), RelayError> {
        let count = u32::try_from(captures).ok().and_then(NonZeroU32::new);
        let Some(count) = count else { return Ok(()) };
        let own = self.caller(caller);
        take(&own.captures, count).map_err(|wait| Throttle {
            subject: "caller",
            what: "captures in a second ([limits] caller_captures_per_second)",
            wait,
        })?;
        let shared = kept(&self.integrations, integration, || {
            bucket(
                self.limits.integration_captures_per_second,
                self.limits.integration_burst_captures,
            )
        });
        take(&shared, count).map_err(|wait| Throttle {
            subject: "integration",
            what: "captures in a second ([limits] integration_captures_per_second)",
            wait,
        })?;
        Ok(())
    }

    /// Takes room for a part of a request; refuses where there is none.
    pub(super) fn hold(&self, bytes: usize) -> Result<OwnedSemaphorePermit, RelayError> {
        Arc::clone(&self.memory)
            .try_acquire_many_owned(units(bytes))
            .map_err(|_| {
                RelayError::Throttled(Throttle {
                    subject: "relay",
                    what: "bytes of requests at once ([limits] request_bytes_in_flight)",
                    wait: SHORT_WAIT,
                })
            })
    }

    /// Takes room for an answer until it has left, with what the call holds.
    pub(super) fn hold_answer(&self, held: &HeldBytes, bytes: usize) -> Result<(), RelayError> {
        let permit = self.hold(bytes);
        let permit = permit.map_err(|_| Throttle {
            subject: "relay",
            what: "bytes of requests and answers at once ([limits] request_bytes_in_flight)",
            wait: SHORT_WAIT,
        })?;
        held.add(permit);
        Ok(())
    }

    /// The room that requests take, in units of 1,024 bytes.
    pub(super) fn memory(&self) -> Arc<Semaphore> {
        Arc::clone(&self.memory)
    }

    fn caller(&self, caller: &Caller) -> Arc<CallerUse> {
        kept(&self.callers, caller.name.as_str(), || CallerUse {
            calls: Arc::new(Semaphore::new(self.shares.calls)),
            watchers: Arc::new(Semaphore::new(self.shares.watchers)),
            look_ups: Arc::new(Semaphore::new(CALLER_LOOK_UPS)),
            costly: Arc::new(Semaphore::new(self.limits.caller_costly_calls)),
            captures: bucket(
                self.limits.caller_captures_per_second,
                self.limits.caller_burst_captures,
            ),
        })
    }
}

fn held(
    own: Arc<CallerUse>,
    permit: Result<OwnedSemaphorePermit, TryAcquireError>,
    what: &'static str,
) -> Result<CallerPermit, RelayError> {
    match permit {
        Ok(permit) => Ok(CallerPermit {
            _permit: permit,
            _use: own,
        }),
        Err(_) => Err(RelayError::Throttled(Throttle {
            subject: "caller",
            what,
            wait: SHORT_WAIT,
        })),
    }
}

impl From<Throttle> for RelayError {
    fn from(throttle: Throttle) -> Self {
        Self::Throttled(throttle)
    }
}

/// The room for so many bytes.
pub(super) fn units(bytes: usize) -> u32 {
    u32::try_from((bytes as u64).div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

fn bucket(per_second: u32, burst: u32) -> Bucket {
    // The configuration's bounds leave no room for 0.
    let number = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
    RateLimiter::direct(Quota::per_second(number(per_second)).allow_burst(number(burst)))
}

/// Takes `count` tokens, or says how long to wait for them.
fn take(bucket: &Bucket, count: NonZeroU32) -> Result<(), Duration> {
    match bucket.check_n(count) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(until)) => Err(until.wait_time_from(MonotonicClock.now())),
        // A batch fits into every burst; a second is as good as any.
        Err(_) => Err(Duration::from_secs(1)),
    }
}

/// The entry of a key; made where there is none.
fn kept<K, Q, T>(map: &Mutex<HashMap<K, Arc<T>>>, key: &Q, make: impl FnOnce() -> T) -> Arc<T>
where
    K: Eq + Hash + std::borrow::Borrow<Q>,
    Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
{
    let mut map = map.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = map.get(key) {
        return Arc::clone(found);
    }
    if map.len() >= KEPT {
        map.retain(|_, entry| Arc::strong_count(entry) > 1);
    }
    let made = Arc::new(make());
    map.insert(key.to_owned(), Arc::clone(&made));
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Outside;

    fn usage(settings: &str) -> Usage {
        let outside = Outside {
            validate: &|_| Vec::new(),
            read_key_file: &|_| Err(std::io::ErrorKind::NotFound.into()),
        };
        let none = Vec::<(String, String)>::new();
        let config = Config::load(Some(("test.toml", settings)), none, &outside);
        Usage::new(&config.expect("fine"))
    }

    #[test]
    fn an_answer_has_room_among_requests_until_it_has_left() {
        let small =
            "[server]\nmax_message_bytes = 65536\n[limits]\nrequest_bytes_in_flight = 1048576\n";
        let usage = usage(small);
        let (one, other) = (HeldBytes::default(), HeldBytes::default());
        usage.hold_answer(&one, 700_000).expect("room");
        let refused = usage.hold_answer(&other, 700_000).expect_err("none");
        assert_eq!(refused.reason(), "RELAY_LIMIT");
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        drop(one);
        usage.hold_answer(&other, 700_000).expect("free again");
    }

    #[tokio::test]
    async fn a_callers_costly_calls_wait_for_each_other_and_for_no_other_caller() {
        use futures_util::FutureExt;
        let usage = usage("[limits]\ncaller_costly_calls = 1\n");
        let caller = |name: &str| Caller {
            name: name.to_owned(),
            ..Caller::anonymous()
        };
        let (one, other) = (caller("one"), caller("other"));
        let first = usage.turn(&one, Cost::Costly).await;
        assert!(usage.turn(&one, Cost::Costly).now_or_never().is_none());
        let beside = usage.turn(&other, Cost::Costly).now_or_never();
        assert!(beside.flatten().is_some());
        assert!(usage.turn(&one, Cost::LookUp).await.is_some());
        drop(first);
        assert!(
            usage
                .turn(&one, Cost::Costly)
                .now_or_never()
                .flatten()
                .is_some()
        );
    }
}
