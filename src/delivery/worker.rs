//! One lane's work: lease -> send -> settle, until nothing waits.

mod conclude;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{
    Credentials, Disposition, Ended, Finding, Lane, Plan, Step,
    bell::Bell,
    classify::classify,
    parts::{DeliveryParts, Shared},
    report,
    spans::{self, BatchSpans},
};
use crate::{
    event::EventType,
    integration::Integration,
    metrics::AttemptFacts,
    outbox::{LaneKey, LeasedCapture, Settlement},
    secret::WriteKey,
    segment::Answer,
    time::UnixMillis,
    trace::{Traces, step},
};

/// A worker without work goes home after this time.
const IDLE: Duration = Duration::from_secs(60);
/// Requests of a lane do not begin more often than this unless they are full: where
/// Segment answers within less, each would carry an event or two. The first after a rest
/// goes at once.
const MIN_GAP: Duration = Duration::from_millis(50);
/// Wait after the outbox failed.
const OUTBOX_RETRY: Duration = Duration::from_secs(1);

pub(super) struct Worker {
    key: LaneKey,
    parts: Arc<DeliveryParts>,
    shared: Arc<Shared>,
    bell: Arc<Bell>,
    stop: CancellationToken,
    lane: Lane,
    /// When the last request that was not full began.
    small_since: Option<Instant>,
    /// The integration as it was at the last attempt, by its etag.
    tried_with: Option<String>,
}

/// What is to be settled, and how that came about.
struct Attempted {
    settlement: Settlement,
    /// If something was sent.
    sent: Option<Sent>,
    spans: BatchSpans,
}

/// A request that was sent.
struct Sent {
    request: u64,
    answer: Answer,
    finding: Finding,
}

/// What came of one turn.
enum Turn {
    /// Something was sent or settled: there may be more.
    Worked,
    /// Nothing waits.
    Idle,
    /// Not now.
    Wait(Duration),
    /// Not now, unless new captures come.
    Rest(Duration),
}

impl Worker {
    pub(super) fn new(
        key: LaneKey,
        parts: Arc<DeliveryParts>,
        shared: Arc<Shared>,
        bell: Arc<Bell>,
        stop: CancellationToken,
    ) -> Self {
        let lane = Lane::new(key.clone(), parts.lanes);
        Self {
            key,
            parts,
            shared,
            bell,
            stop,
            lane,
            small_since: None,
            tried_with: None,
        }
    }

    /// Works until nothing waits for a while, or delivery stops.
    pub(super) async fn run(mut self) {
        while !self.stop.is_cancelled() {
            match self.turn().await {
                Turn::Worked => {}
                Turn::Wait(wait) => self.wait(wait, false).await,
                Turn::Rest(wait) => self.wait(wait, true).await,
                Turn::Idle => {
                    if !self.rest().await {
                        return;
                    }
                }
            }
        }
        // Not called any more: whoever starts delivery again starts new workers.
        while !self.bell.leave() {
            self.bell.heard().await;
        }
    }

    async fn turn(&mut self) -> Turn {
        let evidence = self.parts.sources.evidence(&self.key);
        let (budget, scope) = match self.lane.plan(UnixMillis::now(), &evidence) {
            Plan::WaitUntil(moment) => return Turn::Wait(moment.since(UnixMillis::now())),
            Plan::RestUntil(moment) => return Turn::Rest(moment.since(UnixMillis::now())),
            Plan::Send(budget, scope) => (budget, scope),
        };
        if self.is_held() {
            return Turn::Idle;
        }
        self.fill_up().await;
        let shared = Arc::clone(&self.shared);
        let breaker = shared.breakers.get(self.key.region);
        let (admission, permit) = tokio::select! {
            () = self.stop.cancelled() => return Turn::Idle,
            both = async {
                let admission = breaker.admit().await;
                (admission, self.parts.turns.take(&self.key.integration_id).await)
            } => both,
        };
        let hold = self.parts.holds.hold(&self.key).await;
        let leased = match self.parts.outbox.lease(&self.key, budget, scope).await {
            Ok(leased) if leased.is_empty() => return self.found_nothing().await,
            Ok(leased) => leased,
            Err(error) => {
                tracing::warn!(lane = %self.key, %error, "cannot lease; trying again");
                return Turn::Wait(OUTBOX_RETRY);
            }
        };
        self.small_since = (!budget.is_used_up_by(&leased)).then(Instant::now);
        let attempted = match self.attempt(leased).await {
            Ok(attempted) => attempted,
            Err(wait) => return Turn::Wait(wait),
        };
        let Attempted {
            settlement,
            sent,
            spans,
        } = attempted;
        if let Some(sent) = &sent {
            self.note(&admission, &sent.answer);
        }
        drop((admission, permit));
        let settlement = Arc::new(settlement);
        let durable = async {
            self.make_durable(&settlement)
                .instrument(step("settle"))
                .await;
        };
        durable.instrument(spans.batch().clone()).await;
        drop(hold);
        spans.close(&settlement);
        report::settled(&self.parts.metrics, &settlement);
        if let Some(sent) = sent {
            self.conclude(&sent).await;
        }
        Turn::Worked
    }

    /// A lease was empty.
    async fn found_nothing(&mut self) -> Turn {
        if !self.lane.found_nothing() {
            return Turn::Worked;
        }
        if let Some(condition) = self.parts.sources.emptied(&self.key) {
            self.tell(condition, None).await;
        }
        Turn::Idle
    }

    /// Sends what was leased, or decides without sending; returns what is to be
    /// settled, and Segment's answer.
    ///
    /// # Errors
    /// How long to wait before it may be sent.
    async fn attempt(&mut self, leased: Vec<LeasedCapture>) -> Result<Attempted, Duration> {
        let id = &self.key.integration_id;
        let integration = self.integration().await?;
        self.tried_with = integration
            .as_ref()
            .map(|found| found.revision.etag.clone());
        if self.is_held() {
            return Err(Duration::ZERO);
        }
        let resumed = integration.as_ref().and_then(|it| it.revision.resume_time);
        self.lane.count_ages_from(resumed);
        let write_key = integration
            .as_ref()
            .map(|found| found.write_key(self.key.region));
        let (credentials, write_key) = match write_key {
            None => (Credentials::IntegrationGone, None),
            Some(None) => (Credentials::NoneForRegion, None),
            Some(key) => (Credentials::Ready, key),
        };
        let overdue = integration.as_ref().is_some_and(|it| self.is_overdue(it));
        let credentials = match overdue {
            true => Credentials::Overdue,
            false => credentials,
        };
        if credentials == Credentials::IntegrationGone {
            self.parts.rates.forget(id);
            self.parts.turns.forget(id);
        }
        let step = self.lane.next_step(leased, credentials, UnixMillis::now());
        match (step, write_key) {
            (Step::Send(leased), Some(write_key)) => self.send(write_key, leased).await,
            (Step::Settle(settlement), _) => {
                let captures = settlement.captures.len();
                tracing::warn!(lane = %self.key, captures, ?credentials, "settled unsent");
                Ok(Attempted {
                    settlement,
                    sent: None,
                    spans: BatchSpans::open(Traces::Off, &self.key, &[]),
                })
            }
            // Nothing is sent without a write key.
            (Step::Send(_), None) => Err(OUTBOX_RETRY),
        }
    }

    /// Whether a person holds the integration's deliveries. A change of that wakes its lanes.
    fn is_held(&self) -> bool {
        let known = self.parts.registry.get(&self.key.integration_id);
        known.is_some_and(|integration| integration.paused && !self.is_overdue(&integration))
    }

    fn is_overdue(&self, integration: &Integration) -> bool {
        integration.is_overdue(UnixMillis::now(), self.parts.lanes.max_age)
    }

    /// The integration. What is given up because it is missing is given up for good, so one
    /// without a write key is looked for where all relays store theirs.
    ///
    /// # Errors
    /// How long to wait until that is tried again.
    async fn integration(&self) -> Result<Option<Arc<Integration>>, Duration> {
        let (id, region) = (&self.key.integration_id, self.key.region);
        let known = self.parts.registry.get(id);
        let has_key = |known: &Arc<Integration>| known.write_key(region).is_some();
        if known.as_ref().is_some_and(has_key) {
            return Ok(known);
        }
        self.parts.registry.confirm(id).await.map_err(|error| {
            tracing::warn!(lane = %self.key, %error, "the integration cannot be read; trying again");
            OUTBOX_RETRY
        })
    }

    /// Sends what was leased, if the rate allows.
    ///
    /// # Errors
    /// How long to wait until it does.
    async fn send(
        &mut self,
        write_key: &WriteKey,
        leased: Vec<LeasedCapture>,
    ) -> Result<Attempted, Duration> {
        let (id, region) = (&self.key.integration_id, self.key.region);
        let count = leased.iter().map(LeasedCapture::event_count).sum();
        self.parts
            .rates
            .take(id, region, count, UnixMillis::now())?;
        // A pause may have outlasted the lease: then the lane is leased anew.
        if !self.parts.outbox.may_send(&self.key) {
            return Err(Duration::ZERO);
        }
        let sources = &self.parts.sources;
        sources.recall(&self.key, &leased);
        let begun = sources.begin(&self.key, self.tried_with.as_deref().unwrap_or_default());
        // Shared with what is leased, and not copied before they are sent.
        let events: Vec<Bytes> = leased
            .iter()
            .flat_map(|capture| EventType::ALL.map(|event| capture.payload(event).cloned()))
            .flatten()
            .collect();
        let retries = retries(&leased);
        let bytes: usize = events.iter().map(Bytes::len).sum();
        let (segment, traces) = (&self.parts.segment, self.parts.traces);
        let spans = BatchSpans::open(traces, &self.key, &leased);
        let endpoint = segment.endpoint(region);
        let span = spans
            .batch()
            .in_scope(|| spans::attempt(traces, endpoint, retries, events.len(), bytes));
        let sent = segment.send(region, write_key, events, retries);
        let answer = sent.instrument(span.clone()).await;
        self.parts.metrics.attempt(&AttemptFacts {
            region,
            endpoint,
            answer: &answer,
            events: count.into(),
            bytes: bytes as u64,
        });
        let now = UnixMillis::now();
        if let Disposition::Pause(wait) = classify(&answer) {
            self.parts.rates.pause(id, region, now, wait);
        }
        let ended = Ended {
            begun,
            answer: &answer,
            now,
            jitter: fastrand::f64(),
        };
        let evidence = self.parts.sources.evidence(&self.key);
        let (settlement, finding) = self.lane.settle(leased, ended, &evidence);
        let reason = report::reason(&settlement);
        spans::answered(spans.batch(), &span, &answer, reason);
        spans
            .batch()
            .in_scope(|| report::log(&settlement, &answer, reason));
        Ok(Attempted {
            settlement,
            sent: Some(Sent {
                request: begun.request,
                answer,
                finding,
            }),
            spans,
        })
    }

    /// What Segment has answered must not be forgotten: tries until the outbox
    /// takes it, or delivery stops. Then the events are sent again after the
    /// next start, with the same message ids.
    async fn make_durable(&self, settlement: &Arc<Settlement>) {
        while let Err(error) = self.parts.outbox.settle(Arc::clone(settlement)).await {
            tracing::warn!(lane = %self.key, %error, "cannot settle; trying again");
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(OUTBOX_RETRY) => {}
            }
        }
    }

    /// Waits until there may be more to send than a few events.
    async fn fill_up(&mut self) {
        if let Some(since) = self.small_since.take() {
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = tokio::time::sleep_until(since + MIN_GAP) => {}
            }
        }
    }

    /// Waits, but goes on at once when the integration has been changed, when the source
    /// works again, or, `for_captures`, when new captures come.
    async fn wait(&mut self, wait: Duration, for_captures: bool) {
        let until = tokio::time::sleep(wait);
        tokio::pin!(until);
        loop {
            // Also one since the wait was planned.
            if self
                .lane
                .has_recovered(&self.parts.sources.evidence(&self.key))
            {
                return;
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = &mut until => return,
                () = self.bell.heard() => {
                    self.lane.hear_of_captures();
                    if for_captures {
                        return;
                    }
                    let current = self.parts.registry.get(&self.key.integration_id);
                    if current.map(|found| found.revision.etag.clone()) != self.tried_with {
                        self.lane.resume();
                        return;
                    }
                }
            }
        }
    }

    /// Returns whether there may be work again.
    async fn rest(&mut self) -> bool {
        let goes_on = tokio::select! {
            () = self.stop.cancelled() => false,
            () = self.bell.heard() => true,
            () = tokio::time::sleep(IDLE) => !self.bell.leave(),
        };
        self.lane.hear_of_captures();
        goes_on
    }
}

/// How often the events of a request were tried before: those that were tried most often.
fn retries(leased: &[LeasedCapture]) -> u32 {
    let tried = leased.iter().flat_map(|capture| {
        let carried = |event: &EventType| capture.payload(*event).is_some();
        let events = EventType::ALL.into_iter().filter(carried);
        events.map(|event| capture.record.event(event).attempt_count)
    });
    tried.max().unwrap_or(0)
}
