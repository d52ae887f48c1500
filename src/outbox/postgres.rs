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
mod sql;
mod state;
#[cfg(test)]
mod tests;
mod tls;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicI64},
};

use futures_util::future::{join_all, try_join_all};
use tokio::sync::{mpsc, oneshot};

use self::{
    accept::Submission,
    database::{Context, Database, weight},
    error::in_database,
};
use super::{NewCapture, OutboxError, Receipt, Submitted};
use crate::{integration::IntegrationId, vault::Vault};

pub use error::PostgresError;
pub use import::move_to_postgres;
pub use options::{PostgresConnection, PostgresOptions, SynchronousCommit};
pub use relocate::move_integration;
pub use schema::{InitReport, SchemaChange, init};

/// The shared outbox. See the module's description.
pub struct PostgresOutbox {
    context: Arc<Context>,
    databases: Arc<[Arc<Database>]>,
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
        let context = Context::new(connection.clone(), options, Arc::clone(vault));
        let context = Arc::new(context);
        let (mut databases, mut arriving) = (Vec::new(), Vec::new());
        for place in 0..connection.urls.len() {
            let channels = (0..accept::COMMITTERS).map(|_| accept::channel());
            let (senders, receivers): (Vec<_>, Vec<_>) = channels.unzip();
            let database = Database::new(place, Arc::clone(&context), senders)?;
            databases.push(Arc::new(database));
            arriving.push(receivers);
        }
        let mut away = None;
        for database in &databases {
            match database.register().await {
                Err(error @ PostgresError::Database { .. }) => away = Some(error),
                registered => registered?,
            }
        }
        if let Some(error) = away {
            if !databases.iter().any(|database| database.is_available()) {
                return Err(error);
            }
            tracing::error!(%error, "a database is away; its integrations wait for it");
        }
        refuse_misfits(&databases)?;
        let outbox = Self {
            context,
            databases: databases.into(),
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
        let mut away = Ok(false);
        for place in 0..connection.urls.len() {
            let connector = connect::Connector::new(connection, place)?;
            let version = async { schema::version(&connector.get().await?).await };
            match in_database(place, version.await) {
                Ok(version) if version > 0 => return Ok(true),
                Ok(_) => {}
                Err(error) => away = Err(error),
            }
        }
        away
    }

    fn start(&self, arriving: Vec<Vec<mpsc::Receiver<Submission>>>) {
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
        match self.context.closing.is_cancelled() {
            true => Err(OutboxError::Closed),
            false => Ok(()),
        }
    }

    /// The database of an integration: where it is stored, or where one of its name goes, by
    /// rendezvous hashing over the databases' numbers.
    fn home(&self, id: &IntegrationId) -> Result<&Arc<Database>, OutboxError> {
        self.check_open()?;
        if let Some(place) = self.context.home(id) {
            return self.databases.get(place).ok_or(OutboxError::Closed);
        }
        let mut best = None;
        for database in self.databases.iter() {
            let number = database.session()?.identity.number;
            let rank = (weight(&number.to_le_bytes(), id.as_str()), number);
            if best.is_none_or(|(most, _)| rank > most) {
                best = Some((rank, database));
            }
        }
        best.map(|(_, database)| database)
            .ok_or(OutboxError::Closed)
    }

    /// The results of an operation on each database, in their order.
    async fn each<T, F>(
        &self,
        operation: impl Fn(Arc<Database>) -> F,
    ) -> Result<Vec<T>, OutboxError>
    where
        F: Future<Output = Result<T, OutboxError>>,
    {
        self.check_open()?;
        let operations = self.databases.iter().map(|one| operation(Arc::clone(one)));
        try_join_all(operations).await
    }

    /// The databases that are not away.
    fn present(&self) -> Result<impl Iterator<Item = &Arc<Database>>, OutboxError> {
        self.check_open()?;
        Ok(self.databases.iter().filter(|one| one.is_available()))
    }

    /// Hands captures to the committers of their databases.
    async fn submit_all(&self, captures: Vec<NewCapture>) -> Result<Receipt, OutboxError> {
        self.check_open()?;
        let count = captures.len();
        let mut parts: BTreeMap<(usize, usize), (Vec<usize>, Vec<_>)> = BTreeMap::new();
        for (place, capture) in captures.into_iter().enumerate() {
            let id = &capture.integration_id;
            let home = self.home(id)?;
            if !home.is_available() {
                return Err(home.away());
            }
            let part = parts
                .entry((home.place, accept::committer_of(id)))
                .or_default();
            part.0.push(place);
            part.1.push(home.session()?.sealing.capture(capture)?);
        }
        let mut answers = Vec::with_capacity(parts.len());
        for ((home, committer), (places, captures)) in parts {
            let (reply, answer) = oneshot::channel();
            // A committer that has gone drops the reply: that part is answered as closed.
            let submission = Submission { captures, reply };
            let _ = self.databases[home].committers[committer]
                .send(submission)
                .await;
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

    async fn shut_down(&self) {
        if self.context.closing.is_cancelled() {
            return;
        }
        let calls = self.databases.iter().map(|database| database.call());
        let calls = join_all(calls).await;
        self.context.closing.cancel();
        self.context.tasks.close();
        self.context.tasks.wait().await;
        // No heartbeat takes the registration for lost.
        for call in calls.into_iter().flatten() {
            if let Err(error) = call.leave().await {
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
    let sessions = databases
        .iter()
        .map(|database| (database.place, database.session()));
    let sessions = sessions.filter_map(|(place, session)| Some((place, session.ok()?)));
    let sessions: Vec<_> = sessions.collect();
    for (position, (place, session)) in sessions.iter().enumerate() {
        let misfit = |text: &str| Err(PostgresError::Misfit(*place, text.to_owned()));
        for (_, other) in &sessions[..position] {
            let (one, two) = (&session.identity, &other.identity);
            if one.number == two.number || one.store == two.store {
                return misfit("it is named twice, or was made by another `outbox init`");
            }
            if session.sealing.digest(&[0; 16]) != other.sealing.digest(&[0; 16]) {
                return misfit("its index key differs: it belongs to another outbox");
            }
        }
    }
    Ok(())
}

/// The places of a committer's captures in the submission, and what becomes of them.
type Part = (
    Vec<usize>,
    oneshot::Receiver<Result<Vec<Submitted>, OutboxError>>,
);

async fn joined(count: usize, parts: Vec<Part>) -> Result<Vec<Submitted>, OutboxError> {
    let mut all: Vec<Option<Submitted>> = vec![None; count];
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
    match failed {
        None => Ok(all.into_iter().flatten().collect()),
        // Some of its captures may be stored.
        Some(error) => Err(OutboxError::OutcomeUnknown(error.to_string())),
    }
}
