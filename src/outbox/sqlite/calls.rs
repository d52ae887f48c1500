//! The calls of the outbox as commands for its two threads.

use std::sync::{Arc, PoisonError};

use tokio::sync::oneshot;

use super::{
    OpenFiles, SqliteOutbox,
    committer::{Command, Incoming},
    entry::key_of,
    join,
    reader::ReadCommand,
    writer::WriteCommand,
};
use crate::{
    integration::IntegrationId,
    notice::Notice,
    outbox::{
        Backlog, BoxFuture, DeadLetter, DeadLetterCount, DeadLetterFilter, Erasure, FoundSubject,
        LaneKey, LeaseBudget, LeasedCapture, NewCapture, Outbox, OutboxError, Quota, Receipt,
        Selection, Settlement, Signals, StoredIntegration, SubjectQuery, sealing::SealedCapture,
        stored_id,
    },
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
};

impl Outbox for SqliteOutbox {
    fn submit(&self, captures: Vec<NewCapture>) -> BoxFuture<'_, Result<Receipt, OutboxError>> {
        Box::pin(async move {
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
        })
    }

    fn full(&self, integration_id: &IntegrationId) -> Option<Quota> {
        self.shared.full(&self.limits, integration_id)
    }

    fn may_know(&self, integration_id: &IntegrationId, capture_id: &str) -> bool {
        self.shared.may_know(integration_id, capture_id)
    }

    fn lease(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
    ) -> BoxFuture<'_, Result<Vec<LeasedCapture>, OutboxError>> {
        let lane = lane.clone();
        Box::pin(async move {
            let fresh = self.shared.lock().fresh(&lane, budget);
            let mut leased = if fresh.stored_wait || self.committer.is_closed() {
                let command = move |reply| ReadCommand::Lease {
                    lane,
                    budget,
                    reply,
                };
                self.read(command).await?
            } else {
                let captures = fresh.captures.iter();
                captures.map(|entry| entry.leased(budget)).collect()
            };
            for capture in &mut leased {
                self.sealing.leased(capture)?;
            }
            Ok(leased)
        })
    }

    fn settle(&self, settlement: Arc<Settlement>) -> BoxFuture<'_, Result<(), OutboxError>> {
        Box::pin(self.commit(move |reply| Command::Settle { settlement, reply }))
    }

    fn find(
        &self,
        integration_id: &IntegrationId,
        capture_id: &str,
    ) -> BoxFuture<'_, Result<Option<CaptureRecord>, OutboxError>> {
        let (integration_id, capture_id) = (integration_id.clone(), capture_id.to_owned());
        Box::pin(self.read(move |reply| ReadCommand::Find {
            integration_id,
            capture_id,
            reply,
        }))
    }

    fn waiting_lanes(&self) -> BoxFuture<'_, Result<Vec<LaneKey>, OutboxError>> {
        Box::pin(async {
            if self.committer.is_closed() {
                return Err(OutboxError::Closed);
            }
            let overlay = self.shared.lock();
            let waiting = overlay.tally.waiting_lanes();
            Ok(waiting.map(|(lane, _)| lane.clone()).collect())
        })
    }

    fn backlog(
        &self,
        integration_id: &IntegrationId,
    ) -> BoxFuture<'_, Result<Backlog, OutboxError>> {
        let integration_id = integration_id.clone();
        Box::pin(self.read(move |reply| ReadCommand::Backlog {
            integration_id,
            reply,
        }))
    }

    fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<DeadLetter>, OutboxError>> {
        let command = move |reply| ReadCommand::DeadLetters {
            filter,
            after,
            limit,
            reply,
        };
        Box::pin(async {
            self.flush().await?;
            self.read(command).await
        })
    }

    fn count_dead_letters(
        &self,
        selection: Selection,
        older_than: UnixMillis,
    ) -> BoxFuture<'_, Result<DeadLetterCount, OutboxError>> {
        let command = move |reply| ReadCommand::CountDeadLetters {
            selection,
            older_than,
            reply,
        };
        Box::pin(async {
            self.flush().await?;
            self.read(command).await
        })
    }

    fn replay(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<Result<u64, Quota>, OutboxError>> {
        Box::pin(self.alone(move |reply| WriteCommand::Replay {
            selection,
            now,
            reply,
        }))
    }

    fn discard(&self, selection: Selection) -> BoxFuture<'_, Result<u64, OutboxError>> {
        Box::pin(self.alone(move |reply| WriteCommand::Discard { selection, reply }))
    }

    fn find_subject(
        &self,
        subject: SubjectQuery,
    ) -> BoxFuture<'_, Result<FoundSubject, OutboxError>> {
        Box::pin(self.scan_subjects(subject))
    }

    fn erase(&self, erasure: Erasure) -> BoxFuture<'_, Result<ErasureReceipt, OutboxError>> {
        let erasure = Box::new(erasure);
        Box::pin(self.alone(move |reply| WriteCommand::Erase { erasure, reply }))
    }

    fn erasure_receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ErasureReceipt>, OutboxError>> {
        let command = move |reply| ReadCommand::Receipts {
            before,
            limit,
            reply,
        };
        Box::pin(async move {
            let stored = self.read(command).await?;
            let open = |(id, sealed): &(String, Vec<u8>)| self.sealing.open_receipt(id, sealed);
            stored.iter().map(open).collect()
        })
    }

    fn integrations(&self) -> BoxFuture<'_, Result<Vec<StoredIntegration>, OutboxError>> {
        Box::pin(async {
            let stored = self.read(|reply| ReadCommand::Integrations { reply });
            let stored = stored.await?;
            let open = |(id, sealed): &(String, Vec<u8>)| self.sealing.open_integration(id, sealed);
            stored.iter().map(open).collect()
        })
    }

    fn last_incarnation(&self, name: &IntegrationId) -> BoxFuture<'_, Result<u32, OutboxError>> {
        let name = name.clone();
        Box::pin(self.read(|reply| ReadCommand::LastIncarnation { name, reply }))
    }

    fn put_integration(
        &self,
        integration: StoredIntegration,
        _replaces: Option<String>,
    ) -> BoxFuture<'_, Result<(), OutboxError>> {
        Box::pin(async move {
            let sealed = self.sealing.integration(&integration)?;
            let id = stored_id(&integration).ok_or_else(|| {
                OutboxError::Unavailable("an integration without a valid id".to_owned())
            })?;
            self.write(move |reply| WriteCommand::PutIntegration { id, sealed, reply })
                .await
        })
    }

    fn delete_integration(
        &self,
        id: &IntegrationId,
        _replaces: String,
    ) -> BoxFuture<'_, Result<(), OutboxError>> {
        let id = id.clone();
        Box::pin(self.write(move |reply| WriteCommand::DeleteIntegration { id, reply }))
    }

    fn put_notice(&self, notice: Notice) -> BoxFuture<'_, Result<(), OutboxError>> {
        Box::pin(self.write(move |reply| WriteCommand::PutNotice { notice, reply }))
    }

    fn notices(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Notice>, OutboxError>> {
        Box::pin(self.read(move |reply| ReadCommand::Notices { limit, reply }))
    }

    fn delete_notice(&self, id: &str) -> BoxFuture<'_, Result<(), OutboxError>> {
        let id = id.to_owned();
        Box::pin(self.write(move |reply| WriteCommand::DeleteNotice { id, reply }))
    }

    fn signals(&self) -> &Signals {
        &self.signals
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
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
        })
    }
}
