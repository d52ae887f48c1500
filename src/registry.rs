//! The integrations that the relay knows: in memory for every capture, in the
//! outbox for the next start.

mod change;
mod removal;
mod start;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{
    integration::{Integration, IntegrationId, Revision},
    outbox::{LaneKey, Outbox, OutboxError, SHARDS},
    permission::Scope,
    proto,
    region::Region,
    text::first_chars,
    time::UnixMillis,
    violation::Violation,
};

pub use change::Updated;
pub use start::{Configured, LoadError, Told};

/// Wait after the integrations could not be read.
const REFRESH_RETRY: Duration = Duration::from_secs(1);
/// Integrations whose last read is remembered.
const MAX_READS: usize = 1_000;

/// Why a change of integrations was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// There is none of this name.
    #[error("there is no integration {0}")]
    NotFound(String),
    /// It was removed from the configuration file, and takes nothing new.
    #[error(
        "the integration {0} was removed from the configuration file; it takes no captures, and \
         is gone once what waits is delivered or given up"
    )]
    Removed(IntegrationId),
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
    /// There are as many as there may be.
    #[error(
        "there are {0} integrations, as many as there may be ([limits] max_integrations); delete \
         one that is not used"
    )]
    TooMany(usize),
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

/// What callers may create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Integrations, those of the file included.
    pub integrations: usize,
    /// Bytes of one of them.
    pub size: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            integrations: usize::MAX,
            size: usize::MAX,
        }
    }
}

/// By their names, as first incarnations.
type Known = BTreeMap<IntegrationId, Arc<Integration>>;

/// The integrations that the relay knows.
pub struct Registry {
    outbox: Arc<dyn Outbox>,
    /// Whether other relays may change them.
    shared: bool,
    bounds: Bounds,
    known: RwLock<Known>,
    /// One change or read of the outbox at a time.
    changing: Mutex<Reads>,
    /// Reads of one integration that have begun.
    reads_begun: AtomicU64,
}

/// The number of the last read of each integration, and how it ended.
#[derive(Default)]
struct Reads(HashMap<IntegrationId, (u64, Result<(), RegistryError>)>);

impl Registry {
    fn new(outbox: Arc<dyn Outbox>, known: Known) -> Self {
        Self {
            shared: outbox.integration_changes().is_some(),
            outbox,
            bounds: Bounds::default(),
            known: RwLock::new(known),
            changing: Mutex::default(),
            reads_begun: AtomicU64::new(0),
        }
    }

    /// The same with bounds on what callers create and change.
    #[must_use]
    pub fn bounded(self, bounds: Bounds) -> Self {
        Self { bounds, ..self }
    }

    /// Whether other relays may change integrations.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// One integration, in this incarnation.
    #[must_use]
    pub fn get(&self, id: &IntegrationId) -> Option<Arc<Integration>> {
        self.named(id.name()).filter(|found| found.id() == id)
    }

    /// One integration as the outbox has it now: another relay may have changed it.
    ///
    /// # Errors
    /// The outbox failed, or what is stored breaks rules.
    pub async fn confirm(
        &self,
        id: &IntegrationId,
    ) -> Result<Option<Arc<Integration>>, RegistryError> {
        let found = self.confirm_name(id).await?;
        Ok(found.filter(|found| found.id() == id))
    }

    /// The same, by its name, in any incarnation.
    async fn confirm_name(
        &self,
        id: &IntegrationId,
    ) -> Result<Option<Arc<Integration>>, RegistryError> {
        if !self.shared {
            return Ok(self.named(id.name()));
        }
        let begun = self.reads_begun.load(Ordering::SeqCst);
        let mut reads = self.changing.lock().await;
        // A read that began after this call tells as much as another one would.
        let last = reads.0.get(id.name());
        match last {
            Some((number, ended)) if *number > begun => {
                ended.clone().map(|()| self.named(id.name()))
            }
            _ => self.read(id, &mut reads).await,
        }
    }

    /// One integration by what a caller sent. Where other relays may have made it, an unknown
    /// one is looked up in the outbox.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or the outbox failed.
    pub async fn find(&self, id: &str) -> Result<Arc<Integration>, RegistryError> {
        match self.named(id) {
            Some(found) => Ok(found),
            None => self.find_stored(id).await,
        }
    }

    /// One integration by what a caller sent, as the outbox has it now.
    ///
    /// # Errors
    /// As [`Registry::find`].
    pub async fn find_stored(&self, id: &str) -> Result<Arc<Integration>, RegistryError> {
        let found = match IntegrationId::new(id) {
            Some(id) => self.confirm_name(&id).await?,
            None => None,
        };
        found.ok_or_else(|| not_found(id))
    }

    /// Reads one integration, for those that hold the lock.
    async fn read(
        &self,
        id: &IntegrationId,
        reads: &mut Reads,
    ) -> Result<Option<Arc<Integration>>, RegistryError> {
        let number = self.reads_begun.fetch_add(1, Ordering::SeqCst) + 1;
        let stored = self.outbox.integration(id).await;
        let found = stored.map_err(RegistryError::from).and_then(|stored| {
            let found = stored.as_ref().map(restore_again).transpose()?;
            Ok(found.map(Arc::new))
        });
        if reads.0.len() >= MAX_READS {
            reads.0.clear();
        }
        let ended = found.as_ref().map(|_| ()).map_err(RegistryError::clone);
        reads.0.insert(id.of_incarnation(1), (number, ended));
        let found = found?;
        let name = id.of_incarnation(1);
        let before = self.change(|known| match &found {
            Some(found) => known.insert(name, Arc::clone(found)),
            None => known.remove(&name),
        });
        if etag(before.as_ref()) != etag(found.as_ref()) {
            before
                .iter()
                .chain(&found)
                .for_each(|one| self.wake_lanes_of(one.id()));
        }
        Ok(found)
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
        if let Scope::Only(ids) = scope {
            let own = ids.range::<IntegrationId, _>((from, Bound::Unbounded));
            let own = own.filter_map(|id| known.get(id));
            return own.take(limit).cloned().collect();
        }
        known
            .range::<IntegrationId, _>((from, Bound::Unbounded))
            .filter(|(id, _)| scope.holds(id))
            .take(limit)
            .map(|(_, integration)| Arc::clone(integration))
            .collect()
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
            if let Err(error) = self.refresh().await {
                tracing::warn!(%error, "integrations of other relays cannot be read; trying again");
                changes.mark_changed();
                tokio::time::sleep(REFRESH_RETRY).await;
            }
        }
    }

    /// Reads all integrations, and wakes the lanes of those that have changed. Does nothing
    /// where only this relay changes them.
    ///
    /// # Errors
    /// The outbox failed, or what is stored breaks rules.
    pub async fn refresh(&self) -> Result<(), RegistryError> {
        if !self.shared {
            return Ok(());
        }
        let _changing = self.changing.lock().await;
        let mut stored = BTreeMap::new();
        for spec in self.outbox.integrations().await? {
            let integration = restore_again(&spec)?;
            let name = integration.id().of_incarnation(1);
            stored.insert(name, Arc::new(integration));
        }
        let changed: BTreeSet<IntegrationId> = self.change(|known| {
            let all = known.iter().chain(&stored);
            let changed = all.filter(|(name, _)| etag(known.get(*name)) != etag(stored.get(*name)));
            let changed = changed.map(|(_, one)| one.id().clone()).collect();
            *known = stored;
            changed
        });
        if !changed.is_empty() {
            tracing::info!(?changed, "integrations were changed by another relay");
        }
        changed.iter().for_each(|id| self.wake_lanes_of(id));
        Ok(())
    }

    fn wake_lanes_of(&self, id: &IntegrationId) {
        let lanes = Region::ALL.into_iter().flat_map(|region| {
            (0..SHARDS).map(move |shard| LaneKey {
                integration_id: id.clone(),
                region,
                shard,
            })
        });
        self.outbox.signals().wake_lanes(lanes);
    }

    fn change<T>(&self, change: impl FnOnce(&mut Known) -> T) -> T {
        change(&mut self.known.write().unwrap_or_else(PoisonError::into_inner))
    }
}

fn not_found(id: &str) -> RegistryError {
    RegistryError::NotFound(first_chars(id, 64).to_owned())
}

fn etag(found: Option<&Arc<Integration>>) -> Option<&str> {
    found.map(|one| one.revision.etag.as_str())
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
            incarnation: stored.incarnation.max(1),
            resume_time: stored.resume_time.as_ref().and_then(UnixMillis::from_proto),
            removal_time: stored
                .removal_time
                .as_ref()
                .and_then(UnixMillis::from_proto),
        },
    )
}

/// [`restore`] while calls are served: none of them is to blame for what is stored.
fn restore_again(stored: &proto::Integration) -> Result<Integration, RegistryError> {
    restore(stored).map_err(|error| {
        let broken = format!("integration {}: {error}", stored.integration_id);
        OutboxError::Unavailable(broken).into()
    })
}

fn new_etag() -> String {
    format!("{:016x}", fastrand::u64(..))
}

fn first_revision(now: UnixMillis, read_only: bool, incarnation: u32) -> Revision {
    Revision {
        etag: new_etag(),
        mapping_version: 1,
        create_time: now,
        update_time: now,
        read_only,
        incarnation,
        resume_time: None,
        removal_time: None,
    }
}

fn next_revision(before: &Integration, next: &Integration, now: UnixMillis) -> Revision {
    let changed = u64::from(!before.forms_same_events(next));
    Revision {
        etag: new_etag(),
        mapping_version: before.revision.mapping_version + changed,
        update_time: now,
        resume_time: match before.paused && !next.paused {
            true => Some(now),
            false => before.revision.resume_time,
        },
        ..before.revision.clone()
    }
}
