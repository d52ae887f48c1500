//! A lane's state machine: what to take next, and what an answer changes.
//! Pure: clock and jitter are passed in.

use std::{sync::Arc, time::Duration};

use crate::{
    event::EventType,
    outbox::{LaneKey, LeaseBudget, LeasedCapture, SettledCapture, Settlement},
    proto::DeliveryReason,
    segment::Answer,
    status::{Attempt, Outcome},
    time::UnixMillis,
};

use super::{
    backoff::Backoff,
    verdict::{Verdict, judge},
};

/// Bounds that all lanes keep.
#[derive(Clone, Copy, Debug)]
pub struct LaneOptions {
    /// Events of one request at the most.
    pub max_batch_events: usize,
    /// Bytes of the events of one request, with their commas, at the most.
    pub max_batch_bytes: usize,
    /// Waits after failures.
    pub backoff: Backoff,
    /// Wait after a refused write key.
    pub unauthorized_retry: Duration,
    /// An event that was tried and is older than this is given up.
    pub max_age: Duration,
}

/// What a lane does next.
#[derive(Clone, Copy, Debug)]
pub enum Plan {
    /// Take events within this budget and send them.
    Send(LeaseBudget),
    /// Nothing before this moment.
    WaitUntil(UnixMillis),
}

/// Whether a lane's integration can send into its region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// It has a write key.
    Ready,
    /// It has none for this region: its events wait, and never go to the other.
    NoneForRegion,
    /// There is no such integration any more.
    IntegrationGone,
    /// It was removed from the configuration file too long ago: all is given up.
    Overdue,
}

/// What a lane does with what it has leased.
#[derive(Debug)]
pub enum Step {
    /// Make this durable; nothing is sent.
    Settle(Settlement),
    /// Send all of these in one request.
    Send(Vec<LeasedCapture>),
}

/// The state of one lane. It holds no events: those are leased for each request.
#[derive(Debug)]
pub struct Lane {
    key: LaneKey,
    options: LaneOptions,
    failures: u32,
    /// No request before this moment, and how long that was to be.
    not_before: Option<(UnixMillis, Duration)>,
    /// Fewer events than the options allow, while a poisoned one is searched.
    narrowed_to: Option<usize>,
    /// No age counts from before this moment.
    age_from: Option<UnixMillis>,
}

impl Lane {
    /// A lane that has not sent yet.
    #[must_use]
    pub fn new(key: LaneKey, options: LaneOptions) -> Self {
        Self {
            key,
            options,
            failures: 0,
            not_before: None,
            narrowed_to: None,
            age_from: None,
        }
    }

    /// What to do at `now`.
    #[must_use]
    pub fn plan(&mut self, now: UnixMillis) -> Plan {
        match self.not_before {
            Some((moment, wait)) if moment > now => {
                // A clock that was put back must not make a wait longer.
                let moment = moment.min(now.plus(wait));
                self.not_before = Some((moment, wait));
                Plan::WaitUntil(moment)
            }
            _ => Plan::Send(LeaseBudget {
                max_events: self.narrowed_to.unwrap_or(self.options.max_batch_events),
                max_bytes: self.options.max_batch_bytes,
            }),
        }
    }

    /// What to do with what was leased.
    #[must_use]
    pub fn next_step(
        &mut self,
        mut leased: Vec<LeasedCapture>,
        credentials: Credentials,
        now: UnixMillis,
    ) -> Step {
        if let Some(settlement) = self.set_aside(&mut leased, now) {
            return Step::Settle(settlement);
        }
        match credentials {
            Credentials::Ready => Step::Send(leased),
            Credentials::IntegrationGone => {
                let reason = DeliveryReason::IntegrationDeleted;
                Step::Settle(self.settle_all(leased, None, Outcome::DeadLetter { reason }, now))
            }
            Credentials::Overdue => {
                let reason = DeliveryReason::Expired;
                Step::Settle(self.settle_all(leased, None, Outcome::DeadLetter { reason }, now))
            }
            Credentials::NoneForRegion => {
                let reason = DeliveryReason::RegionNotConfigured;
                let outcome = self.wait(reason, now, self.options.unauthorized_retry);
                Step::Settle(self.settle_all(leased, None, outcome, now))
            }
        }
    }

    /// Gives up what is damaged, or was tried and is too old.
    fn set_aside(&self, leased: &mut Vec<LeasedCapture>, now: UnixMillis) -> Option<Settlement> {
        let too_old = |capture: &mut LeasedCapture| {
            let tried = EventType::ALL.iter().any(|event| {
                capture.payload(*event).is_some() && capture.record.event(*event).attempt_count > 0
            });
            let queued = Some(capture.record.queue_time).max(self.age_from);
            tried && queued.is_some_and(|from| now.since(from) > self.options.max_age)
        };
        let damaged: Vec<_> = leased.extract_if(.., |capture| capture.damaged).collect();
        let (aside, reason) = if damaged.is_empty() {
            (
                leased.extract_if(.., too_old).collect(),
                DeliveryReason::Expired,
            )
        } else {
            (damaged, DeliveryReason::Damaged)
        };
        let outcome = Outcome::DeadLetter { reason };
        (!aside.is_empty()).then(|| self.settle_all(aside, None, outcome, now))
    }

    /// Ages count from this moment at the earliest: when the integration was last resumed.
    pub fn count_ages_from(&mut self, moment: Option<UnixMillis>) {
        self.age_from = moment;
    }

    /// Failures in a row: what Segment is told as `X-Retry-Count`.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Forgets a wait, since what it waited for may have changed.
    pub fn resume(&mut self) {
        self.not_before = None;
    }

    /// What the answer to a request with all of `sent` changes.
    #[must_use]
    pub fn settle(
        &mut self,
        sent: Vec<LeasedCapture>,
        answer: &Answer,
        now: UnixMillis,
        jitter: f64,
    ) -> Settlement {
        let events: u32 = sent.iter().map(LeasedCapture::event_count).sum();
        let verdict = judge(answer);
        let outcome = self.decide(verdict, events as usize, now, jitter);
        let reason = match (verdict, outcome) {
            (_, Outcome::Delivered) => DeliveryReason::Unspecified,
            (Verdict::Poisoned, _) => DeliveryReason::PayloadRejected,
            (_, Outcome::Retry { reason, .. } | Outcome::DeadLetter { reason }) => reason,
        };
        self.settle_all(sent, Some((answer, reason)), outcome, now)
    }

    fn decide(&mut self, verdict: Verdict, events: usize, now: UnixMillis, jitter: f64) -> Outcome {
        match verdict {
            Verdict::Delivered => {
                self.succeed();
                // Back to full batches, step by step: there may be more poison.
                self.narrowed_to = self
                    .narrowed_to
                    .map(|narrow| narrow.saturating_mul(2))
                    .filter(|narrow| *narrow < self.options.max_batch_events);
                Outcome::Delivered
            }
            Verdict::Retry(reason) => {
                self.failures = self.failures.saturating_add(1);
                let wait = self.options.backoff.wait(self.failures, jitter);
                self.wait(reason, now, wait)
            }
            Verdict::Pause(wait) => self.wait(DeliveryReason::RateLimited, now, wait),
            Verdict::Unauthorized => {
                self.failures = self.failures.saturating_add(1);
                let wait = self.options.unauthorized_retry;
                self.wait(DeliveryReason::Unauthorized, now, wait)
            }
            Verdict::Poisoned if events > 1 => {
                self.succeed();
                self.narrowed_to = Some(events.div_ceil(2));
                Outcome::Retry {
                    reason: DeliveryReason::PayloadRejected,
                    next_attempt: now,
                }
            }
            Verdict::Poisoned => {
                self.succeed();
                Outcome::DeadLetter {
                    reason: DeliveryReason::PayloadRejected,
                }
            }
            Verdict::Rejected => {
                self.succeed();
                Outcome::DeadLetter {
                    reason: DeliveryReason::RequestRejected,
                }
            }
        }
    }

    fn succeed(&mut self) {
        self.failures = 0;
        self.not_before = None;
    }

    fn wait(&mut self, reason: DeliveryReason, now: UnixMillis, wait: Duration) -> Outcome {
        let next_attempt = now.plus(wait);
        self.not_before = Some((next_attempt, wait));
        Outcome::Retry {
            reason,
            next_attempt,
        }
    }

    fn settle_all(
        &self,
        leased: Vec<LeasedCapture>,
        attempt: Option<(&Answer, DeliveryReason)>,
        outcome: Outcome,
        now: UnixMillis,
    ) -> Settlement {
        let mut captures = Vec::with_capacity(leased.len());
        for capture in leased {
            let carried = EventType::ALL.map(|event| capture.payload(event).is_some());
            let mut record = Arc::unwrap_or_clone(capture.record);
            if let Some((answer, reason)) = attempt {
                record.note_attempt(Attempt {
                    identify: carried[0],
                    track: carried[1],
                    time: answer.started,
                    http_status: answer.http_status(),
                    latency: answer.latency,
                    reason,
                    error: answer.error(),
                });
            }
            let changed = EventType::ALL
                .into_iter()
                .zip(carried)
                .filter(|(event, carried)| {
                    *carried && record.event_mut(*event).advance(outcome, now)
                })
                .map(|(event, _)| event)
                .collect();
            captures.push(SettledCapture {
                sequence: capture.sequence,
                record: Arc::new(record),
                changed,
            });
        }
        Settlement {
            lane: self.key.clone(),
            captures,
        }
    }
}

#[cfg(test)]
mod tests;
