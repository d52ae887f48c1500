//! The bucket: integrations, receipts, notices, and the key of what is blinded.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::jetstream::kv::{self, CreateErrorKind, UpdateErrorKind};
use futures_util::StreamExt;
use prost::Message;
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::{
    Layout, Shared,
    error::JetStreamError,
    wire::{Stored, Wire, unavailable},
};
use crate::{
    integration::IntegrationId,
    notice::Notice,
    outbox::{OutboxError, StoredIntegration, sealing::Sealing},
    proto::ErasureReceipt,
    time::UnixMillis,
    vault::{Vault, random},
};

/// Notices that wait, at the most.
const REPLICA_LAG: Duration = Duration::from_millis(300);
const MAX_NOTICES: usize = 1_000;
/// How long a deleted key leaves a mark.
const MARK_TTL: Duration = Duration::from_secs(24 * 3600);
/// Entries of one read.
const PAGE: (usize, usize) = (1_000, 4 * 1024 * 1024);
/// Tries to count up before giving up.
const TRIES: usize = 20;
const INDEX: &str = "vault.index";
const INDEX_PLACE: &str = "jetstream/index";
const RECEIPTS: &str = "receipts";

#[derive(Clone, PartialEq, Message)]
struct StoredNotice {
    #[prost(sint64, tag = "1")]
    millis: i64,
    #[prost(bytes = "vec", tag = "2")]
    body: Vec<u8>,
}

/// The bucket.
pub(in crate::outbox) struct StateStore {
    wire: Wire,
    store: kv::Store,
    stream: String,
    /// Revisions of the integrations as they were last read or written here.
    revisions: Mutex<HashMap<String, u64>>,
    changes: watch::Sender<u64>,
}

impl StateStore {
    pub(super) async fn open(wire: &Wire, layout: &Layout) -> Result<Self, OutboxError> {
        let store = wire
            .context
            .get_key_value(layout.bucket())
            .await
            .map_err(unavailable)?;
        Ok(Self {
            wire: wire.clone(),
            store,
            stream: layout.bucket_stream(),
            revisions: Mutex::default(),
            changes: watch::Sender::new(0),
        })
    }

    /// Counts up when an integration has changed, by whichever relay.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn revisions(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.revisions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The sealed key of what is blinded.
    pub(super) async fn index(&self) -> Result<Option<Vec<u8>>, OutboxError> {
        let found = self.store.get(INDEX).await.map_err(unavailable)?;
        Ok(found.map(|value| value.to_vec()))
    }

    /// The key of what is blinded; made by the first relay.
    pub(super) async fn index_key(
        &self,
        vault: &Vault,
    ) -> Result<Zeroizing<[u8; 32]>, JetStreamError> {
        if self.index().await?.is_none() {
            self.adopt_index(vault, &Zeroizing::new(random::<32>()?))
                .await?;
        }
        // Whoever was first has decided.
        let sealed = self
            .index()
            .await?
            .ok_or_else(|| unavailable("a key was not stored"))?;
        let plain = Zeroizing::new(vault.unseal(INDEX_PLACE, &sealed)?);
        let mut key = Zeroizing::new([0; 32]);
        if plain.len() != key.len() {
            return Err(unavailable("a key is damaged").into());
        }
        key.copy_from_slice(&plain);
        Ok(key)
    }

    /// Stores the key of what is blinded, unless there is one.
    pub(super) async fn adopt_index(
        &self,
        vault: &Vault,
        key: &[u8; 32],
    ) -> Result<(), JetStreamError> {
        let sealed = vault.seal(INDEX_PLACE, key)?;
        match self.store.create(INDEX, sealed.into()).await {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(unavailable(error).into()),
        }
    }

    /// All entries whose keys begin so, oldest change first, without the deleted.
    async fn entries(&self, prefix: &str) -> Result<Vec<(String, Stored)>, OutboxError> {
        let below = format!("$KV.{}.{prefix}.", self.store.name);
        let subject = format!("{below}*");
        let (mut all, mut from) = (Vec::new(), 0);
        loop {
            let page = self.wire.read(&self.stream, &subject, from, PAGE).await?;
            let Some(last) = page.last() else {
                return Ok(all);
            };
            from = last.sequence + 1;
            let live = page.into_iter().filter(|entry| !entry.payload.is_empty());
            all.extend(live.filter_map(|entry| {
                let key = entry.subject.strip_prefix(&below)?.to_owned();
                Some((key, entry))
            }));
        }
    }

    pub(in crate::outbox) async fn integrations(
        &self,
        sealing: &Sealing,
    ) -> Result<Vec<StoredIntegration>, OutboxError> {
        let mut entries = self.entries("integration").await?;
        entries.sort_by(|(one, _), (other, _)| one.cmp(other));
        let specs = entries
            .iter()
            .map(|(id, entry)| sealing.open_integration(id, &entry.payload));
        let specs = specs.collect::<Result<_, _>>()?;
        for (id, entry) in &entries {
            self.note_revision(id, entry.sequence);
        }
        Ok(specs)
    }

    /// One integration, as the bucket's leader has it.
    pub(super) async fn integration(
        &self,
        sealing: &Sealing,
        id: &IntegrationId,
    ) -> Result<Option<StoredIntegration>, OutboxError> {
        let subject = format!("$KV.{}.integration.{id}", self.store.name);
        let found = self.wire.last(&self.stream, &subject).await?;
        // A deleted one leaves an empty mark.
        let Some((entry, _)) = found.filter(|(entry, _)| !entry.payload.is_empty()) else {
            return Ok(None);
        };
        let spec = sealing.open_integration(id.as_str(), &entry.payload)?;
        self.note_revision(id.as_str(), entry.sequence);
        Ok(Some(spec))
    }

    fn note_revision(&self, id: &str, revision: u64) {
        let mut known = self.revisions();
        let seen = known.entry(id.to_owned()).or_insert(revision);
        *seen = (*seen).max(revision);
    }

    pub(in crate::outbox) async fn put_integration(
        &self,
        sealing: &Sealing,
        integration: &StoredIntegration,
    ) -> Result<(), OutboxError> {
        let id = &integration.integration_id;
        let sealed = sealing.integration(integration)?;
        let known = self.revisions().get(id).copied();
        let key = format!("integration.{id}");
        let revision = match known {
            Some(revision) => match self.store.update(&key, sealed.into(), revision).await {
                Ok(revision) => revision,
                Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                    return Err(changed_elsewhere(id));
                }
                Err(error) => return Err(unavailable(error)),
            },
            None => match self.store.create(&key, sealed.into()).await {
                Ok(revision) => revision,
                Err(error) if error.kind() == CreateErrorKind::AlreadyExists => {
                    return Err(changed_elsewhere(id));
                }
                Err(error) => return Err(unavailable(error)),
            },
        };
        self.revisions().insert(id.clone(), revision);
        Ok(())
    }

    pub(super) async fn delete_integration(&self, id: &IntegrationId) -> Result<(), OutboxError> {
        let key = format!("integration.{id}");
        let known = self.revisions().get(id.as_str()).copied();
        let Some(revision) = known else { return Ok(()) };
        let deleted = self
            .store
            .purge_expect_revision_with_ttl(&key, revision, MARK_TTL);
        deleted.await.map_err(unavailable)?;
        self.revisions().remove(id.as_str());
        Ok(())
    }

    pub(in crate::outbox) async fn put_notice(&self, notice: &Notice) -> Result<(), OutboxError> {
        let stored = StoredNotice {
            millis: notice.time.0,
            body: notice.body.clone(),
        };
        let key = format!("notice.{}", notice.id);
        self.store
            .put(key, stored.encode_to_vec().into())
            .await
            .map_err(unavailable)?;
        let waiting = self.entries("notice").await?;
        let gone = waiting.len().saturating_sub(MAX_NOTICES);
        for (id, _) in waiting.iter().take(gone) {
            self.delete_notice(id).await?;
        }
        if gone > 0 {
            tracing::error!(gone, "too many notifications wait; the oldest are given up");
        }
        Ok(())
    }

    pub(super) async fn notices(&self, limit: usize) -> Result<Vec<Notice>, OutboxError> {
        let entries = self.entries("notice").await?;
        let notices = entries.into_iter().take(limit).map(|(id, entry)| {
            let stored: StoredNotice = super::message::decode("notice", entry.payload)?;
            Ok(Notice {
                id,
                time: UnixMillis(stored.millis),
                body: stored.body,
            })
        });
        notices.collect()
    }

    pub(super) async fn delete_notice(&self, id: &str) -> Result<(), OutboxError> {
        let deleted = self
            .store
            .purge_with_ttl(format!("notice.{id}"), MARK_TTL)
            .await;
        deleted.map(drop).map_err(unavailable)
    }

    /// Stores a receipt; a new one gets the next number.
    pub(in crate::outbox) async fn put_receipt(
        &self,
        sealing: &Sealing,
        receipt: &mut ErasureReceipt,
    ) -> Result<(), OutboxError> {
        if receipt.receipt_id.is_empty() {
            receipt.receipt_id = self.count_up(RECEIPTS).await?.to_string();
        }
        let sealed = sealing.receipt(receipt)?;
        let key = format!("receipt.{}", receipt.receipt_id);
        self.store
            .put(key, sealed.into())
            .await
            .map(drop)
            .map_err(unavailable)
    }

    async fn count_up(&self, key: &str) -> Result<i64, OutboxError> {
        for _ in 0..TRIES {
            let before = self.store.entry(key).await.map_err(unavailable)?;
            let number = |entry: &kv::Entry| std::str::from_utf8(&entry.value).ok()?.parse().ok();
            let count: i64 = before.as_ref().and_then(number).unwrap_or(0) + 1;
            let revision = before.map_or(0, |entry| entry.revision);
            match self
                .store
                .update(key, count.to_string().into(), revision)
                .await
            {
                Ok(_) => return Ok(count),
                Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(1..20))).await;
                }
                Err(error) => return Err(unavailable(error)),
            }
        }
        Err(unavailable("too many relays count at once"))
    }

    pub(in crate::outbox) async fn receipts(
        &self,
        sealing: &Sealing,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<ErasureReceipt>, OutboxError> {
        let entries = self.entries("receipt").await?.into_iter();
        let numbered = entries.filter_map(|(id, entry)| Some((id.parse::<i64>().ok()?, entry)));
        let mut wanted: Vec<_> = numbered
            .filter(|(id, _)| before.is_none_or(|before| *id < before))
            .collect();
        wanted.sort_unstable_by_key(|(id, _)| std::cmp::Reverse(*id));
        wanted.truncate(limit);
        let open =
            |(id, entry): &(i64, Stored)| sealing.open_receipt(&id.to_string(), &entry.payload);
        wanted.iter().map(open).collect()
    }
}

fn changed_elsewhere(id: &str) -> OutboxError {
    match IntegrationId::new(id) {
        Some(id) => OutboxError::Changed(id),
        None => unavailable(format!("the integration {id} was changed")),
    }
}

/// Follows changes of integrations until the outbox closes.
pub(super) async fn follow(shared: Arc<Shared>) {
    loop {
        let watch = shared.state.store.watch("integration.*").await;
        if let Ok(mut watch) = watch {
            // What changed before the watch began is read once.
            tell_of_changes(&shared);
            loop {
                let next = tokio::select! {
                    () = shared.closing.cancelled() => return,
                    next = watch.next() => next,
                };
                let Some(Ok(entry)) = next else { break };
                if entry.operation != kv::Operation::Put {
                    let id = entry.key.trim_start_matches("integration.");
                    shared.state.revisions().remove(id);
                }
                tell_of_changes(&shared);
            }
        }
        tokio::select! {
            () = shared.closing.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }
    }
}

/// Counts twice: what is read at once may come from a replica that is a moment behind.
fn tell_of_changes(shared: &Arc<Shared>) {
    shared.state.changes.send_modify(|count| *count += 1);
    let later = Arc::clone(shared);
    shared.tasks.spawn(async move {
        tokio::select! {
            () = later.closing.cancelled() => {}
            () = tokio::time::sleep(REPLICA_LAG) => {
                later.state.changes.send_modify(|count| *count += 1);
            }
        }
    });
}
