//! The start: what is stored is read, and the configuration file's integrations are put in their
//! place.

use std::{
    collections::BTreeMap,
    sync::{Arc, RwLock},
};

use tokio::sync::Mutex;

use super::{Registry, RegistryError, first_revision, make, next_revision, restore};
use crate::{
    audit::{Audit, Entry},
    integration::{Integration, IntegrationId, changed_fields},
    notice::{Happening, Notice},
    notify::Notices,
    outbox::Outbox,
    proto,
    time::UnixMillis,
};

/// Tries to put an integration of the file in its place while other relays do, too.
const CONFIGURE_TRIES: u32 = 10;

impl Registry {
    /// Reads what is stored and puts the integrations of the configuration file
    /// in their place. One that has gone from the file goes here too, unless
    /// events wait for it: then it stays, to be deleted by hand.
    ///
    /// # Errors
    /// The outbox failed, or an integration of the file breaks rules.
    pub async fn load(
        outbox: Arc<dyn Outbox>,
        configured: &[proto::Integration],
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<Self, RegistryError> {
        let mut known = BTreeMap::new();
        for stored in outbox.integrations().await? {
            let integration = restore(&stored)?;
            known.insert(integration.id().clone(), Arc::new(integration));
        }
        let registry = Self {
            outbox,
            known: RwLock::new(known),
            changing: Mutex::new(()),
        };
        for id in registry
            .all()
            .iter()
            .filter(|one| one.revision.read_only)
            .map(|one| one.id())
        {
            if !configured
                .iter()
                .any(|spec| spec.integration_id == id.as_str())
            {
                registry.let_go(id, told, now).await?;
            }
        }
        for spec in configured {
            registry.configure_beside_others(spec, told, now).await?;
        }
        Ok(registry)
    }

    /// Relays that start together put the same integrations in place: whoever comes second
    /// looks again, and mostly finds nothing left to do.
    async fn configure_beside_others(
        &self,
        spec: &proto::Integration,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<(), RegistryError> {
        for _ in 1..CONFIGURE_TRIES {
            match self.configure(spec, told, now).await {
                Err(RegistryError::StaleEtag(id)) => self.confirm(&id).await?,
                done => return done,
            };
        }
        self.configure(spec, told, now).await
    }

    async fn let_go(
        &self,
        id: &IntegrationId,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<(), RegistryError> {
        let waiting = self.outbox.backlog(id).await?.events;
        if waiting == 0 {
            self.outbox.delete_integration(id).await?;
            self.change(|known| known.remove(id));
            told.of(Happening::Deleted, id, "", now).await;
            return Ok(());
        }
        tracing::warn!(
            integration = %id, waiting,
            "gone from the configuration file, but events wait: kept until it is deleted"
        );
        if let Some(kept) = self.get(id) {
            let mut kept = Integration::clone(&kept);
            kept.revision.read_only = false;
            self.store(kept).await?;
        }
        Ok(())
    }

    async fn configure(
        &self,
        spec: &proto::Integration,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<(), RegistryError> {
        let before = IntegrationId::new(&spec.integration_id).and_then(|id| self.get(&id));
        let mut next = make(spec, first_revision(now, true))?;
        let (happening, changed) = if let Some(before) = before {
            next.revision = next_revision(&before, &next, now);
            next.revision.read_only = true;
            let mut same = next.clone();
            same.revision = before.revision.clone();
            if same.to_spec_with_secrets() == before.to_spec_with_secrets()
                && before.revision.read_only
            {
                return Ok(());
            }
            let changed = changed_fields(&before, &next).join(" ");
            (Happening::Updated, changed)
        } else {
            (Happening::Created, String::new())
        };
        let stored = self.store(next).await?;
        told.of(happening, stored.id(), &changed, now).await;
        Ok(())
    }
}

/// Who is told of the changes that the configuration file brings.
pub struct Told<'a> {
    /// Takes notes.
    pub audit: &'a Audit,
    /// Tells people.
    pub notices: &'a Notices,
}

impl Told<'_> {
    async fn of(&self, happening: Happening, id: &IntegrationId, changed: &str, now: UnixMillis) {
        const CALLER: &str = "configuration";
        self.audit.note(&Entry {
            caller: CALLER,
            action: happening.as_str(),
            integration: id.as_str(),
            detail: changed.to_owned(),
        });
        let mut facts = vec![("caller", CALLER.into())];
        if happening == Happening::Updated {
            facts.push(("changed", changed.into()));
        }
        let notice = Notice::new(happening, id, &facts, now);
        self.notices.tell(notice).await;
    }
}
