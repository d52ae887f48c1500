//! A circuit breaker for each endpoint.
//!
//! Lanes back off one by one; the breaker keeps thousands of them from trying a
//! dead endpoint at once. While it is open, one request at a time goes out, of
//! whichever lane is next: so nobody is locked out for a fixed time, and the first
//! success closes it. Only failures that are the endpoint's own count (no answer,
//! 5xx), and only where more than one integration sees them: one customer's broken
//! source is no reason to hold the others back.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::classify::{Disposition, FaultKind};
use crate::{integration::IntegrationId, proto::DeliveryReason};

/// Failures in a row that open a breaker.
const FAILURES_TO_OPEN: u32 = 10;
/// Integrations that have to be among those failures.
const INTEGRATIONS_TO_OPEN: usize = 2;

/// What an answer says of the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    /// It answers.
    Alive,
    /// It does not.
    Down,
}

impl Sign {
    /// A refusal is an answer, too; a fault is none.
    pub(super) fn of(disposition: Disposition) -> Self {
        match disposition {
            Disposition::Hold(DeliveryReason::Network) => Self::Down,
            Disposition::Fault(FaultKind::Transient | FaultKind::TimedOut, _) => Self::Down,
            Disposition::Delivered
            | Disposition::Pause(_)
            | Disposition::Hold(_)
            | Disposition::Fault(FaultKind::Misrouted | FaultKind::Final | FaultKind::Key, _) => {
                Self::Alive
            }
        }
    }
}

/// The state of one endpoint's breaker. Pure.
#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// Whose requests failed; no more than are needed to open.
    failing: HashSet<IntegrationId>,
    probing: bool,
}

impl State {
    fn is_open(&self) -> bool {
        self.failures >= FAILURES_TO_OPEN && self.failing.len() >= INTEGRATIONS_TO_OPEN
    }

    /// Whether a request may go out now.
    fn admit(&mut self) -> bool {
        let open = self.is_open();
        if open && self.probing {
            return false;
        }
        self.probing = open;
        true
    }

    /// Takes notice of an answer. Returns whether the breaker has changed.
    fn note(&mut self, id: &IntegrationId, sign: Sign) -> bool {
        let before = self.is_open();
        match sign {
            Sign::Alive => {
                self.failures = 0;
                self.failing.clear();
                self.probing = false;
            }
            Sign::Down => {
                self.failures = self.failures.saturating_add(1);
                if self.failing.len() < INTEGRATIONS_TO_OPEN {
                    self.failing.insert(id.clone());
                }
            }
        }
        before != self.is_open()
    }
}

/// Holds back requests to an endpoint that does not answer.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    state: Mutex<State>,
    released: Notify,
}

impl Breaker {
    /// Waits until a request may go out; it may as long as the admission lives.
    pub(super) async fn admit(&self) -> Admission<'_> {
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            // Enabled first, so that no release slips through in between.
            released.as_mut().enable();
            if self.lock().admit() {
                return Admission(self);
            }
            released.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request may go out.
#[derive(Debug)]
pub(super) struct Admission<'a>(&'a Breaker);

impl Admission<'_> {
    /// Takes notice of the answer. Returns whether the endpoint was found to be
    /// up (`Some(true)`) or down (`Some(false)`) by it.
    pub(super) fn note(&self, id: &IntegrationId, sign: Sign) -> Option<bool> {
        let mut state = self.0.lock();
        let changed = state.note(id, sign);
        changed.then(|| !state.is_open())
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.probing = false;
        let open = state.is_open();
        drop(state);
        if open {
            self.0.released.notify_one();
        } else {
            self.0.released.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::delivery::Failure;

    fn id(name: &str) -> IntegrationId {
        IntegrationId::new(name).expect("valid")
    }

    fn fail(breaker: &Breaker, names: &[&str]) {
        for turn in 0..FAILURES_TO_OPEN as usize {
            let admission = breaker.admit().now_or_never().expect("closed");
            admission.note(&id(names[turn % names.len()]), Sign::Down);
        }
    }

    #[test]
    fn one_integration_alone_never_opens_it() {
        let breaker = Breaker::default();
        fail(&breaker, &["acme"]);
        fail(&breaker, &["acme"]);
        assert!(!breaker.lock().is_open());
    }

    #[test]
    fn it_opens_at_the_tenth_failure_in_a_row_of_two_integrations_and_an_answer_begins_anew() {
        let mut state = State::default();
        let mut note = |name: &str, sign: Sign, count: usize| {
            for _ in 0..count {
                state.note(&id(name), sign);
            }
            state.is_open()
        };
        assert!(!note("other", Sign::Down, 1));
        assert!(!note("acme", Sign::Down, 8));
        assert!(!note("acme", Sign::Alive, 1));
        // Those before the answer are forgotten, and whose they were.
        assert!(!note("acme", Sign::Down, 1));
        assert!(!note("other", Sign::Down, 1));
        assert!(!note("acme", Sign::Alive, 1));
        assert!(!note("acme", Sign::Down, 9));
        assert!(!note("acme", Sign::Down, 9));
        assert!(note("other", Sign::Down, 1));
    }

    #[test]
    fn while_it_is_open_one_request_at_a_time_goes_out() {
        let breaker = Breaker::default();
        fail(&breaker, &["acme", "other"]);
        assert!(breaker.lock().is_open());
        let probe = breaker.admit().now_or_never().expect("the probe goes out");
        assert!(breaker.admit().now_or_never().is_none());
        assert_eq!(probe.note(&id("acme"), Sign::Down), None);
        drop(probe);
        let probe = breaker.admit().now_or_never().expect("the next one");
        assert_eq!(probe.note(&id("third"), Sign::Alive), Some(true));
        // Closed: everybody may.
        let _all = [(); 20].map(|()| breaker.admit().now_or_never().expect("closed"));
    }

    #[tokio::test]
    async fn a_probe_that_is_given_up_lets_the_next_one_out() {
        let breaker = Breaker::default();
        fail(&breaker, &["acme", "other"]);
        let probe = breaker.admit().await;
        let next = breaker.admit();
        tokio::pin!(next);
        assert!(next.as_mut().now_or_never().is_none());
        drop(probe);
        next.await;
    }

    #[test]
    fn refusals_are_signs_of_life_and_faults_are_not() {
        let failure = |reason| Failure {
            reason,
            retry_after: None,
        };
        let refused = failure(DeliveryReason::PayloadRejected);
        for alive in [
            Disposition::Delivered,
            Disposition::Fault(FaultKind::Final, refused),
            Disposition::Fault(FaultKind::Key, refused),
            Disposition::Hold(DeliveryReason::RateLimited),
            Disposition::Fault(FaultKind::Misrouted, failure(DeliveryReason::ServerError)),
        ] {
            assert_eq!(Sign::of(alive), Sign::Alive, "{alive:?}");
        }
        for down in [
            Disposition::Hold(DeliveryReason::Network),
            Disposition::Fault(FaultKind::Transient, failure(DeliveryReason::Network)),
            Disposition::Fault(FaultKind::TimedOut, failure(DeliveryReason::Timeout)),
            Disposition::Fault(FaultKind::Transient, failure(DeliveryReason::ServerError)),
        ] {
            assert_eq!(Sign::of(down), Sign::Down, "{down:?}");
        }
    }
}
