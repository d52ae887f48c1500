//! The calls of the outbox: each goes to the database of its integration, or to all.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use async_trait::async_trait;
use tokio::sync::watch;

use super::{PostgresOutbox, erase::add_counts, error::damaged};
use crate::{
    integration::IntegrationId,
    notice::Notice,
    outbox::{
        Backlog, Claim, DeadLetter, DeadLetterCount, DeadLetterFilter, Erasure, FoundSubject,
        LaneKey, LeaseBudget, LeaseScope, LeasedCapture, NewCapture, Outbox, OutboxError, Quota,
        Receipt, Selection, Settlement, Signals, StoredIntegration, SubjectQuery, Taken, stored_id,
    },
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
};

#[async_trait]
impl Outbox for PostgresOutbox {
    async fn submit(&self, captures: Vec<NewCapture>) -> Result<Receipt, OutboxError> {
        self.submit_all(captures).await
    }

    async fn lease(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
        scope: LeaseScope,
    ) -> Result<Vec<LeasedCapture>, OutboxError> {
        let home = self.home(&lane.integration_id)?;
        home.lease(lane, budget, &scope).await
    }

    fn may_send(&self, lane: &LaneKey) -> bool {
        self.home(&lane.integration_id)
            .is_ok_and(|home| home.may_send(lane))
    }

    async fn settle(&self, settlement: Arc<Settlement>) -> Result<(), OutboxError> {
        let home = self.home(&settlement.lane.integration_id)?;
        home.settle(&settlement).await
    }

    async fn find(
        &self,
        integration_id: &IntegrationId,
        capture_id: &str,
    ) -> Result<Option<CaptureRecord>, OutboxError> {
        let home = self.home(integration_id)?;
        let _turn = home.look_up().await?;
        home.find(integration_id, capture_id).await
    }

    async fn waiting_lanes(&self) -> Result<Vec<LaneKey>, OutboxError> {
        let mut lanes = Vec::new();
        for database in self.present()? {
            lanes.extend(database.waiting_lanes().await?);
        }
        lanes.sort_unstable();
        Ok(lanes)
    }

    async fn backlog(&self, integration_id: &IntegrationId) -> Result<Backlog, OutboxError> {
        let home = self.home(integration_id)?;
        let _turn = home.look_up().await?;
        home.backlog(integration_id).await
    }

    async fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, OutboxError> {
        let filter = &filter;
        let found = self.each(|database| {
            let filter = filter.clone();
            database.scan(move |one| async move { one.dead_letters(filter, after, limit).await })
        });
        let mut letters: Vec<DeadLetter> = found.await?.into_iter().flatten().collect();
        letters.sort_unstable_by_key(|letter| letter.id);
        letters.truncate(limit);
        Ok(letters)
    }

    async fn count_dead_letters(
        &self,
        selection: Selection,
        older_than: UnixMillis,
    ) -> Result<DeadLetterCount, OutboxError> {
        let selection = &selection;
        let counts = self
            .each(|database| {
                let selection = selection.clone();
                database.scan(move |one| async move {
                    one.count_dead_letters(&selection, older_than).await
                })
            })
            .await?;
        let mut sum = DeadLetterCount::default();
        for count in counts {
            sum.events += count.events;
            sum.bytes += count.bytes;
            sum.older += count.older;
            sum.former += count.former;
        }
        Ok(sum)
    }

    async fn replay(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> Result<Result<Taken, Quota>, OutboxError> {
        self.check_open()?;
        let mut full = None;
        for database in self.databases.iter() {
            let (database, selection) = (Arc::clone(database), selection.clone());
            let replay = database.scan(move |one| async move { one.replay(&selection, now).await });
            match replay.await? {
                Ok(taken) if taken.events() == 0 => {}
                Ok(taken) => return Ok(Ok(taken)),
                Err(quota) => full = Some(quota),
            }
        }
        Ok(full.map_or(Ok(Taken::default()), Err))
    }

    async fn discard(&self, selection: Selection) -> Result<Taken, OutboxError> {
        self.check_open()?;
        for database in self.databases.iter() {
            let (database, selection) = (Arc::clone(database), selection.clone());
            let discard = database.scan(move |one| async move { one.discard(&selection).await });
            let taken = discard.await?;
            if taken.events() > 0 {
                return Ok(taken);
            }
        }
        Ok(Taken::default())
    }

    async fn find_subject(&self, subject: SubjectQuery) -> Result<FoundSubject, OutboxError> {
        let subject = &subject;
        let found = self
            .each(|database| {
                let subject = subject.clone();
                database.scan(move |one| async move { one.find_subject(&subject).await })
            })
            .await?;
        let mut all = FoundSubject::default();
        for one in found {
            all.captures.extend(one.captures);
            all.lanes.extend(one.lanes);
        }
        Ok(all)
    }

    async fn erase(&self, erasure: Erasure) -> Result<ErasureReceipt, OutboxError> {
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
    }

    async fn erasure_receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<ErasureReceipt>, OutboxError> {
        let parts = self
            .each(|database| {
                database.scan(move |one| async move { one.receipts(before, limit).await })
            })
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
    }

    async fn integrations(&self) -> Result<Vec<StoredIntegration>, OutboxError> {
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
    }

    async fn integration(
        &self,
        id: &IntegrationId,
    ) -> Result<Option<StoredIntegration>, OutboxError> {
        let name = id.name();
        // Where it was last, first: others may be away.
        if let Some(home) = self.context.home(id)
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
    }

    async fn last_incarnation(&self, name: &IntegrationId) -> Result<u32, OutboxError> {
        let id = name;

        let name = id.name();
        let found = self.each(|one| async move { one.last_incarnation(name).await });
        Ok(found.await?.into_iter().max().unwrap_or(0))
    }

    async fn put_integration(
        &self,
        integration: StoredIntegration,
        replaces: Option<String>,
    ) -> Result<(), OutboxError> {
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
    }

    async fn delete_integration(
        &self,
        id: &IntegrationId,
        replaces: String,
    ) -> Result<(), OutboxError> {
        let home = self.home(id)?;
        home.replace_integration(id, None, Some(&replaces), None)
            .await
    }

    async fn claim_configuration(
        &self,
        version: u64,
        digest: [u8; 16],
    ) -> Result<Claim, OutboxError> {
        let version = i64::try_from(version).unwrap_or(i64::MAX);
        for database in self.present()? {
            match database.claim(version, &digest).await? {
                Claim::Apply => {}
                refused => return Ok(refused),
            }
        }
        self.claimed.store(version, Ordering::Release);
        Ok(Claim::Apply)
    }

    fn integration_changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.context.changes.subscribe())
    }

    async fn put_notice(&self, notice: Notice) -> Result<(), OutboxError> {
        let database = self.present()?.next();
        let database = database.ok_or_else(|| self.databases[0].away())?;
        database.put_notice(&notice).await
    }

    async fn notices(&self, limit: usize) -> Result<Vec<Notice>, OutboxError> {
        let mut notices = Vec::new();
        for database in self.present()? {
            notices.extend(database.notices(limit).await?);
        }
        notices.truncate(limit);
        Ok(notices)
    }

    async fn delete_notice(&self, id: &str) -> Result<(), OutboxError> {
        for database in self.present()? {
            database.delete_notice(id).await?;
        }
        Ok(())
    }

    fn signals(&self) -> &Signals {
        &self.context.signals
    }

    async fn close(&self) {
        self.shut_down().await
    }
}
