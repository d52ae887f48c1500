//! The calls of the outbox as commands for its two threads.

use std::sync::{Arc, PoisonError};

use async_trait::async_trait;
use tokio::sync::oneshot;

use super::{
    OpenFiles, SqliteOutbox,
    committer::{Command, Incoming},
    entry::key_of,
    join,
    read_command::ReadCommand,
    selection::Want,
    writer::{CHUNK, WriteCommand},
};
use crate::{
    integration::IntegrationId,
    notice::Notice,
    outbox::{
        Backlog, DeadLetter, DeadLetterCount, DeadLetterFilter, Erasure, FoundSubject, LaneKey,
        LeaseBudget, LeaseScope, LeasedCapture, NewCapture, Outbox, OutboxError, Quota, Receipt,
        Selection, Settlement, Signals, StoredIntegration, SubjectQuery, Taken,
        sealing::SealedCapture, stored_id,
    },
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
};

#[async_trait]
impl Outbox for SqliteOutbox {
    async fn submit(&self, captures: Vec<NewCapture>) -> Result<Receipt, OutboxError> {
        let (reply, answer) = oneshot::channel();
        let reservation = match self.admitted(&captures).await {
            Ok(reservation) => reservation,
            Err(refused) => {
                let _ = reply.send(Ok(refused));
                return Ok(Receipt(answer));
            }
        };
        // Here and not in the committer: callers hash and encrypt side by side.
        let captures = captures
            .into_iter()
            .map(|capture| {
                let key = key_of(&capture.integration_id, &capture.capture_id);
                let SealedCapture { capture, subject } = self.sealing.capture(capture)?;
                Ok(Incoming {
                    key,
                    capture,
                    subject,
                })
            })
            .collect::<Result<_, OutboxError>>()?;
        let command = Command::Submit {
            captures,
            reservation,
            reply,
        };
        self.committer
            .send(command)
            .await
            .map_err(|_| OutboxError::Closed)?;
        Ok(Receipt(answer))
    }

    fn full(&self, integration_id: &IntegrationId) -> Option<Quota> {
        self.shared.full(&self.limits, integration_id)
    }

    fn may_know(&self, integration_id: &IntegrationId, capture_id: &str) -> bool {
        self.shared.may_know(integration_id, capture_id)
    }

    async fn lease(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
        scope: LeaseScope,
    ) -> Result<Vec<LeasedCapture>, OutboxError> {
        let all = scope == LeaseScope::All;
        let leased = self.lease_once(lane, budget, scope).await?;
        if all && leased.is_empty() {
            return Ok(self.look_for_hidden(lane, budget).await?.0);
        }
        Ok(leased)
    }

    async fn settle(&self, settlement: Arc<Settlement>) -> Result<(), OutboxError> {
        self.commit(move |reply| Command::Settle { settlement, reply })
            .await
    }

    async fn find(
        &self,
        integration_id: &IntegrationId,
        capture_id: &str,
    ) -> Result<Option<CaptureRecord>, OutboxError> {
        let (integration_id, capture_id) = (integration_id.clone(), capture_id.to_owned());
        self.read(move |reply| ReadCommand::Find {
            integration_id,
            capture_id,
            reply,
        })
        .await
    }

    async fn waiting_lanes(&self) -> Result<Vec<LaneKey>, OutboxError> {
        if self.committer.is_closed() {
            return Err(OutboxError::Closed);
        }
        let overlay = self.shared.lock();
        let waiting = overlay.tally.waiting_lanes();
        Ok(waiting.map(|(lane, _)| lane.clone()).collect())
    }

    async fn backlog(&self, integration_id: &IntegrationId) -> Result<Backlog, OutboxError> {
        let integration_id = integration_id.clone();
        self.read(move |reply| ReadCommand::Backlog {
            integration_id,
            reply,
        })
        .await
    }

    async fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, OutboxError> {
        let selection = Arc::new(Selection::Filter(filter));
        let found = self.walk(&selection, after, Want::Letters(limit)).await?;
        Ok(found.letters)
    }

    async fn count_dead_letters(
        &self,
        selection: Selection,
        older_than: UnixMillis,
    ) -> Result<DeadLetterCount, OutboxError> {
        let selection = Arc::new(selection);
        let found = self.walk(&selection, 0, Want::Count(older_than)).await?;
        Ok(found.count)
    }

    async fn replay(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> Result<Result<Taken, Quota>, OutboxError> {
        let selection = Arc::new(selection);
        let want = Want::Ids {
            most: CHUNK,
            replay: true,
        };
        loop {
            // Without any, no capture is held up.
            let ids = self.walk(&selection, 0, want).await?.ids;
            if ids.is_empty() {
                return Ok(Ok(Taken::default()));
            }
            let selection = Arc::clone(&selection);
            let change = self.alone(move |reply| WriteCommand::Replay {
                ids,
                selection,
                now,
                reply,
            });
            match self.exclusive.run(change).await? {
                // Another call was faster with these.
                Ok(taken) if taken.events() == 0 => {}
                done => return Ok(done),
            }
        }
    }

    async fn discard(&self, selection: Selection) -> Result<Taken, OutboxError> {
        let selection = Arc::new(selection);
        let want = Want::Ids {
            most: CHUNK,
            replay: false,
        };
        loop {
            let ids = self.walk(&selection, 0, want).await?.ids;
            if ids.is_empty() {
                return Ok(Taken::default());
            }
            let selection = Arc::clone(&selection);
            let change = self.alone(move |reply| WriteCommand::Discard {
                ids,
                selection,
                reply,
            });
            let taken = self.exclusive.run(change).await?;
            // At 0 another call was faster with these.
            if taken.events() > 0 {
                return Ok(taken);
            }
        }
    }

    async fn find_subject(&self, subject: SubjectQuery) -> Result<FoundSubject, OutboxError> {
        self.scan_subjects(subject).await
    }

    async fn erase(&self, erasure: Erasure) -> Result<ErasureReceipt, OutboxError> {
        let erasure = Box::new(erasure);
        let is_empty = erasure.captures.is_empty();
        let command = move |reply| WriteCommand::Erase { erasure, reply };
        match is_empty {
            // Only the receipt is stored.
            true => self.write(command).await,
            false => self.exclusive.run(self.alone(command)).await,
        }
    }

    async fn erasure_receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<ErasureReceipt>, OutboxError> {
        let command = move |reply| ReadCommand::Receipts {
            before,
            limit,
            reply,
        };

        let stored = self.read(command).await?;
        let open = |(id, sealed): &(String, Vec<u8>)| self.sealing.open_receipt(id, sealed);
        stored.iter().map(open).collect()
    }

    async fn integrations(&self) -> Result<Vec<StoredIntegration>, OutboxError> {
        let stored = self.read(|reply| ReadCommand::Integrations { reply });
        let stored = stored.await?;
        let open = |(id, sealed): &(String, Vec<u8>)| self.sealing.open_integration(id, sealed);
        stored.iter().map(open).collect()
    }

    async fn last_incarnation(&self, name: &IntegrationId) -> Result<u32, OutboxError> {
        let name = name.clone();
        self.read(|reply| ReadCommand::LastIncarnation { name, reply })
            .await
    }

    async fn put_integration(
        &self,
        integration: StoredIntegration,
        _replaces: Option<String>,
    ) -> Result<(), OutboxError> {
        let sealed = self.sealing.integration(&integration)?;
        let id = stored_id(&integration).ok_or_else(|| {
            OutboxError::Unavailable("an integration without a valid id".to_owned())
        })?;
        self.write(move |reply| WriteCommand::PutIntegration { id, sealed, reply })
            .await
    }

    async fn delete_integration(
        &self,
        id: &IntegrationId,
        _replaces: String,
    ) -> Result<(), OutboxError> {
        let id = id.clone();
        self.write(move |reply| WriteCommand::DeleteIntegration { id, reply })
            .await
    }

    async fn put_notice(&self, notice: Notice) -> Result<(), OutboxError> {
        self.write(move |reply| WriteCommand::PutNotice { notice, reply })
            .await
    }

    async fn notices(&self, limit: usize) -> Result<Vec<Notice>, OutboxError> {
        self.read(move |reply| ReadCommand::Notices { limit, reply })
            .await
    }

    async fn delete_notice(&self, id: &str) -> Result<(), OutboxError> {
        let id = id.to_owned();
        self.write(move |reply| WriteCommand::DeleteNotice { id, reply })
            .await
    }

    fn signals(&self) -> &Signals {
        &self.signals
    }

    async fn close(&self) {
        let open = self
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(OpenFiles {
            committer,
            writer,
            reader,
            _lock,
        }) = open
        else {
            return;
        };
        // Each thread ends after what is in its queue. The reader first: the
        // last to close merges SQLite's log into the database, which a reader can't.
        let _ = self.reader.send(ReadCommand::Close).await;
        join(reader).await;
        // It has the writer close when all is in the database.
        let _ = self.committer.send(Command::Close).await;
        join(committer).await;
        join(writer).await;
    }
}
