//! Changes of integrations. Each starts from what is stored now, and is applied anew where
//! another relay was faster.

use std::sync::Arc;

use prost::Message;

use super::{Reads, Registry, RegistryError, etag, first_revision, make, next_revision, not_found};
use crate::{
    integration::{Integration, IntegrationId, apply_update},
    proto,
    time::UnixMillis,
    violation::Violation,
};

/// Times that a change is applied to an integration that other relays keep changing.
const MAX_TRIES: u32 = 10;

/// An integration before and after an update.
pub struct Updated {
    /// As it was.
    pub before: Arc<Integration>,
    /// As it is.
    pub now: Arc<Integration>,
}

impl Registry {
    /// Stores a new integration.
    ///
    /// # Errors
    /// It breaks rules, or there is one of its name.
    pub async fn create(
        &self,
        spec: &proto::Integration,
        now: UnixMillis,
    ) -> Result<Arc<Integration>, RegistryError> {
        let checked = make(spec, first_revision(now, false, 1))?;
        let mut reads = self.changing.lock().await;
        let id = checked.id();
        if self.stored(id, &mut reads).await?.is_some() {
            return Err(RegistryError::Exists(id.clone()));
        }
        self.check_size(&checked)?;
        let known = self.change(|known| known.len());
        if known >= self.bounds.integrations {
            return Err(RegistryError::TooMany(known));
        }
        let incarnation = self.next_incarnation(id).await?;
        let integration = make(spec, first_revision(now, false, incarnation))?;
        match self.store(integration, None).await {
            Err(RegistryError::StaleEtag(id)) => Err(RegistryError::Exists(id)),
            stored => stored,
        }
    }

    fn check_size(&self, integration: &Integration) -> Result<(), RegistryError> {
        let size = integration.to_spec_with_secrets().encoded_len();
        if size <= self.bounds.size {
            return Ok(());
        }
        Err(RegistryError::Invalid(vec![Violation {
            field: "integration".to_owned(),
            reason: "TOO_LARGE",
            description: format!(
                "{size} bytes, at most {} are taken ([limits] max_integration_size): use fewer \
                 mappings, or shorter ids and keys",
                self.bounds.size
            ),
        }]))
    }

    /// The incarnation of a new integration: nothing of a former one of its name is its own.
    pub(super) async fn next_incarnation(
        &self,
        name: &IntegrationId,
    ) -> Result<u32, RegistryError> {
        Ok(self.outbox.last_incarnation(name).await?.saturating_add(1))
    }

    /// Changes the fields that the mask names.
    ///
    /// # Errors
    /// There is none of this name, it is read-only, the etag is stale, or the
    /// result would break rules.
    pub async fn update(
        &self,
        change: &proto::Integration,
        mask: &[String],
        now: UnixMillis,
    ) -> Result<Updated, RegistryError> {
        let (id, etag) = (&change.integration_id, &change.etag);
        let mut reads = self.changing.lock().await;
        for _ in 1..MAX_TRIES {
            let before = self.changeable(id, etag, &mut reads).await?;
            match self.try_update(before, change, mask, now).await {
                Err(RegistryError::StaleEtag(_)) if etag.is_empty() => {}
                ended => return ended,
            }
        }
        let before = self.changeable(id, etag, &mut reads).await?;
        self.try_update(before, change, mask, now).await
    }

    async fn try_update(
        &self,
        before: Arc<Integration>,
        change: &proto::Integration,
        mask: &[String],
        now: UnixMillis,
    ) -> Result<Updated, RegistryError> {
        let spec = apply_update(before.to_spec_with_secrets(), change.clone(), mask)
            .map_err(RegistryError::Invalid)?;
        let mut next = make(&spec, before.revision.clone())?;
        next.revision = next_revision(&before, &next, now);
        self.check_size(&next)?;
        let next = self.store(next, Some(&before)).await?;
        self.wake_lanes_of(next.id());
        Ok(Updated { before, now: next })
    }

    /// Deletes an integration; returns how many events of it waited.
    ///
    /// # Errors
    /// There is none of this name, it is read-only, the etag is stale, or events
    /// wait and `force` is not set.
    pub async fn delete(&self, id: &str, etag: &str, force: bool) -> Result<u64, RegistryError> {
        let mut reads = self.changing.lock().await;
        for _ in 1..MAX_TRIES {
            let gone = self.deletable(id, etag, &mut reads).await?;
            match self.try_delete(&gone, force).await {
                Err(RegistryError::StaleEtag(_)) if etag.is_empty() => {}
                ended => return ended,
            }
        }
        let gone = self.deletable(id, etag, &mut reads).await?;
        self.try_delete(&gone, force).await
    }

    async fn try_delete(&self, gone: &Integration, force: bool) -> Result<u64, RegistryError> {
        let id = gone.id();
        let events = self.outbox.backlog(id).await?.events;
        if events > 0 && !force {
            let id = id.clone();
            return Err(RegistryError::EventsWaiting { id, events });
        }
        let replaces = gone.revision.etag.clone();
        self.outbox.delete_integration(id, replaces).await?;
        self.change(|known| known.remove(id.name()));
        // What waits is dead-lettered by its lanes.
        self.wake_lanes_of(id);
        Ok(events)
    }

    /// An integration that a caller may change, as it is stored.
    async fn changeable(
        &self,
        id: &str,
        expected: &str,
        reads: &mut Reads,
    ) -> Result<Arc<Integration>, RegistryError> {
        let found = self.unchanged(id, expected, reads).await?;
        match found.revision.read_only {
            true => Err(RegistryError::ReadOnly(found.id().clone())),
            false => Ok(found),
        }
    }

    /// An integration that a caller may delete: also one that has gone from the file.
    async fn deletable(
        &self,
        id: &str,
        expected: &str,
        reads: &mut Reads,
    ) -> Result<Arc<Integration>, RegistryError> {
        let found = self.unchanged(id, expected, reads).await?;
        match found.revision.read_only && found.revision.removal_time.is_none() {
            true => Err(RegistryError::ReadOnly(found.id().clone())),
            false => Ok(found),
        }
    }

    /// An integration as it is stored, if it has the etag that a caller expects.
    async fn unchanged(
        &self,
        id: &str,
        expected: &str,
        reads: &mut Reads,
    ) -> Result<Arc<Integration>, RegistryError> {
        let known = IntegrationId::new(id).ok_or_else(|| not_found(id))?;
        let found = self.stored(&known, reads).await?;
        let found = found.ok_or_else(|| not_found(id))?;
        if !expected.is_empty() && Some(expected) != etag(Some(&found)) {
            return Err(RegistryError::StaleEtag(known));
        }
        Ok(found)
    }

    /// One integration as it is stored, for those that hold the lock.
    async fn stored(
        &self,
        id: &IntegrationId,
        reads: &mut Reads,
    ) -> Result<Option<Arc<Integration>>, RegistryError> {
        if self.shared {
            self.read(id, reads).await
        } else {
            Ok(self.named(id.name()))
        }
    }

    /// Stores an integration in place of one that was read before.
    pub(super) async fn store(
        &self,
        integration: Integration,
        replaces: Option<&Integration>,
    ) -> Result<Arc<Integration>, RegistryError> {
        let replaces = replaces.map(|before| before.revision.etag.clone());
        self.outbox
            .put_integration(integration.to_spec_with_secrets(), replaces)
            .await?;
        let integration = Arc::new(integration);
        let (name, kept) = (integration.id().of_incarnation(1), Arc::clone(&integration));
        self.change(|known| known.insert(name, kept));
        Ok(integration)
    }
}
