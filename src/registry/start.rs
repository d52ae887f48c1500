//! The start: what is stored is read, and the configuration file's integrations are put in their
//! place.

use std::{collections::BTreeMap, sync::Arc};

use prost::Message;
use sha2::{Digest, Sha256};

use super::{Registry, RegistryError, first_revision, make, next_revision, restore};
use crate::{
    audit::{Audit, Entry},
    integration::{IntegrationId, changed_fields},
    notice::{Happening, Notice},
    notify::Notices,
    outbox::{Claim, Outbox, OutboxError},
    permission::Scope,
    proto,
    time::UnixMillis,
};

/// Tries to put an integration of the file in its place while other relays do, too.
const CONFIGURE_TRIES: u32 = 10;

/// The integrations of the configuration file.
#[derive(Clone, Copy)]
pub struct Configured<'a> {
    /// In the order of the file, with their write keys.
    pub integrations: &'a [proto::Integration],
    /// `[outbox] integrations_version`.
    pub version: u64,
}

/// Why the integrations cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// One breaks rules, or the outbox failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Another relay has brought other integrations under the same version.
    #[error(
        "those of the configuration file differ from what another relay has stored under the \
         same [outbox] integrations_version = {0}; raise it to replace them on all relays, or \
         start with the same file"
    )]
    Conflict(u64),
}

impl From<OutboxError> for LoadError {
    fn from(error: OutboxError) -> Self {
        Self::Registry(error.into())
    }
}

/// What is to be done with an integration of the file.
#[derive(Clone, Copy)]
enum Step<'a> {
    /// The file has it.
    Store(&'a proto::Integration),
    /// It has gone from the file.
    LetGo(&'a IntegrationId),
}

impl Registry {
    /// Reads what is stored and puts the integrations of the configuration file
    /// in their place, unless another relay has brought a newer file. One that has gone
    /// from the file goes here too, once no events wait for it (`removal`).
    ///
    /// # Errors
    /// The outbox failed, an integration of the file breaks rules, or another relay's file
    /// differs under the same version.
    pub async fn load(
        outbox: Arc<dyn Outbox>,
        configured: Configured<'_>,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<Self, LoadError> {
        for spec in configured.integrations {
            make(spec, first_revision(now, true, 1))?;
        }
        let mut known = BTreeMap::new();
        for stored in outbox.integrations().await? {
            let integration = restore(&stored)?;
            known.insert(integration.id().of_incarnation(1), Arc::new(integration));
        }
        let registry = Self::new(outbox, known);
        if configured.version == 0
            && configured.integrations.is_empty()
            && registry.of_files().is_empty()
        {
            return Ok(registry);
        }
        if registry.claim(configured).await? {
            // Another relay may have finished its changes between the read and the claim.
            registry.refresh().await?;
            registry.put_in_place(configured, told, now).await?;
        }
        Ok(registry)
    }

    /// Whether the file's integrations are the ones to store.
    async fn claim(&self, configured: Configured<'_>) -> Result<bool, LoadError> {
        let version = configured.version;
        let digest = digest(configured.integrations);
        match self.outbox.claim_configuration(version, digest).await? {
            Claim::Apply => Ok(true),
            Claim::Conflict => Err(LoadError::Conflict(version)),
            Claim::Older { stored } => {
                tracing::warn!(
                    version,
                    stored,
                    "the integrations of the configuration file are not applied: another relay \
                     has stored a newer [outbox] integrations_version"
                );
                Ok(false)
            }
        }
    }

    async fn put_in_place(
        &self,
        configured: Configured<'_>,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<(), LoadError> {
        let specs = configured.integrations;
        let stored = self.of_files();
        let gone = stored.iter().filter(|id| {
            let named = |spec: &proto::Integration| spec.integration_id == id.name();
            !specs.iter().any(named)
        });
        let steps = gone.map(Step::LetGo).chain(specs.iter().map(Step::Store));
        for step in steps {
            if !self.apply(step, configured, told, now).await? {
                break;
            }
        }
        Ok(())
    }

    /// The stored integrations that come from a file.
    fn of_files(&self) -> Vec<IntegrationId> {
        let all = self.list(None, &Scope::All, usize::MAX);
        let own = all.iter().filter(|one| one.revision.read_only);
        own.map(|one| one.id().clone()).collect()
    }

    /// Relays that start together put the same integrations in place: the second one looks
    /// again, and mostly finds nothing left to do. Returns false where another relay has
    /// brought a newer file meanwhile.
    async fn apply(
        &self,
        step: Step<'_>,
        configured: Configured<'_>,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<bool, LoadError> {
        for tries_left in (0..CONFIGURE_TRIES).rev() {
            let done = match step {
                Step::Store(spec) => self.configure(spec, told, now).await,
                Step::LetGo(id) => self.let_go(id, told, now).await,
            };
            match done {
                Err(RegistryError::StaleEtag(id)) if tries_left > 0 => {
                    if !self.claim(configured).await? {
                        self.refresh().await?;
                        return Ok(false);
                    }
                    self.confirm(&id).await?;
                }
                done => return Ok(done.map(|()| true)?),
            }
        }
        Ok(true)
    }

    async fn configure(
        &self,
        spec: &proto::Integration,
        told: &Told<'_>,
        now: UnixMillis,
    ) -> Result<(), RegistryError> {
        let before = self.named(&spec.integration_id);
        let mut next = make(spec, first_revision(now, true, 1))?;
        let (happening, changed) = if let Some(before) = &before {
            next = make(spec, before.revision.clone())?;
            next.revision = next_revision(before, &next, now);
            next.revision.read_only = true;
            next.revision.removal_time = None;
            let mut same = next.clone();
            same.revision = before.revision.clone();
            if same.to_spec_with_secrets() == before.to_spec_with_secrets()
                && before.revision.read_only
                && before.revision.removal_time.is_none()
            {
                return Ok(());
            }
            let changed = changed_fields(before, &next).join(" ");
            (Happening::Updated, changed)
        } else {
            let incarnation = self.next_incarnation(next.id()).await?;
            next = make(spec, first_revision(now, true, incarnation))?;
            (Happening::Created, String::new())
        };
        let stored = self.store(next, before.as_deref()).await?;
        told.of(happening, stored.id(), &changed, now).await;
        let before = before.as_deref();
        if let Some(happening) = before.and_then(|it| Happening::of_pause(it, &stored)) {
            told.of(happening, stored.id(), "", now).await;
        }
        Ok(())
    }
}

/// Fingerprint of the integrations of a file, in whatever order it names them and their
/// regions. It covers what the file says and not what follows from it, so that it is the
/// same in another version of the relay.
fn digest(configured: &[proto::Integration]) -> [u8; 16] {
    let mut specs: Vec<_> = configured.to_vec();
    specs.sort_unstable_by(|one, other| one.integration_id.cmp(&other.integration_id));
    let mut hash = Sha256::new();
    for spec in &mut specs {
        spec.credentials.sort_unstable_by_key(|key| key.data_region);
        hash.update(spec.encode_length_delimited_to_vec());
    }
    let mut digest = [0; 16];
    digest.copy_from_slice(&hash.finalize()[..16]);
    digest
}

/// Who is told of the changes that the configuration file brings.
pub struct Told<'a> {
    /// Takes notes.
    pub audit: &'a Audit,
    /// Tells people.
    pub notices: &'a Notices,
}

impl Told<'_> {
    pub(super) async fn of(
        &self,
        happening: Happening,
        id: &IntegrationId,
        changed: &str,
        now: UnixMillis,
    ) {
        const CALLER: &str = "configuration";
        self.audit.note(&Entry {
            caller: CALLER,
            action: happening.as_str(),
            integration: id.name(),
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
