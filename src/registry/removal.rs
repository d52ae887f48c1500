//! Integrations that have gone from the configuration file: one for which events wait takes
//! nothing new, and is removed once they are delivered or given up. That state is stored, so
//! it lasts over a restart.

use std::sync::Arc;

use super::{Registry, RegistryError, Told, new_etag};
use crate::{
    integration::{Integration, IntegrationId},
    notice::Happening,
    permission::Scope,
    time::UnixMillis,
};

impl Registry {
    /// One integration that takes captures, by what a caller sent.
    ///
    /// # Errors
    /// As [`Registry::find`], and [`RegistryError::Removed`].
    pub async fn find_open(&self, id: &str) -> Result<Arc<Integration>, RegistryError> {
        open(self.find(id).await?)
    }

    /// The same as the outbox has it now.
    ///
    /// # Errors
    /// As [`Registry::find_open`].
    pub async fn find_stored_open(&self, id: &str) -> Result<Arc<Integration>, RegistryError> {
        open(self.find_stored(id).await?)
    }

    /// Removes an integration that has gone from the file, or notes that it has.
    pub(super) async fn let_go(
        &self,
        id: &IntegrationId,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<(), RegistryError> {
        let Some(gone) = self.get(id).filter(|one| one.revision.read_only) else {
            return Ok(());
        };
        let waiting = self.outbox.backlog(id).await?.events;
        if waiting == 0 {
            return self.remove(&gone, told, now).await;
        }
        if gone.revision.removal_time.is_some() {
            return Ok(());
        }
        tracing::warn!(
            integration = %id, waiting,
            "gone from the configuration file: it takes no captures, and is removed once no \
             events wait"
        );
        let mut kept = Integration::clone(&gone);
        kept.revision.etag = new_etag();
        kept.revision.update_time = now;
        kept.revision.removal_time = Some(now);
        self.store(kept, Some(&gone)).await?;
        told.of(Happening::Removed, id, "", now).await;
        Ok(())
    }

    /// Removes integrations that have gone from the file and for which no events wait any
    /// more; returns them.
    ///
    /// # Errors
    /// The outbox failed.
    pub async fn remove_drained(
        &self,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<Vec<IntegrationId>, RegistryError> {
        let mut removed = Vec::new();
        for one in self.list(None, &Scope::All, usize::MAX) {
            if one.revision.removal_time.is_none()
                || self.outbox.backlog(one.id()).await?.events > 0
            {
                continue;
            }
            let _changing = self.changing.lock().await;
            match self.remove(&one, told, now).await {
                Ok(()) => removed.push(one.id().clone()),
                // Another relay has removed or changed it, and this one hears of it.
                Err(RegistryError::StaleEtag(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    async fn remove(
        &self,
        gone: &Integration,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<(), RegistryError> {
        let (id, etag) = (gone.id(), gone.revision.etag.clone());
        self.outbox.delete_integration(id, etag).await?;
        self.change(|known| known.remove(id.name()));
        told.of(Happening::Deleted, id, "", now).await;
        Ok(())
    }
}

fn open(found: Arc<Integration>) -> Result<Arc<Integration>, RegistryError> {
    match found.revision.removal_time {
        Some(_) => Err(RegistryError::Removed(found.id().clone())),
        None => Ok(found),
    }
}
