//! One database of the outbox: its connections, and what this relay knows of it while it is
//! registered there.

use std::{
    collections::HashMap,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use twox_hash::XxHash3_64;

use super::{
    PostgresConnection, PostgresError, PostgresOptions, accept::Submission, connect::Connector,
    counts::Counts, news::Outgoing, schema::Identity, sql::Connection,
};
use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError, SHARDS, Signals, sealing::Sealing},
    region::Region,
    vault::Vault,
};

/// Of the pool's connections lists and searches have a quarter, look-ups half.
const SCAN_SHARE: usize = 4;
const LOOK_UP_SHARE: usize = 2;
/// Connections of a relay for heartbeats and maintenance.
const CONTROL_CONNECTIONS: usize = 2;
/// Lanes of one integration: `key * LANES + region * SHARDS + shard`.
pub(super) const LANES: i64 = 2 * SHARDS as i64;

/// What all databases of the outbox share.
pub(super) struct Context {
    pub(super) connection: PostgresConnection,
    pub(super) options: PostgresOptions,
    pub(super) vault: Arc<Vault>,
    pub(super) signals: Signals,
    /// Counts up when an integration may have changed.
    pub(super) changes: watch::Sender<u64>,
    pub(super) closing: CancellationToken,
    pub(super) tasks: TaskTracker,
    /// The databases of integrations that are known, by their places.
    homes: RwLock<HashMap<IntegrationId, usize>>,
}

impl Context {
    pub(super) fn new(
        connection: PostgresConnection,
        options: PostgresOptions,
        vault: Arc<Vault>,
    ) -> Self {
        Self {
            connection,
            options,
            vault,
            signals: Signals::default(),
            changes: watch::Sender::new(0),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            homes: RwLock::default(),
        }
    }

    /// Lets the registry read the integrations again.
    pub(super) fn note_change(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    pub(super) fn home(&self, id: &IntegrationId) -> Option<usize> {
        let homes = self.homes.read().unwrap_or_else(PoisonError::into_inner);
        homes.get(id).copied()
    }

    /// Notes where an integration is stored.
    pub(super) fn note_home(&self, id: &IntegrationId, place: usize) {
        let mut homes = self.homes.write().unwrap_or_else(PoisonError::into_inner);
        homes.insert(id.clone(), place);
    }

    /// Notes where events of an integration wait that is not known to be stored elsewhere.
    pub(super) fn note_waiting(&self, id: &IntegrationId, place: usize) {
        if self.home(id).is_none() {
            self.note_home(id, place);
        }
    }
}

/// One database.
pub(super) struct Database {
    /// Its place in `[postgres] urls`.
    pub(super) place: usize,
    pub(super) context: Arc<Context>,
    pub(super) connector: Connector,
    /// For heartbeats and maintenance, which do not wait for callers.
    pub(super) control: Connector,
    /// Connections that lists and searches may have, and look-ups: the others are left to
    /// captures and deliveries.
    scans: Arc<Semaphore>,
    look_ups: Semaphore,
    /// This relay's registration; `None` while the database is away or was replaced.
    session: RwLock<Option<Arc<Session>>>,
    /// Whether the last heartbeat was answered.
    available: AtomicBool,
    /// Where captures are submitted; one committer each.
    pub(super) committers: Vec<mpsc::Sender<Submission>>,
    pub(super) counts: Mutex<Counts>,
    pub(super) outgoing: Outgoing,
    /// Whether payloads were erased since the last vacuum.
    pub(super) vacuum: AtomicBool,
}

impl Database {
    pub(super) fn new(
        place: usize,
        context: Arc<Context>,
        committers: Vec<mpsc::Sender<Submission>>,
    ) -> Result<Self, PostgresError> {
        let few = PostgresConnection {
            pool_size: CONTROL_CONNECTIONS,
            ..context.connection.clone()
        };
        let pool = context.connection.pool_size;
        Ok(Self {
            scans: Arc::new(Semaphore::new((pool / SCAN_SHARE).max(1))),
            look_ups: Semaphore::new((pool / LOOK_UP_SHARE).max(1)),
            place,
            connector: Connector::new(&context.connection, place)?,
            control: Connector::new(&few, place)?,
            counts: Mutex::new(Counts::new(context.options.limits)),
            context,
            session: RwLock::default(),
            available: AtomicBool::new(false),
            committers,
            outgoing: Outgoing::default(),
            vacuum: AtomicBool::new(false),
        })
    }

    /// This relay's registration.
    ///
    /// # Errors
    /// The outbox is closed, or the database is away.
    pub(super) fn session(&self) -> Result<Arc<Session>, OutboxError> {
        if self.context.closing.is_cancelled() {
            return Err(OutboxError::Closed);
        }
        let session = self.session.read().unwrap_or_else(PoisonError::into_inner);
        session.clone().ok_or_else(|| self.away())
    }

    pub(super) fn set_session(&self, session: Option<Arc<Session>>) {
        *self.session.write().unwrap_or_else(PoisonError::into_inner) = session;
    }

    /// The error of calls while the database is away.
    pub(super) fn away(&self) -> OutboxError {
        OutboxError::Unavailable(format!("database {} is away", self.place))
    }

    pub(super) fn is_available(&self) -> bool {
        self.available.load(Ordering::Acquire)
    }

    /// Notes whether it answers; returns whether that is new.
    pub(super) fn set_available(&self, available: bool) -> bool {
        let metrics = &self.context.options.metrics;
        metrics.database(self.place, available);
        self.available.swap(available, Ordering::AcqRel) != available
    }

    /// A connection for a call, unless the database is known to be away.
    pub(super) async fn call(&self) -> Result<Call<'_>, OutboxError> {
        let session = self.session()?;
        if !self.is_available() {
            return Err(self.away());
        }
        let connection = self.connector.get().await?;
        Ok(Call {
            database: self,
            session,
            connection,
        })
    }

    /// Lists or searches in its turn. Until it has begun, it is given up with its caller; then
    /// it ends by itself, since a statement that is cut off costs its connection.
    pub(super) async fn scan<T, F>(
        self: Arc<Self>,
        work: impl FnOnce(Arc<Self>) -> F,
    ) -> Result<T, OutboxError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, OutboxError>> + Send + 'static,
    {
        let turn = Arc::clone(&self.scans).acquire_owned().await;
        let turn = turn.map_err(|_| OutboxError::Closed)?;
        let tasks = self.context.tasks.clone();
        let work = work(self);
        let task = tasks.spawn(async move {
            let done = work.await;
            drop(turn);
            done
        });
        task.await.unwrap_or_else(|_| {
            let broke = "a statement broke off".to_owned();
            Err(OutboxError::OutcomeUnknown(broke))
        })
    }

    /// The turn of a look-up.
    pub(super) async fn look_up(&self) -> Result<SemaphorePermit<'_>, OutboxError> {
        let turn = self.look_ups.acquire().await;
        turn.map_err(|_| OutboxError::Closed)
    }

    pub(super) fn counts(&self) -> MutexGuard<'_, Counts> {
        lock(&self.counts)
    }
}

/// A call to a database: the registration and a connection.
pub(super) struct Call<'a> {
    pub(super) database: &'a Database,
    pub(super) session: Arc<Session>,
    connection: Connection,
}

impl Deref for Call<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Call<'_> {
    /// The key of an integration that has a row here.
    pub(super) async fn key(&self, id: &IntegrationId) -> Result<Option<i64>, OutboxError> {
        const SQL: &str = "SELECT key FROM integrations WHERE integration_id = $1";
        if let Some(key) = self.session.key(id) {
            return Ok(Some(key));
        }
        let row = self.optional(SQL, &[&id.as_str()]).await?;
        let key = row.map(|row| row.get(0));
        key.inspect(|key| self.session.learn(id, *key));
        Ok(key)
    }

    /// Learns the keys of integrations; those without a row get one, with its lanes.
    pub(super) async fn make_keys(&self, ids: &[&IntegrationId]) -> Result<(), OutboxError> {
        const SQL: &str = "
            WITH new AS (
                INSERT INTO integrations (integration_id) VALUES ($1)
                ON CONFLICT (integration_id) DO NOTHING RETURNING key
            )
            INSERT INTO lanes (lane)
            SELECT key * $2::int8 + n FROM new, generate_series(0, $2::int8 - 1) AS n";
        for id in ids {
            if self.key(id).await?.is_none() {
                self.apply(SQL, &[&id.as_str(), &LANES]).await?;
                self.key(id).await?;
            }
        }
        Ok(())
    }
}

/// This relay's registration at a database. A restored or replaced database ends it.
pub(super) struct Session {
    pub(super) identity: Identity,
    /// This relay's number there: the holder of its lanes.
    pub(super) relay: i64,
    pub(super) sealing: Sealing,
    keys: Mutex<HashMap<IntegrationId, i64>>,
    /// Of integrations, by their keys, as the registry has read them.
    revisions: Mutex<HashMap<i64, i64>>,
    /// Lanes that this relay holds.
    held: Mutex<HashMap<i64, Held>>,
    relays: Mutex<Relays>,
}

/// A lane that this relay holds.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) integration_id: IntegrationId,
    pub(super) fence: i64,
    /// From before the lease was asked for.
    pub(super) since: Instant,
    /// Mean payload of a capture at the last lease, in bytes.
    pub(super) mean_bytes: usize,
}

/// What the last heartbeat found.
#[derive(Debug, Default)]
pub(super) struct Relays {
    /// All relays that are alive.
    pub(super) live: Vec<i64>,
    /// Whether changes are waited for at another one.
    pub(super) others_listen: bool,
    /// Position in the WAL.
    pub(super) lsn: i64,
    /// Changes of integrations so far.
    pub(super) changes: i64,
}

impl Session {
    pub(super) fn new(identity: Identity, relay: i64, sealing: Sealing) -> Self {
        let alone = Relays {
            live: vec![relay],
            ..Relays::default()
        };
        Self {
            identity,
            relay,
            sealing,
            keys: Mutex::default(),
            revisions: Mutex::default(),
            held: Mutex::default(),
            relays: Mutex::new(alone),
        }
    }

    /// Notes the key of an integration.
    pub(super) fn learn(&self, id: &IntegrationId, key: i64) {
        lock(&self.keys).insert(id.clone(), key);
    }

    pub(super) fn key(&self, id: &IntegrationId) -> Option<i64> {
        lock(&self.keys).get(id).copied()
    }

    /// Notes the revision of an integration that the registry has read.
    pub(super) fn note_revision(&self, key: i64, revision: i64) {
        lock(&self.revisions).insert(key, revision);
    }

    /// Notes the revisions of all integrations.
    pub(super) fn note_revisions(&self, revisions: impl Iterator<Item = (i64, i64)>) {
        *lock(&self.revisions) = revisions.collect();
    }

    /// Whether the registry has read this revision of an integration; 0 where there is no
    /// specification.
    pub(super) fn has_read(&self, key: i64, revision: i64) -> bool {
        lock(&self.revisions).get(&key).copied().unwrap_or(0) == revision
    }

    /// The number of a lane, where its integration is known.
    pub(super) fn lane(&self, lane: &LaneKey) -> Option<i64> {
        let key = self.key(&lane.integration_id)?;
        Some(lane_number(key, lane.region, lane.shard))
    }

    /// Whether this relay is the one to deliver an integration, or to do what is named, of all
    /// that are alive. All lanes of an integration have one relay, which keeps its rate and its
    /// condition.
    pub(super) fn prefers(&self, name: &str) -> bool {
        let weight = |relay: &i64| (weight(&relay.to_le_bytes(), name), *relay);
        let own = weight(&self.relay);
        self.relays().live.iter().all(|relay| weight(relay) <= own)
    }

    pub(super) fn relays(&self) -> MutexGuard<'_, Relays> {
        lock(&self.relays)
    }

    pub(super) fn held(&self) -> MutexGuard<'_, HashMap<i64, Held>> {
        lock(&self.held)
    }
}

/// The weight of a number for a name, in rendezvous hashing: the heaviest one has the name. A
/// number that comes or goes moves only its share of the names.
pub(super) fn weight(number: &[u8], name: &str) -> u64 {
    XxHash3_64::oneshot(&[number, name.as_bytes()].concat())
}

/// The number of a lane.
pub(super) fn lane_number(key: i64, region: Region, shard: u16) -> i64 {
    let region = i64::from(region == Region::Eu);
    key * LANES + region * i64::from(SHARDS) + i64::from(shard)
}

/// The lane of a number.
pub(super) fn lane_key(integration_id: IntegrationId, lane: i64) -> LaneKey {
    LaneKey {
        integration_id,
        region: region_of(lane),
        shard: u16::try_from(lane.rem_euclid(LANES)).unwrap_or(0) % SHARDS,
    }
}

/// The region of a lane.
pub(super) fn region_of(lane: i64) -> Region {
    match lane.rem_euclid(LANES) / i64::from(SHARDS) {
        0 => Region::NonEu,
        _ => Region::Eu,
    }
}

/// The integration of a lane.
pub(super) fn key_of(lane: i64) -> i64 {
    lane.div_euclid(LANES)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
