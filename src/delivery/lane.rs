//! A lane's state machine: what to take next, and what an answer changes.
//! Pure: clock, jitter and what is known of the source are passed in.
//!
//! A failure is booked on what caused it:
//! - Several events that fail together are halved until one of them fails alone.
//! - An event that fails alone is a suspect: it is set aside, and others pass it.
//! - A suspect is given up for a final answer only if others were taken after its first
//!   refusal; otherwise, if several suspects follow each other, the source is sick: its
//!   backlog waits and is tried slowly.
//! - A suspect is given up for its age when it has failed alone for so long.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use crate::{
    event::EventType,
    outbox::{LaneKey, LeaseBudget, LeaseScope, LeasedCapture, SettledCapture, Settlement},
    proto::DeliveryReason,
    segment::Answer,
    status::{Attempt, CaptureRecord, Outcome},
    time::UnixMillis,
};

use super::{
    backoff::Backoff,
    batch_size::BatchSize,
    classify::{Disposition, Failure, classify},
    evidence::{Begun, Evidence, Finding},
    suspects::{MAX_SUSPECTS, Suspects},
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
    /// Longest wait of a source that refuses everything.
    pub unauthorized_retry: Duration,
    /// An event that has failed by itself for longer is given up, and one that fails while
    /// its whole source has failed for longer.
    pub max_age: Duration,
}

/// What a lane does next.
#[derive(Clone, Debug)]
pub enum Plan {
    /// Take events within this budget and scope and send them.
    Send(LeaseBudget, LeaseScope),
    /// Nothing before this moment.
    WaitUntil(UnixMillis),
    /// Nothing before this moment, unless new captures come.
    RestUntil(UnixMillis),
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

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended<'a> {
    /// Its place among the requests of its source.
    pub begun: Begun,
    /// What came of it.
    pub answer: &'a Answer,
    /// When.
    pub now: UnixMillis,
    /// A share of waits, from 0 to 1.
    pub jitter: f64,
}

/// A request with several events that was refused for good.
#[derive(Clone, Copy, Debug)]
struct RefusedBatch {
    request: u64,
    started: UnixMillis,
    /// Its events that have not been taken since.
    left: u32,
    /// It was refused for its size (413): that its events are taken in smaller ones is no wonder.
    is_too_large: bool,
}

/// The state of one lane. It holds no events: those are leased for each request.
#[derive(Debug)]
pub struct Lane {
    key: LaneKey,
    options: LaneOptions,
    /// Failures in a row.
    failures: u32,
    /// Whether several events have failed together since the last success.
    failed_together: bool,
    /// No request before this moment, and how long that was to be.
    not_before: Option<(UnixMillis, Duration)>,
    size: BatchSize,
    /// Requests with several events that were refused for good.
    refused: VecDeque<RefusedBatch>,
    suspects: Suspects,
    /// The suspect that is being tried.
    trying: Option<String>,
    /// Whether events of others may wait.
    others_wait: bool,
    /// Whether the last request that was sent was others'. A plan alone is none: the rate may
    /// have kept it back, and a suspect must not take its tokens.
    others_went: bool,
    /// Recoveries of the source that this lane has taken notice of.
    recoveries: u64,
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
            failed_together: false,
            not_before: None,
            size: BatchSize::new(options.max_batch_events),
            refused: VecDeque::new(),
            suspects: Suspects::default(),
            trying: None,
            others_wait: true,
            others_went: false,
            recoveries: 0,
            age_from: None,
        }
    }

    /// What to do at `now`.
    #[must_use]
    pub fn plan(&mut self, now: UnixMillis, evidence: &Evidence) -> Plan {
        if self.has_recovered(evidence) {
            self.recoveries = evidence.recoveries;
            self.not_before = None;
            self.suspects.forget_waits();
        }
        if let Some((moment, wait)) = self.not_before
            && moment > now
        {
            // A clock that was put back must not make a wait longer.
            let moment = moment.min(now.plus(wait));
            self.not_before = Some((moment, wait));
            return Plan::WaitUntil(moment);
        }
        // Suspects and others take turns, so that neither holds the other up.
        let has_room = evidence.set_aside + self.suspects.count() < MAX_SUSPECTS;
        let others = self.others_wait && (!self.others_went || (evidence.is_sick() && has_room));
        self.trying = if others {
            None
        } else {
            self.suspects.due(now, evidence.taken)
        };
        let max_bytes = self.options.max_batch_bytes;
        if let Some(user) = &self.trying {
            let alone = LeaseBudget {
                max_events: 1,
                max_bytes,
            };
            return Plan::Send(alone, LeaseScope::Only(user.clone()));
        }
        if !self.others_wait
            && let Some(moment) = self.suspects.next_moment(now)
        {
            return Plan::RestUntil(moment);
        }
        let budget = LeaseBudget {
            max_events: self.size.get(),
            max_bytes,
        };
        Plan::Send(budget, self.suspects.others())
    }

    /// Whether the source has recovered since the last plan.
    #[must_use]
    pub fn has_recovered(&self, evidence: &Evidence) -> bool {
        self.recoveries != evidence.recoveries
    }

    /// Nothing waits of what the plan would take. Returns whether nothing waits at all.
    pub fn found_nothing(&mut self) -> bool {
        match self.trying.take() {
            Some(user) => self.release(&user),
            None => self.others_wait = false,
        }
        self.suspects.count() == 0 && !self.others_wait
    }

    /// New captures may wait.
    pub fn hear_of_captures(&mut self) {
        self.others_wait = true;
    }

    /// Users of this lane whose events are set aside.
    #[must_use]
    pub fn set_aside(&self) -> usize {
        self.suspects.count()
    }

    /// What to do with what was leased.
    #[must_use]
    pub fn next_step(
        &mut self,
        mut leased: Vec<LeasedCapture>,
        credentials: Credentials,
        now: UnixMillis,
    ) -> Step {
        let damaged: Vec<_> = leased.extract_if(.., |capture| capture.damaged).collect();
        if !damaged.is_empty() {
            let reason = DeliveryReason::Damaged;
            let outcome = Outcome::DeadLetter { reason };
            return Step::Settle(self.settle_all(damaged, None, outcome, now));
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

    /// Ages count from this moment at the earliest: when the integration was last resumed.
    pub fn count_ages_from(&mut self, moment: Option<UnixMillis>) {
        self.age_from = moment;
    }

    /// Whether what has gone on since a moment has gone on for longer than the maximum age.
    fn is_too_old(&self, since: UnixMillis, now: UnixMillis) -> bool {
        let since = self.age_from.map_or(since, |from| from.max(since));
        now.since(since) > self.options.max_age
    }

    /// Forgets all waits, since what they waited for may have changed.
    pub fn resume(&mut self) {
        self.failures = 0;
        self.not_before = None;
        self.suspects.forget_waits();
    }

    /// What the answer to a request with all of `sent` changes, and what it says of the
    /// source, of which `evidence` is known so far.
    #[must_use]
    pub fn settle(
        &mut self,
        mut sent: Vec<LeasedCapture>,
        ended: Ended<'_>,
        evidence: &Evidence,
    ) -> (Settlement, Finding) {
        let now = ended.now;
        self.others_went = self.trying.is_none();
        let disposition = classify(ended.answer);
        let (outcome, finding) = match disposition {
            Disposition::Delivered => self.taken(&sent),
            Disposition::Pause(wait) => {
                let outcome = self.wait(DeliveryReason::RateLimited, now, wait);
                (outcome, Finding::Nothing)
            }
            Disposition::Hold(reason) => (self.hold(reason, ended), Finding::Held),
            Disposition::Fault(kind, failure) => {
                self.fault(&mut sent, kind, failure, ended, evidence)
            }
        };
        let reason = match (disposition, outcome) {
            (Disposition::Fault(_, Failure { reason, .. }) | Disposition::Hold(reason), _)
            | (_, Outcome::Retry { reason, .. } | Outcome::DeadLetter { reason }) => reason,
            (_, Outcome::Delivered) => DeliveryReason::Unspecified,
        };
        let attempt = Some((ended.answer, reason));
        let mut settlement = self.settle_all(sent, attempt, outcome, now);
        if finding == Finding::Held {
            self.expire_held(&mut settlement, evidence, now);
        }
        (settlement, finding)
    }

    fn taken(&mut self, sent: &[LeasedCapture]) -> (Outcome, Finding) {
        let mut refused = self.clear_of_refusals(sent);
        self.failures = 0;
        self.failed_together = false;
        self.not_before = None;
        self.size.grow();
        if let Some(user) = self.trying.clone() {
            refused = refused.max(self.suspects.take(user).first_refused);
            self.others_wait = true;
        }
        self.suspects.pass();
        let finding = refused.map_or(Finding::Taken, Finding::TakenAfterAll);
        (Outcome::Delivered, finding)
    }

    /// A user's events go with the others again.
    fn release(&mut self, user: &str) {
        self.suspects.release(user);
        self.others_wait = true;
    }

    fn hold(&mut self, reason: DeliveryReason, ended: Ended<'_>) -> Outcome {
        self.failures = self.failures.saturating_add(1);
        let wait = self.options.backoff.wait(self.failures, ended.jitter);
        self.wait(reason, ended.now, wait)
    }

    /// Gives up what failed while nothing was taken for longer than the maximum age.
    fn expire_held(&self, settlement: &mut Settlement, evidence: &Evidence, now: UnixMillis) {
        let failing = |since: UnixMillis| self.is_too_old(since, now);
        if !evidence.sick_since.is_some_and(failing) {
            return;
        }
        let reason = DeliveryReason::Expired;
        for capture in &mut settlement.captures {
            if failing(capture.record.queue_time) {
                let record: &mut CaptureRecord = Arc::make_mut(&mut capture.record);
                for event in capture.changed.iter() {
                    let outcome = Outcome::DeadLetter { reason };
                    record.event_mut(event).advance(outcome, now);
                }
            }
        }
    }

    fn wait(&mut self, reason: DeliveryReason, now: UnixMillis, wait: Duration) -> Outcome {
        let next_attempt = now.plus(wait);
        self.not_before = (!wait.is_zero()).then_some((next_attempt, wait));
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

mod attribution;
#[cfg(test)]
mod tests;
