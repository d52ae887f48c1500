//! The shared outbox: PostgreSQL, for several relays behind a load balancer.
//!
//! # Tables
//! `schema/` has them. A capture is a row of `captures` for as long as its id is remembered;
//! its payloads are a row of `queue` until they are settled, or of `dead_letters`. Integrations
//! are spread over the databases; each database is complete for its own.
//!
//! # Invariants
//! - **Accepted** means committed, with the configured `synchronous_commit`. A commit whose
//!   wait for a standby was cancelled is answered as of unknown outcome.
//! - **Once**: `captures (integration, id)` is unique.
//! - **Fenced**: a lane has one holder. Each lease and settlement names the holder and the
//!   fencing number; a holder that lost the lane changes nothing. Leases expire by the database's
//!   clock and are longer than a request to Segment may take.
//! - **One order of locks**: rows of `lanes` by number, then of `queue`, `captures` and
//!   `dead_letters`, then of `backlog` by integration. A statement that follows the lock of a
//!   lane sees all that its former holders committed.
//! - **Current**: a capture is stored only if its events were formed with the integration as
//!   it is stored; otherwise the relay maps it again.
//! - **Counted**: `backlog` changes in the transaction that changes `queue`.

mod accept;
mod calls;
mod connect;
mod counts;
mod database;
mod dead_letters;
mod erase;
mod error;
mod import;
mod lanes;
mod maintain;
mod news;
mod options;
mod relays;
mod relocate;
mod row;
mod schema;
mod settle;
mod state;
#[cfg(test)]
mod tests;
mod tls;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, RwLock,
        atomic::{AtomicI64, Ordering},
    },
};

use tokio::sync::{oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use twox_hash::XxHash3_64;

use self::{
    accept::Submission,
    database::{Context, Database},
    error::Effect,
};
use super::{Erasure, NewCapture, OutboxError, Receipt, Signals, StoredIntegration, Submitted};
use crate::{integration::IntegrationId, proto::ErasureReceipt, vault::Vault};

pub use error::PostgresError;
pub use import::move_to_postgres;
pub use options::{PostgresConnection, PostgresOptions, SynchronousCommit};
pub use relocate::move_integration;
pub use schema::{InitReport, SchemaChange, init};

/// The effect of statements that read, or do not commit yet.
const READ: Effect = Effect::None;

/// The shared outbox. See the module's description.
pub struct PostgresOutbox {
    context: Arc<Context>,
    databases: Arc<Vec<Arc<Database>>>,
    /// Version of the configuration file that this relay may apply.
    claimed: AtomicI64,
}

impl PostgresOutbox {
    /// Connects to the databases and registers this relay.
    ///
    /// # Errors
    /// [`PostgresError`]: a database does not fit, or none can be reached. One of several
    /// that is away is connected later.
    pub async fn open(
        connection: &PostgresConnection,
        options: PostgresOptions,
        vault: &Arc<Vault>,
    ) -> Result<Self, PostgresError> {
        let context = Arc::new(Context {
            connection: connection.clone(),
            options,
            vault: Arc::clone(vault),
            signals: Signals::default(),
            changes: watch::Sender::new(0),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            homes: RwLock::default(),
        });
        let (mut databases, mut arriving) = (Vec::new(), Vec::new());
        for place in 0..connection.urls.len() {
            let (senders, receivers): (Vec<_>, Vec<_>) =
                (0..accept::COMMITTERS).map(|_| accept::channel()).unzip();
            databases.push(Arc::new(Database::new(
                place,
                Arc::clone(&context),
                senders,
            )?));
            arriving.push(receivers);
        }
        let mut last = None;
        for database in &databases {
            match database.register().await {
                Ok(()) => {}
                Err(error @ PostgresError::Database { .. }) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        if let Some(error) = last {
            if !databases.iter().any(|database| database.is_available()) {
                return Err(error);
            }
            tracing::error!(%error, "a database is away; its integrations wait for it");
        }
        refuse_misfits(&databases)?;
        let outbox = Self {
            context,
            databases: Arc::new(databases),
            claimed: AtomicI64::new(i64::MAX),
        };
        outbox.start(arriving);
        Ok(outbox)
    }

    /// Whether a database has a schema already, which needs the keys of the vault.
    ///
    /// # Errors
    /// No database can be reached.
    pub async fn store_exists(connection: &PostgresConnection) -> Result<bool, PostgresError> {
        let mut last = None;
        for place in 0..connection.urls.len() {
            let connector = connect::Connector::new(connection, place)?;
            let version = async { schema::version(&connector.get().await?).await };
            match version.await {
                Ok(version) if version > 0 => return Ok(true),
                Ok(_) => {}
                Err(source) => {
                    last = Some(PostgresError::Database {
                        database: place,
                        source,
                    });
                }
            }
        }
        last.map_or(Ok(false), Err)
    }

    fn start(&self, arriving: Vec<Vec<tokio::sync::mpsc::Receiver<Submission>>>) {
        let tasks = &self.context.tasks;
        for (database, receivers) in self.databases.iter().zip(arriving) {
            for receiver in receivers {
                tasks.spawn(accept::run(Arc::clone(database), receiver));
            }
            let (all, context) = (Arc::clone(&self.databases), Arc::clone(&self.context));
            let available = move || {
                let writable = all.iter().any(|database| database.is_available());
                context.signals.set_writable(writable);
            };
            tasks.spawn(Arc::clone(database).keep_alive(available));
            tasks.spawn(Arc::clone(database).send_news());
            tasks.spawn(Arc::clone(database).hear_news());
            tasks.spawn(Arc::clone(database).follow_expected());
            tasks.spawn(Arc::clone(database).maintain());
        }
    }

    fn check_open(&self) -> Result<(), OutboxError> {
        if self.context.closing.is_cancelled() {
            return Err(OutboxError::Closed);
        }
        Ok(())
    }

    /// The database of an integration: where it is stored, or where one of its name goes, by
    /// rendezvous hashing over the databases' numbers.
    fn home(&self, id: &IntegrationId) -> Result<&Arc<Database>, OutboxError> {
        self.check_open()?;
        let place = match self.context.home(id) {
            Some(place) => place,
            None => self.rendezvous(id)?,
        };
        self.databases.get(place).ok_or(OutboxError::Closed)
    }

    fn rendezvous(&self, id: &IntegrationId) -> Result<usize, OutboxError> {
        let mut best = None;
        for database in self.databases.iter() {
            let session = database.session()?;
            let mut bytes = session.identity.number.to_le_bytes().to_vec();
            bytes.extend_from_slice(id.as_str().as_bytes());
            let weight = (XxHash3_64::oneshot(&bytes), session.identity.number);
            if best.is_none_or(|(most, _)| weight > most) {
                best = Some((weight, database.place));
            }
        }
        best.map(|(_, place)| place).ok_or(OutboxError::Closed)
    }

    async fn submit(&self, captures: Vec<NewCapture>) -> Result<Receipt, OutboxError> {
        self.check_open()?;
        let mut parts: BTreeMap<(usize, usize), Vec<(usize, NewCapture)>> = BTreeMap::new();
        let count = captures.len();
        for (place, capture) in captures.into_iter().enumerate() {
            let id = &capture.integration_id;
            let target = (self.home(id)?.place, accept::committer_of(id));
            parts.entry(target).or_default().push((place, capture));
        }
        let mut prepared = Vec::with_capacity(parts.len());
        for ((database, committer), own) in parts {
            let database = &self.databases[database];
            if !database.is_available() {
                return Err(database.away());
            }
            let session = database.session()?;
            let (places, own): (Vec<usize>, Vec<NewCapture>) = own.into_iter().unzip();
            let sealed = own.into_iter().map(|one| session.sealing.capture(one));
            let captures = sealed.collect::<Result<Vec<_>, _>>()?;
            prepared.push((&database.committers[committer], places, captures));
        }
        let mut answers = Vec::with_capacity(prepared.len());
        for (committer, places, captures) in prepared {
            let (reply, answer) = oneshot::channel();
            // A committer that has gone drops the reply: that part is answered as closed.
            let _ = committer.send(Submission { captures, reply }).await;
            answers.push((places, answer));
        }
        if answers.len() == 1
            && let Some((_, answer)) = answers.pop()
        {
            return Ok(Receipt(answer));
        }
        let (reply, receipt) = oneshot::channel();
        self.context.tasks.spawn(async move {
            let _ = reply.send(joined(count, answers).await);
        });
        Ok(Receipt(receipt))
    }

    /// What an operation on each database comes to, in the order of the databases.
    async fn each<T, F>(
        &self,
        operation: impl Fn(Arc<Database>) -> F,
    ) -> Result<Vec<T>, OutboxError>
    where
        F: Future<Output = Result<T, OutboxError>>,
    {
        self.check_open()?;
        let operations = self.databases.iter().map(|one| operation(Arc::clone(one)));
        futures_util::future::try_join_all(operations).await
    }

    /// The same, of those databases that are not away.
    fn present(&self) -> impl Iterator<Item = &Arc<Database>> {
        self.databases.iter().filter(|one| one.is_available())
    }

    async fn integration(
        &self,
        id: &IntegrationId,
    ) -> Result<Option<StoredIntegration>, OutboxError> {
        // Where it was last, first: others may be away.
        if let Some(home) = self.context.home(id)
            && let Some(Some(spec)) = self.databases[home].integration(id).await?
        {
            return Ok(Some(spec));
        }
        let found = self
            .each(|database| async move {
                let found = database.integration(id).await?;
                Ok(found.map(|spec| (database.place, spec)))
            })
            .await?;
        let mut kept = None;
        for (place, spec) in found.into_iter().flatten() {
            if spec.is_some() || kept.is_none() {
                self.context.note_home(id, place);
                kept = Some(spec);
            }
        }
        Ok(kept.flatten())
    }

    async fn integrations(&self) -> Result<Vec<StoredIntegration>, OutboxError> {
        self.check_open()?;
        let mut all = Vec::new();
        for database in self.present() {
            for spec in database.integrations().await? {
                if let Some(id) = IntegrationId::new(&spec.integration_id) {
                    self.context.note_home(&id, database.place);
                }
                all.push(spec);
            }
        }
        all.sort_by(|one, other| one.integration_id.cmp(&other.integration_id));
        Ok(all)
    }

    async fn replace_integration(
        &self,
        id: &IntegrationId,
        new: Option<StoredIntegration>,
        replaces: Option<String>,
    ) -> Result<(), OutboxError> {
        if new.is_some() && replaces.is_none() {
            // It may be stored elsewhere than a new one of its name would be.
            self.integration(id).await?;
        }
        let home = self.home(id)?;
        let claimed = self.claimed.load(Ordering::Acquire);
        let of_file = new.as_ref().is_some_and(|spec| spec.read_only);
        let claimed = of_file.then_some(claimed);
        home.replace_integration(id, new.as_ref(), replaces.as_deref(), claimed)
            .await?;
        self.context.note_home(id, home.place);
        Ok(())
    }

    async fn erase(&self, erasure: Erasure) -> Result<ErasureReceipt, OutboxError> {
        self.check_open()?;
        let mut receipt = erasure.receipt.clone();
        let last = self.databases.len() - 1;
        for (place, database) in self.databases.iter().enumerate() {
            // The last word is stored wherever there may be a part of the receipt.
            let is_last = receipt.completed || (place == last && receipt.receipt_id.is_empty());
            database.erase(&erasure, &mut receipt, is_last).await?;
        }
        Ok(receipt)
    }

    async fn receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<ErasureReceipt>, OutboxError> {
        let parts = self
            .each(|database| async move { database.receipts(before, limit).await })
            .await?;
        let mut receipts: BTreeMap<i64, ErasureReceipt> = BTreeMap::new();
        for (id, part) in parts.into_iter().flatten() {
            match receipts.get_mut(&id) {
                Some(receipt) => {
                    erase::add_counts(receipt, &part);
                    receipt.completed &= part.completed;
                }
                None => {
                    receipts.insert(id, part);
                }
            }
        }
        Ok(receipts.into_values().rev().take(limit).collect())
    }

    async fn close(&self) {
        if self.context.closing.is_cancelled() {
            return;
        }
        let sessions: Vec<_> = self
            .present()
            .filter_map(|database| Some((database, database.session().ok()?)))
            .collect();
        self.context.closing.cancel();
        self.context.tasks.close();
        self.context.tasks.wait().await;
        // No heartbeat takes the registration for lost.
        for (database, session) in sessions {
            if let Err(error) = database.leave(&session).await {
                tracing::debug!(%error, "the lanes were not given up; they expire");
            }
        }
        for database in self.databases.iter() {
            database.connector.close();
            database.control.close();
        }
    }
}

/// Databases of one outbox have numbers and stores that differ, and the same index key.
fn refuse_misfits(databases: &[Arc<Database>]) -> Result<(), PostgresError> {
    let mut seen: Vec<(i16, Vec<u8>, [u8; 16])> = Vec::new();
    for database in databases {
        let Ok(session) = database.session() else {
            continue;
        };
        let identity = &session.identity;
        let key = session.sealing.digest(&[0; 16]);
        let misfit = |text: &str| Err(PostgresError::Misfit(database.place, text.to_owned()));
        if seen
            .iter()
            .any(|(number, store, _)| *number == identity.number || *store == identity.store)
        {
            return misfit("it is named twice, or was made by another `outbox init`");
        }
        if seen.iter().any(|(.., other)| *other != key) {
            return misfit("its index key differs: it belongs to another outbox");
        }
        seen.push((identity.number, identity.store.clone(), key));
    }
    Ok(())
}

/// The places of a database's captures in the submission, and what becomes of them.
type Part = (
    Vec<usize>,
    oneshot::Receiver<Result<Vec<Submitted>, OutboxError>>,
);

async fn joined(count: usize, parts: Vec<Part>) -> Result<Vec<Submitted>, OutboxError> {
    let mut all: Vec<Option<Submitted>> = (0..count).map(|_| None).collect();
    let mut failed = None;
    for (places, answer) in parts {
        match answer.await.unwrap_or(Err(OutboxError::Closed)) {
            Ok(answers) => {
                for (place, submitted) in places.into_iter().zip(answers) {
                    all[place] = Some(submitted);
                }
            }
            Err(error) => failed = Some(error),
        }
    }
    // Some of its captures may be stored.
    failed.map_or_else(
        || Ok(all.into_iter().flatten().collect()),
        |error| Err(OutboxError::OutcomeUnknown(error.to_string())),
    )
}
