//! The calls of the outbox: each goes to the database of its integration, or to all.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use tokio::sync::watch;

use super::{PostgresOutbox, erase::add_counts, error::damaged};
use crate::{
    integration::IntegrationId,
    notice::Notice,
    outbox::{
        Backlog, BoxFuture, Claim, DeadLetter, DeadLetterCount, DeadLetterFilter, Erasure,
        FoundSubject, LaneKey, LeaseBudget, LeasedCapture, NewCapture, Outbox, OutboxError, Quota,
        Receipt, Selection, Settlement, Signals, StoredIntegration, SubjectQuery, stored_id,
    },
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
};

impl Outbox for PostgresOutbox {
    fn submit(&self, captures: Vec<NewCapture>) -> BoxFuture<'_, Result<Receipt, OutboxError>> {
        Box::pin(self.submit_all(captures))
    }

    fn lease(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
    ) -> BoxFuture<'_, Result<Vec<LeasedCapture>, OutboxError>> {
        let lane = lane.clone();
        Box::pin(async move { self.home(&lane.integration_id)?.lease(&lane, budget).await })
    }

    fn may_send(&self, lane: &LaneKey) -> bool {
        self.home(&lane.integration_id)
            .is_ok_and(|home| home.may_send(lane))
    }

    fn settle(&self, settlement: Arc<Settlement>) -> BoxFuture<'_, Result<(), OutboxError>> {
        Box::pin(async move {
            let home = self.home(&settlement.lane.integration_id)?;
            home.settle(&settlement).await
        })
    }

    fn find(
        &self,
        integration_id: &IntegrationId,
        capture_id: &str,
    ) -> BoxFuture<'_, Result<Option<CaptureRecord>, OutboxError>> {
        let (id, capture_id) = (integration_id.clone(), capture_id.to_owned());
        Box::pin(async move { self.home(&id)?.find(&id, &capture_id).await })
    }

    fn waiting_lanes(&self) -> BoxFuture<'_, Result<Vec<LaneKey>, OutboxError>> {
        Box::pin(async move {
            let mut lanes = Vec::new();
            for database in self.present()? {
                lanes.extend(database.waiting_lanes().await?);
            }
            lanes.sort_unstable();
            Ok(lanes)
        })
    }

    fn backlog(
        &self,
        integration_id: &IntegrationId,
    ) -> BoxFuture<'_, Result<Backlog, OutboxError>> {
        let id = integration_id.clone();
        Box::pin(async move { self.home(&id)?.backlog(&id).await })
    }

    fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<DeadLetter>, OutboxError>> {
        Box::pin(async move {
            let filter = &filter;
            let found = self.each(|database| async move {
                database.dead_letters(filter.clone(), after, limit).await
            });
            let mut letters: Vec<DeadLetter> = found.await?.into_iter().flatten().collect();
            letters.sort_unstable_by_key(|letter| letter.id);
            letters.truncate(limit);
            Ok(letters)
        })
    }

    fn count_dead_letters(
        &self,
        selection: Selection,
        older_than: UnixMillis,
    ) -> BoxFuture<'_, Result<DeadLetterCount, OutboxError>> {
        Box::pin(async move {
            let selection = &selection;
            let counts = self
                .each(|one| async move { one.count_dead_letters(selection, older_than).await })
                .await?;
            let mut sum = DeadLetterCount::default();
            for count in counts {
                sum.events += count.events;
                sum.bytes += count.bytes;
                sum.older += count.older;
                sum.former += count.former;
            }
            Ok(sum)
        })
    }

    fn replay(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<Result<u64, Quota>, OutboxError>> {
        Box::pin(async move {
            self.check_open()?;
            let mut full = None;
            for database in self.databases.iter() {
                match database.replay(&selection, now).await? {
                    Ok(0) => {}
                    Ok(replayed) => return Ok(Ok(replayed)),
                    Err(quota) => full = Some(quota),
                }
            }
            Ok(full.map_or(Ok(0), Err))
        })
    }

    fn discard(&self, selection: Selection) -> BoxFuture<'_, Result<u64, OutboxError>> {
        Box::pin(async move {
            self.check_open()?;
            for database in self.databases.iter() {
                let discarded = database.discard(&selection).await?;
                if discarded > 0 {
                    return Ok(discarded);
                }
            }
            Ok(0)
        })
    }

    fn find_subject(
        &self,
        subject: SubjectQuery,
    ) -> BoxFuture<'_, Result<FoundSubject, OutboxError>> {
        Box::pin(async move {
            let subject = &subject;
            let found = self
                .each(|database| async move { database.find_subject(subject).await })
                .await?;
            let mut all = FoundSubject::default();
            for one in found {
                all.captures.extend(one.captures);
                all.lanes.extend(one.lanes);
            }
            Ok(all)
        })
    }

    fn erase(&self, erasure: Erasure) -> BoxFuture<'_, Result<ErasureReceipt, OutboxError>> {
        Box::pin(async move {
            self.check_open()?;
            let mut receipt = erasure.receipt.clone();
            let last = self.databases.len() - 1;
            for (place, database) in self.databases.iter().enumerate() {
                // The last word is stored wherever there may be a part of the receipt.
                let is_new = receipt.receipt_id.is_empty();
                let is_last = receipt.completed || (place == last && is_new);
                database.erase(&erasure, &mut receipt, is_last).await?;
            }
            Ok(receipt)
        })
    }

    fn erasure_receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ErasureReceipt>, OutboxError>> {
        Box::pin(async move {
            let parts = self
                .each(|database| async move { database.receipts(before, limit).await })
                .await?;
            let mut receipts: BTreeMap<i64, ErasureReceipt> = BTreeMap::new();
            for (id, part) in parts.into_iter().flatten() {
                match receipts.get_mut(&id) {
                    None => drop(receipts.insert(id, part)),
                    Some(receipt) => {
                        add_counts(receipt, &part);
                        receipt.completed &= part.completed;
                    }
                }
            }
            Ok(receipts.into_values().rev().take(limit).collect())
        })
    }

    fn integrations(&self) -> BoxFuture<'_, Result<Vec<StoredIntegration>, OutboxError>> {
        Box::pin(async move {
            let mut all = Vec::new();
            for database in self.present()? {
                for spec in database.integrations().await? {
                    if let Some(id) = stored_id(&spec) {
                        self.context.note_home(&id, database.place);
                    }
                    all.push(spec);
                }
            }
            all.sort_by(|one, other| one.integration_id.cmp(&other.integration_id));
            Ok(all)
        })
    }

    fn integration(
        &self,
        id: &IntegrationId,
    ) -> BoxFuture<'_, Result<Option<StoredIntegration>, OutboxError>> {
        let id = id.clone();
        Box::pin(async move {
            let name = id.name();
            // Where it was last, first: others may be away.
            if let Some(home) = self.context.home(&id)
                && let Some((_, Some(spec))) = self.databases[home].integration(name).await?
            {
                return Ok(Some(spec));
            }
            let found = self.each(|one| async move { one.integration(name).await });
            let mut kept = None;
            for (place, found) in found.await?.into_iter().enumerate() {
                if let Some((id, spec)) = found
                    && (spec.is_some() || kept.is_none())
                {
                    self.context.note_home(&id, place);
                    kept = Some(spec);
                }
            }
            Ok(kept.flatten())
        })
    }

    fn last_incarnation(&self, name: &IntegrationId) -> BoxFuture<'_, Result<u32, OutboxError>> {
        let id = name.clone();
        Box::pin(async move {
            let name = id.name();
            let found = self.each(|one| async move { one.last_incarnation(name).await });
            Ok(found.await?.into_iter().max().unwrap_or(0))
        })
    }

    fn put_integration(
        &self,
        integration: StoredIntegration,
        replaces: Option<String>,
    ) -> BoxFuture<'_, Result<(), OutboxError>> {
        Box::pin(async move {
            let id = stored_id(&integration);
            let id = id.ok_or_else(|| damaged("integration"))?;
            if replaces.is_none() {
                // It may be stored elsewhere than a new one of its name would be.
                Outbox::integration(self, &id).await?;
            }
            let home = self.home(&id)?;
            let claimed = self.claimed.load(Ordering::Acquire);
            let claimed = integration.read_only.then_some(claimed);
            let replaces = replaces.as_deref();
            home.replace_integration(&id, Some(&integration), replaces, claimed)
                .await?;
            self.context.note_home(&id, home.place);
            Ok(())
        })
    }

    fn delete_integration(
        &self,
        id: &IntegrationId,
        replaces: String,
    ) -> BoxFuture<'_, Result<(), OutboxError>> {
        let id = id.clone();
        Box::pin(async move {
            let home = self.home(&id)?;
            home.replace_integration(&id, None, Some(&replaces), None)
                .await
        })
    }

    fn claim_configuration(
        &self,
        version: u64,
        digest: [u8; 16],
    ) -> BoxFuture<'_, Result<Claim, OutboxError>> {
        Box::pin(async move {
            let version = i64::try_from(version).unwrap_or(i64::MAX);
            for database in self.present()? {
                match database.claim(version, &digest).await? {
                    Claim::Apply => {}
                    refused => return Ok(refused),
                }
            }
            self.claimed.store(version, Ordering::Release);
            Ok(Claim::Apply)
        })
    }

    fn integration_changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.context.changes.subscribe())
    }

    fn put_notice(&self, notice: Notice) -> BoxFuture<'_, Result<(), OutboxError>> {
        Box::pin(async move {
            let database = self.present()?.next();
            let database = database.ok_or_else(|| self.databases[0].away())?;
            database.put_notice(&notice).await
        })
    }

    fn notices(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Notice>, OutboxError>> {
        Box::pin(async move {
            let mut notices = Vec::new();
            for database in self.present()? {
                notices.extend(database.notices(limit).await?);
            }
            notices.truncate(limit);
            Ok(notices)
        })
    }

    fn delete_notice(&self, id: &str) -> BoxFuture<'_, Result<(), OutboxError>> {
        let id = id.to_owned();
        Box::pin(async move {
            for database in self.present()? {
                database.delete_notice(&id).await?;
            }
            Ok(())
        })
    }

    fn signals(&self) -> &Signals {
        &self.context.signals
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.shut_down())
    }
}
