//! The integrations that the relay knows: in memory for every capture, in the
//! outbox for the next start.

mod start;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{
    integration::{Integration, IntegrationId, Revision, apply_update},
    outbox::{Outbox, OutboxError},
    permission::Scope,
    proto,
    text::first_chars,
    time::UnixMillis,
    violation::Violation,
};

pub use start::Told;

/// How far a replica of the shared outbox may be behind.
const REPLICA_LAG: Duration = Duration::from_millis(300);

/// Why a change of integrations was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// There is none of this name.
    #[error("there is no integration {0}")]
    NotFound(String),
    /// There is one of this name.
    #[error("there is an integration {0} already")]
    Exists(IntegrationId),
    /// The specification breaks rules.
    #[error("the integration breaks {} rules", .0.len())]
    Invalid(Vec<Violation>),
    /// Somebody else has changed it since the caller read it.
    #[error("the integration {0} was changed in the meantime; read it again")]
    StaleEtag(IntegrationId),
    /// It comes from the configuration file.
    #[error("the integration {0} comes from the configuration file; change it there")]
    ReadOnly(IntegrationId),
    /// Events of an integration of this name wait.
    #[error("{events} events of the integration {id} wait")]
    EventsWaiting {
        /// The integration.
        id: IntegrationId,
        /// How many.
        events: u64,
    },
    /// The outbox failed.
    #[error(transparent)]
    Outbox(OutboxError),
}

impl From<OutboxError> for RegistryError {
    fn from(error: OutboxError) -> Self {
        match error {
            OutboxError::Changed(id) => Self::StaleEtag(id),
            error => Self::Outbox(error),
        }
    }
}

/// An integration before and after an update.
pub struct Updated {
    /// As it was.
    pub before: Arc<Integration>,
    /// As it is.
    pub now: Arc<Integration>,
}

/// The integrations that the relay knows.
pub struct Registry {
    outbox: Arc<dyn Outbox>,
    known: RwLock<BTreeMap<IntegrationId, Arc<Integration>>>,
    /// One change at a time.
    changing: Mutex<()>,
}

impl Registry {
    /// One integration.
    #[must_use]
    pub fn get(&self, id: &IntegrationId) -> Option<Arc<Integration>> {
        self.named(id.as_str())
    }

    /// One integration as the outbox has it at this moment: another relay may have made
    /// or changed it a moment ago, and what it has accepted may be here already.
    ///
    /// # Errors
    /// The outbox failed, or what is stored breaks rules.
    pub async fn confirm(
        &self,
        id: &IntegrationId,
    ) -> Result<Option<Arc<Integration>>, RegistryError> {
        if self.outbox.integration_changes().is_none() {
            return Ok(self.get(id));
        }
        let _changing = self.changing.lock().await;
        let stored = self.outbox.integration(id).await?;
        let found = stored.as_ref().map(restore).transpose()?.map(Arc::new);
        self.change(|known| match &found {
            Some(found) => known.insert(id.clone(), Arc::clone(found)),
            None => known.remove(id),
        });
        Ok(found)
    }

    /// One integration by what a caller sent.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`].
    pub fn find(&self, id: &str) -> Result<Arc<Integration>, RegistryError> {
        let found = self.named(id);
        found.ok_or_else(|| RegistryError::NotFound(first_chars(id, 64).to_owned()))
    }

    fn named(&self, id: &str) -> Option<Arc<Integration>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(id).cloned()
    }

    /// At most `limit` integrations of a scope after `after`, in the order of
    /// their ids.
    #[must_use]
    pub fn list(
        &self,
        after: Option<&IntegrationId>,
        scope: &Scope,
        limit: usize,
    ) -> Vec<Arc<Integration>> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known
            .range::<IntegrationId, _>((from, Bound::Unbounded))
            .filter(|(id, _)| scope.holds(id))
            .take(limit)
            .map(|(_, integration)| Arc::clone(integration))
            .collect()
    }

    fn all(&self) -> Vec<Arc<Integration>> {
        self.list(None, &Scope::All, usize::MAX)
    }

    /// Stores a new integration.
    ///
    /// # Errors
    /// It breaks rules, there is one of its name, or events of a deleted one of
    /// its name still wait to be dead-lettered.
    pub async fn create(
        &self,
        spec: &proto::Integration,
        now: UnixMillis,
    ) -> Result<Arc<Integration>, RegistryError> {
        let integration = make(spec, first_revision(now, false))?;
        let _changing = self.changing.lock().await;
        let id = integration.id().clone();
        if self.get(&id).is_some() {
            return Err(RegistryError::Exists(id));
        }
        let events = self.outbox.backlog(&id).await?.events;
        if events > 0 {
            return Err(RegistryError::EventsWaiting { id, events });
        }
        self.store(integration).await
    }

    /// Changes the fields that the mask names.
    ///
    /// # Errors
    /// There is none of this name, it is read-only, the etag is stale, or the
    /// result would break rules.
    pub async fn update(
        &self,
        change: proto::Integration,
        mask: &[String],
        now: UnixMillis,
    ) -> Result<Updated, RegistryError> {
        let _changing = self.changing.lock().await;
        let before = self.changeable(&change.integration_id, &change.etag)?;
        let spec = apply_update(before.to_spec_with_secrets(), change, mask)
            .map_err(RegistryError::Invalid)?;
        let mut next = make(&spec, before.revision.clone())?;
        next.revision = next_revision(&before, &next, now);
        let next = self.store(next).await?;
        self.wake_lanes_of(next.id()).await?;
        Ok(Updated { before, now: next })
    }

    /// Deletes an integration; returns how many events of it waited.
    ///
    /// # Errors
    /// There is none of this name, it is read-only, the etag is stale, or events
    /// wait and `force` is not set.
    pub async fn delete(&self, id: &str, etag: &str, force: bool) -> Result<u64, RegistryError> {
        let _changing = self.changing.lock().await;
        let gone = self.changeable(id, etag)?;
        let id = gone.id().clone();
        let events = self.outbox.backlog(&id).await?.events;
        if events > 0 && !force {
            return Err(RegistryError::EventsWaiting { id, events });
        }
        self.outbox.delete_integration(&id).await?;
        self.change(|known| known.remove(&id));
        // What waits is dead-lettered by its lanes.
        self.wake_lanes_of(&id).await?;
        Ok(events)
    }

    /// Follows what other relays change, until `stop`. Ends at once where the outbox is
    /// this relay's alone.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let Some(mut changes) = self.outbox.integration_changes() else {
            return;
        };
        // What changed between the load and now.
        changes.mark_changed();
        loop {
            let changed = tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => changed.is_ok(),
            };
            if !changed {
                return;
            }
            changes.borrow_and_update();
            // Twice: the first read may come from a replica that is a moment behind.
            for pause in [Duration::ZERO, REPLICA_LAG] {
                tokio::time::sleep(pause).await;
                if let Err(error) = self.reload().await {
                    tracing::warn!(%error, "integrations that another relay changed cannot be read yet");
                    changes.mark_changed();
                }
            }
        }
    }

    /// Reads all integrations anew, and wakes the lanes of those that have changed.
    async fn reload(&self) -> Result<(), RegistryError> {
        let _changing = self.changing.lock().await;
        let mut stored = BTreeMap::new();
        for spec in self.outbox.integrations().await? {
            let integration = restore(&spec)?;
            stored.insert(integration.id().clone(), Arc::new(integration));
        }
        let etag = |found: Option<&Arc<Integration>>| found.map(|one| one.revision.etag.clone());
        let changed: Vec<IntegrationId> = self.change(|known| {
            let ids: BTreeSet<_> = known.keys().chain(stored.keys()).cloned().collect();
            let differs = |id: &IntegrationId| etag(known.get(id)) != etag(stored.get(id));
            let changed = ids.into_iter().filter(differs).collect();
            *known = stored;
            changed
        });
        if changed.is_empty() {
            return Ok(());
        }
        tracing::info!(?changed, "integrations were changed by another relay");
        let waiting = self.outbox.waiting_lanes().await?.into_iter();
        let own = waiting.filter(|lane| changed.contains(&lane.integration_id));
        self.outbox.signals().wake_lanes(own);
        Ok(())
    }

    fn changeable(&self, id: &str, etag: &str) -> Result<Arc<Integration>, RegistryError> {
        let found = self.find(id)?;
        if found.revision.read_only {
            return Err(RegistryError::ReadOnly(found.id().clone()));
        }
        if !etag.is_empty() && etag != found.revision.etag {
            return Err(RegistryError::StaleEtag(found.id().clone()));
        }
        Ok(found)
    }

    async fn store(&self, integration: Integration) -> Result<Arc<Integration>, RegistryError> {
        self.outbox
            .put_integration(integration.to_spec_with_secrets())
            .await?;
        let integration = Arc::new(integration);
        let (id, kept) = (integration.id().clone(), Arc::clone(&integration));
        self.change(|known| known.insert(id, kept));
        Ok(integration)
    }

    async fn wake_lanes_of(&self, id: &IntegrationId) -> Result<(), RegistryError> {
        let waiting = self.outbox.waiting_lanes().await?;
        let own = waiting
            .into_iter()
            .filter(|lane| lane.integration_id == *id);
        self.outbox.signals().wake_lanes(own);
        Ok(())
    }

    fn change<T>(
        &self,
        change: impl FnOnce(&mut BTreeMap<IntegrationId, Arc<Integration>>) -> T,
    ) -> T {
        change(&mut self.known.write().unwrap_or_else(PoisonError::into_inner))
    }
}

fn make(spec: &proto::Integration, revision: Revision) -> Result<Integration, RegistryError> {
    Integration::new(spec, revision).map_err(RegistryError::Invalid)
}

fn restore(stored: &proto::Integration) -> Result<Integration, RegistryError> {
    let time = |time: &Option<prost_types::Timestamp>| {
        time.as_ref()
            .and_then(UnixMillis::from_proto)
            .unwrap_or_default()
    };
    make(
        stored,
        Revision {
            etag: stored.etag.clone(),
            mapping_version: stored.mapping_version,
            create_time: time(&stored.create_time),
            update_time: time(&stored.update_time),
            read_only: stored.read_only,
        },
    )
}

fn new_etag() -> String {
    format!("{:016x}", fastrand::u64(..))
}

fn first_revision(now: UnixMillis, read_only: bool) -> Revision {
    Revision {
        etag: new_etag(),
        mapping_version: 1,
        create_time: now,
        update_time: now,
        read_only,
    }
}

fn next_revision(before: &Integration, next: &Integration, now: UnixMillis) -> Revision {
    let changed = u64::from(!before.forms_same_events(next));
    Revision {
        etag: new_etag(),
        mapping_version: before.revision.mapping_version + changed,
        update_time: now,
        ..before.revision.clone()
    }
}
