//! Who is to blame for a failed request: all of its events as yet, one of them, or the source.

use std::{sync::Arc, time::Duration};

use super::{Ended, Lane, RefusedBatch};
use crate::{
    delivery::{
        backoff::Backoff,
        classify::{Failure, FaultKind},
        evidence::{Evidence, Finding},
        suspects::{MAX_SUSPECTS, Suspect},
    },
    event::EventType,
    outbox::LeasedCapture,
    proto::DeliveryReason,
    status::{MAX_ATTEMPTS_KEPT, Outcome},
    time::UnixMillis,
};

/// Refusals of a suspect alone, each with a control, after which it is given up.
const FINAL_REFUSALS: u32 = 1;
/// The same where the write key is refused: a changed key may not be known everywhere yet.
const KEY_REFUSALS: u32 = 3;

impl Lane {
    pub(super) fn fault(
        &mut self,
        sent: &mut [LeasedCapture],
        kind: FaultKind,
        failure: Failure,
        ended: Ended<'_>,
        evidence: &Evidence,
    ) -> (Outcome, Finding) {
        if let [capture] = sent
            && capture.event_count() == 1
        {
            return self.alone(capture, kind, failure, ended, evidence);
        }
        let events: u32 = sent.iter().map(LeasedCapture::event_count).sum();
        if kind.is_refusal() {
            if self.refused.len() >= MAX_ATTEMPTS_KEPT {
                self.refused.pop_front();
            }
            self.refused.push_back(RefusedBatch {
                request: ended.begun.request,
                started: ended.answer.started,
                left: events,
                is_too_large: ended.answer.http_status() == 413,
            });
        }
        let slow = kind == FaultKind::TimedOut;
        // Whatever the answer: one event may crash, hang or be refused by turns.
        let again = std::mem::replace(&mut self.failed_together, true);
        let halves = again || kind.is_refusal() || (slow && self.size.is_slow());
        if halves {
            self.size.halve(events as usize, slow);
        }
        let wait = if halves && !evidence.is_sick() {
            self.wait_in_search(kind, ended.jitter)
        } else {
            self.failures = self.failures.saturating_add(1);
            self.options.backoff.wait(self.failures, ended.jitter)
        };
        let wait = wait.max(failure.retry_after.unwrap_or_default());
        let outcome = self.wait(failure.reason, ended.now, wait);
        (outcome, Finding::Together(kind))
    }

    /// Requests that look for a suspect follow each other: at once after a refusal, which
    /// costs Segment nothing.
    fn wait_in_search(&self, kind: FaultKind, jitter: f64) -> Duration {
        match kind {
            FaultKind::Final => Duration::ZERO,
            _ => self.options.backoff.wait(1, jitter),
        }
    }

    /// An event failed alone.
    fn alone(
        &mut self,
        capture: &mut LeasedCapture,
        kind: FaultKind,
        failure: Failure,
        ended: Ended<'_>,
        evidence: &Evidence,
    ) -> (Outcome, Finding) {
        self.size.suspect_found();
        let user = self.trying.clone().or_else(|| capture.user_id());
        let mut suspect = self.suspects.take(user.clone().unwrap_or_default());
        let is_new = suspect.failures == 0;
        suspect.failures = suspect.failures.saturating_add(1);
        if kind.is_refusal() && suspect.first_refused.is_none() {
            suspect.first_refused = Some(self.first_refusal(capture, ended.begun.request));
        }
        let evidence = evidence.with_suspect(is_new);
        if let Some(reason) = self.verdict(&suspect, capture, kind, failure, ended, &evidence) {
            self.failures = 0;
            self.not_before = None;
            self.others_wait = true;
            self.refused.retain(|batch| carried(capture, batch) == 0);
            let finding = match reason == DeliveryReason::Expired && evidence.is_sick() {
                true => Finding::Alone {
                    kind,
                    is_new,
                    is_passed: suspect.is_passed,
                },
                false => Finding::GivenUp,
            };
            return (Outcome::DeadLetter { reason }, finding);
        }
        // A key with which others were taken since is not what is refused.
        let works = ended.begun.taken > suspect.first_refused;
        let finding = Finding::Alone {
            kind: match kind {
                FaultKind::Key if works => FaultKind::Final,
                kind => kind,
            },
            is_new,
            is_passed: suspect.is_passed,
        };
        let has_room = evidence.set_aside + self.suspects.count() < MAX_SUSPECTS;
        let asked = failure.retry_after.unwrap_or_default();
        let own = self
            .options
            .backoff
            .wait(suspect.failures, ended.jitter)
            .max(asked);
        let next = if user.is_none() || !has_room {
            // Without a free place no other user can pass it.
            self.failures = self.failures.saturating_add(1);
            self.options
                .backoff
                .wait(self.failures, ended.jitter)
                .max(asked)
        } else {
            self.suspects
                .set_aside(suspect, ended.begun.request, ended.now, own);
            let next = self.wait_after_suspect(kind, ended.jitter, &evidence);
            // What a sick source asks is for all of its events.
            if evidence.is_sick() {
                next.max(asked)
            } else {
                next
            }
        };
        let _ = self.wait(failure.reason, ended.now, next);
        let outcome = Outcome::Retry {
            reason: failure.reason,
            next_attempt: ended.now.plus(own.max(next)),
        };
        (outcome, finding)
    }

    /// Number of the first request with a suspect that was refused: this one, or one of whose
    /// other events all have been taken since. One with others left may have been their fault.
    fn first_refusal(&self, capture: &LeasedCapture, request: u64) -> u64 {
        let own = |batch: &&RefusedBatch| batch.left <= 1 && carried(capture, batch) > 0;
        let first = self.refused.iter().find(own);
        first.map_or(request, |batch| batch.request)
    }

    /// Notes that events were taken: they were not to blame for what was refused. Returns the
    /// last request that was refused and of which all has been taken now.
    pub(super) fn clear_of_refusals(&mut self, taken: &[LeasedCapture]) -> Option<u64> {
        for batch in &mut self.refused {
            let events: u32 = taken.iter().map(|capture| carried(capture, batch)).sum();
            batch.left = batch.left.saturating_sub(events);
        }
        let whole = |batch: &&RefusedBatch| batch.left == 0 && !batch.is_too_large;
        let whole = self.refused.iter().filter(whole);
        let last = whole.map(|batch| batch.request).max();
        self.refused.retain(|batch| batch.left > 0);
        last
    }

    /// Why a suspect is given up, if it is.
    fn verdict(
        &self,
        suspect: &Suspect,
        capture: &mut LeasedCapture,
        kind: FaultKind,
        failure: Failure,
        ended: Ended<'_>,
        evidence: &Evidence,
    ) -> Option<DeliveryReason> {
        // Others were taken between its first refusal and this one, and none was refused since.
        let has_control = suspect.first_refused.is_some()
            && ended.begun.taken > suspect.first_refused.max(evidence.refused);
        let (needed, reason) = match kind {
            FaultKind::Final => (FINAL_REFUSALS, failure.reason),
            _ => (KEY_REFUSALS, DeliveryReason::RequestRejected),
        };
        let is_proof = has_control && evidence.is_believed(ended.now);
        if kind.is_refusal() && is_proof && suspect.failures >= needed {
            return Some(reason);
        }
        let record = Arc::make_mut(&mut capture.record);
        let is_track = capture.track.is_some();
        let event = if is_track {
            &mut record.track
        } else {
            &mut record.identify
        };
        let failing = |since: UnixMillis| self.is_too_old(since, ended.now);
        let expired = if evidence.is_sick() {
            evidence.sick_since.is_some_and(failing) && failing(record.queue_time)
        } else {
            failing(*event.failing_since.get_or_insert(ended.now))
        };
        expired.then_some(DeliveryReason::Expired)
    }

    /// The lane's wait after it has set a suspect aside: none to speak of, so that others
    /// pass, unless it is the source that is sick.
    fn wait_after_suspect(
        &mut self,
        kind: FaultKind,
        jitter: f64,
        evidence: &Evidence,
    ) -> Duration {
        if !evidence.is_sick() {
            self.failures = 0;
            return self.wait_in_search(kind, jitter);
        }
        self.failures = self.failures.saturating_add(1);
        let backoff = self.options.backoff;
        let slowly = Backoff {
            max: backoff.max.max(self.options.unauthorized_retry),
            ..backoff
        };
        let backoff = if kind.is_refusal() { slowly } else { backoff };
        backoff.wait(self.failures, jitter)
    }
}

/// Events of a capture that a refused request carried.
fn carried(capture: &LeasedCapture, batch: &RefusedBatch) -> u32 {
    let attempts = &capture.record.attempts;
    let was_in = |event: &EventType| {
        let mut attempts = attempts.iter();
        attempts.any(|attempt| attempt.time == batch.started && attempt.carried(*event))
    };
    let events = EventType::ALL.into_iter();
    let events = events.filter(|event| capture.payload(*event).is_some());
    events.filter(was_in).map(|_| 1).sum()
}
