//! The calls of the outbox.

use std::{collections::HashMap, sync::Arc};

use tokio::sync::{oneshot, watch};

use super::{
    JetStreamOutbox, Shared,
    intake::{self, Submission},
    message::{LaneRecord, decode},
    position::split,
    wire::unavailable,
};
use crate::{
    integration::IntegrationId,
    notice::Notice,
    outbox::{
        Backlog, BoxFuture, DeadLetter, DeadLetterCount, DeadLetterFilter, Erasure, FoundSubject,
        LaneKey, LeaseBudget, LeasedCapture, NewCapture, Outbox, OutboxError, Quota, Receipt,
        Selection, Settlement, Signals, StoredIntegration, SubjectQuery, Submitted,
    },
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
};

/// What is done by one relay of all: sending notices.
const NOTICES: &str = "notices";

impl Shared {
    async fn submit(&self, captures: Vec<NewCapture>) -> Result<Receipt, OutboxError> {
        self.check_open()?;
        if !self.signals.is_writable() {
            return Err(unavailable("it cannot be written now"));
        }
        let (reply, answer) = oneshot::channel();
        let mut intakes: HashMap<usize, Vec<usize>> = HashMap::new();
        for (place, capture) in captures.iter().enumerate() {
            let intake = intake::place(self, &capture.integration_id);
            intakes.entry(intake).or_default().push(place);
        }
        let sealed = captures
            .into_iter()
            .map(|capture| self.sealing.capture(capture));
        let captures = sealed.collect::<Result<Vec<_>, _>>()?;
        if intakes.len() <= 1 {
            let intake = intakes.keys().next().copied().unwrap_or(0);
            self.send(intake, Submission { captures, reply }).await?;
            return Ok(Receipt(answer));
        }
        // Captures of several integrations: each intake answers for its own.
        let mut captures: Vec<_> = captures.into_iter().map(Some).collect();
        let mut parts = Vec::new();
        for (intake, places) in intakes {
            let (reply, answer) = oneshot::channel();
            let own = places
                .iter()
                .filter_map(|place| captures.get_mut(*place)?.take())
                .collect();
            self.send(
                intake,
                Submission {
                    captures: own,
                    reply,
                },
            )
            .await?;
            parts.push((places, answer));
        }
        let count = captures.len();
        self.tasks.spawn(async move {
            let _ = reply.send(joined(count, parts).await);
        });
        Ok(Receipt(answer))
    }

    async fn send(&self, intake: usize, submission: Submission) -> Result<(), OutboxError> {
        let intake = self.intakes.get(intake).ok_or(OutboxError::Closed)?;
        intake
            .send(submission)
            .await
            .map_err(|_| OutboxError::Closed)
    }

    async fn backlog_of(&self, id: &IntegrationId) -> Result<Backlog, OutboxError> {
        let mut backlog = Backlog::default();
        for (lane, captures) in self.waiting(Some(id)).await? {
            if captures == 0 {
                continue;
            }
            backlog.lanes += 1;
            backlog.events += captures * 2;
            let time = self.oldest_of(&lane).await?;
            backlog.oldest = match (backlog.oldest, time) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
        }
        let captures = backlog.events as f64 / 2.0;
        backlog.bytes = (captures * self.counts.mean_bytes()) as u64;
        Ok(backlog)
    }

    /// When the first capture of a lane was queued.
    async fn oldest_of(&self, lane: &LaneKey) -> Result<Option<UnixMillis>, OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let found = self.wire.last(&stream, &self.layout.lane(lane)).await?;
        let record: LaneRecord = match found {
            Some((stored, _)) => decode("lane", stored.payload)?,
            None => LaneRecord::default(),
        };
        let replaced = self.replaced(lane).await?;
        let mut oldest = None;
        for queue in 0..2 {
            let (sequence, index) = split(record.cursor(queue));
            let from = (sequence.max(1), 1);
            let read = self.read_queue(lane, queue, &replaced, from).await?;
            let Some(first) = read.first() else { continue };
            let skipped = if first.sequence == sequence { index } else { 0 };
            let waiting = first.captures.get(skipped);
            let Some(stored) = waiting.and_then(|one| one.record.as_ref()) else {
                continue;
            };
            let time = stored.open(&lane.integration_id)?.queue_time;
            oldest = Some(oldest.map_or(time, |oldest: UnixMillis| oldest.min(time)));
        }
        Ok(oldest)
    }

    async fn close(&self) {
        if self.closing.is_cancelled() {
            return;
        }
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.sessions.end().await;
        if let Err(error) = self.wire.client.flush().await {
            tracing::debug!(%error, "NATS was away at the end");
        }
    }
}

/// The places of an intake's captures in the submission, and what becomes of them.
type Part = (
    Vec<usize>,
    oneshot::Receiver<Result<Vec<Submitted>, OutboxError>>,
);

async fn joined(count: usize, parts: Vec<Part>) -> Result<Vec<Submitted>, OutboxError> {
    let mut all: Vec<Option<_>> = (0..count).map(|_| None).collect();
    for (places, answer) in parts {
        let answers = answer.await.unwrap_or(Err(OutboxError::Closed))?;
        for (place, submitted) in places.into_iter().zip(answers) {
            all[place] = Some(submitted);
        }
    }
    Ok(all.into_iter().flatten().collect())
}

/// Runs a call unless the outbox is closed.
macro_rules! open {
    ($shared:expr, $call:expr) => {
        Box::pin(async move {
            $shared.check_open()?;
            $call.await
        })
    };
}

impl Outbox for JetStreamOutbox {
    fn submit(&self, captures: Vec<NewCapture>) -> BoxFuture<'_, Result<Receipt, OutboxError>> {
        Box::pin(self.0.submit(captures))
    }

    fn lease(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
    ) -> BoxFuture<'_, Result<Vec<LeasedCapture>, OutboxError>> {
        let lane = lane.clone();
        open!(self.0, self.0.lease_lane(&lane, budget))
    }

    fn settle(&self, settlement: Arc<Settlement>) -> BoxFuture<'_, Result<(), OutboxError>> {
        open!(self.0, self.0.settle_lane(&settlement))
    }

    fn find(
        &self,
        integration_id: &IntegrationId,
        capture_id: &str,
    ) -> BoxFuture<'_, Result<Option<CaptureRecord>, OutboxError>> {
        let (integration_id, capture_id) = (integration_id.clone(), capture_id.to_owned());
        open!(self.0, self.0.find_record(&integration_id, &capture_id))
    }

    fn waiting_lanes(&self) -> BoxFuture<'_, Result<Vec<LaneKey>, OutboxError>> {
        open!(self.0, async {
            let waiting = self.0.waiting(None).await?;
            let mut lanes: Vec<LaneKey> = waiting.into_keys().collect();
            lanes.sort_unstable();
            Ok(lanes)
        })
    }

    fn backlog(
        &self,
        integration_id: &IntegrationId,
    ) -> BoxFuture<'_, Result<Backlog, OutboxError>> {
        let integration_id = integration_id.clone();
        open!(self.0, self.0.backlog_of(&integration_id))
    }

    fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<DeadLetter>, OutboxError>> {
        open!(self.0, self.0.list_dead(&filter, after, limit))
    }

    fn count_dead_letters(
        &self,
        selection: Selection,
        older_than: UnixMillis,
    ) -> BoxFuture<'_, Result<DeadLetterCount, OutboxError>> {
        open!(self.0, self.0.count_dead(&selection, older_than))
    }

    fn replay(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<Result<u64, Quota>, OutboxError>> {
        open!(self.0, self.0.replay_dead(&selection, now))
    }

    fn discard(&self, selection: Selection) -> BoxFuture<'_, Result<u64, OutboxError>> {
        open!(self.0, self.0.discard_dead(&selection))
    }

    fn find_subject(
        &self,
        subject: SubjectQuery,
    ) -> BoxFuture<'_, Result<FoundSubject, OutboxError>> {
        open!(self.0, self.0.search(&subject))
    }

    fn erase(&self, erasure: Erasure) -> BoxFuture<'_, Result<ErasureReceipt, OutboxError>> {
        open!(self.0, self.0.erase_captures(&erasure))
    }

    fn erasure_receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ErasureReceipt>, OutboxError>> {
        open!(
            self.0,
            self.0.state.receipts(&self.0.sealing, before, limit)
        )
    }

    fn integrations(&self) -> BoxFuture<'_, Result<Vec<StoredIntegration>, OutboxError>> {
        open!(self.0, self.0.state.integrations(&self.0.sealing))
    }

    fn integration(
        &self,
        id: &IntegrationId,
    ) -> BoxFuture<'_, Result<Option<StoredIntegration>, OutboxError>> {
        let id = id.clone();
        open!(self.0, self.0.state.integration(&self.0.sealing, &id))
    }

    fn last_incarnation(&self, _name: &IntegrationId) -> BoxFuture<'_, Result<u32, OutboxError>> {
        Box::pin(async { Ok(0) })
    }

    fn put_integration(
        &self,
        integration: StoredIntegration,
        _replaces: Option<String>,
    ) -> BoxFuture<'_, Result<(), OutboxError>> {
        open!(
            self.0,
            self.0.state.put_integration(&self.0.sealing, &integration)
        )
    }

    fn delete_integration(
        &self,
        id: &IntegrationId,
        _replaces: String,
    ) -> BoxFuture<'_, Result<(), OutboxError>> {
        let id = id.clone();
        open!(self.0, self.0.state.delete_integration(&id))
    }

    fn integration_changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.0.state.changes())
    }

    fn put_notice(&self, notice: Notice) -> BoxFuture<'_, Result<(), OutboxError>> {
        open!(self.0, self.0.state.put_notice(&notice))
    }

    fn notices(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Notice>, OutboxError>> {
        open!(self.0, async {
            // One relay sends them, so that they keep their order and arrive once.
            if !self.0.sessions.prefers(NOTICES) {
                return Ok(Vec::new());
            }
            self.0.state.notices(limit).await
        })
    }

    fn delete_notice(&self, id: &str) -> BoxFuture<'_, Result<(), OutboxError>> {
        let id = id.to_owned();
        open!(self.0, self.0.state.delete_notice(&id))
    }

    fn signals(&self) -> &Signals {
        &self.0.signals
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.0.close())
    }
}
