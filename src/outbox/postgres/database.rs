//! One database of the outbox: its connections, and what this relay knows of it while it is
//! registered there.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    PostgresConnection, PostgresError, PostgresOptions,
    accept::Submission,
    connect::{Connection, Connector},
    counts::Counts,
    error::damaged,
    news::Outgoing,
    schema::Identity,
};
use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError, SHARDS, Signals, sealing::Sealing},
    region::Region,
    vault::Vault,
};

/// Connections of a relay for heartbeats and maintenance.
const CONTROL_CONNECTIONS: usize = 2;
/// Lanes of one integration: `key * LANES + region * SHARDS + shard`.
const LANES: i64 = 2 * SHARDS as i64;

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
    pub(super) homes: RwLock<HashMap<IntegrationId, usize>>,
}

impl Context {
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

/// This relay's registration at a database. A restored or replaced database ends it.
pub(super) struct Session {
    pub(super) identity: Identity,
    /// This relay's number there: the holder of its lanes.
    pub(super) relay: i64,
    pub(super) sealing: Sealing,
    integrations: Mutex<Integrations>,
    /// Lanes that this relay holds.
    pub(super) held: Mutex<HashMap<i64, Held>>,
    /// All live relays, and those of the others where changes are waited for.
    pub(super) relays: Mutex<Relays>,
}

/// A lane that this relay holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) fence: i64,
    /// From before the lease was asked for.
    pub(super) since: Instant,
    /// Mean payload of a capture at the last lease, in bytes.
    pub(super) mean_bytes: usize,
}

#[derive(Debug, Default)]
pub(super) struct Relays {
    pub(super) live: Vec<i64>,
    pub(super) others_listen: bool,
    /// Position in the WAL at the last heartbeat.
    pub(super) lsn: i64,
    /// Changes of integrations, as the last heartbeat counted them.
    pub(super) changes: i64,
}

/// Keys of integrations, both ways.
#[derive(Default)]
struct Integrations {
    keys: HashMap<IntegrationId, i64>,
    ids: HashMap<i64, IntegrationId>,
    /// As the registry has read them; 0 where there is no specification.
    revisions: HashMap<i64, i64>,
}

impl Database {
    pub(super) fn new(
        place: usize,
        context: Arc<Context>,
        committers: Vec<mpsc::Sender<Submission>>,
    ) -> Result<Self, PostgresError> {
        let connector = Connector::new(&context.connection, place)?;
        let few = PostgresConnection {
            pool_size: CONTROL_CONNECTIONS,
            ..context.connection.clone()
        };
        let control = Connector::new(&few, place)?;
        Ok(Self {
            place,
            counts: Mutex::new(Counts::new(context.options.limits)),
            context,
            connector,
            control,
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
        self.available.swap(available, Ordering::AcqRel) != available
    }

    /// A connection, unless the database is known to be away.
    pub(super) async fn connection(&self) -> Result<Connection, OutboxError> {
        if !self.is_available() {
            return Err(self.away());
        }
        self.connector.get().await
    }

    pub(super) fn counts(&self) -> MutexGuard<'_, Counts> {
        lock(&self.counts)
    }

    /// Learns the keys of integrations that have a row.
    pub(super) async fn find_keys(
        &self,
        session: &Session,
        connection: &Connection,
        ids: &[&IntegrationId],
    ) -> Result<(), OutboxError> {
        let unknown = session.without_key(ids);
        if unknown.is_empty() {
            return Ok(());
        }
        const SQL: &str = "
            SELECT key, integration_id FROM integrations WHERE integration_id = ANY ($1)";
        for row in connection.rows(super::READ, SQL, &[&unknown]).await? {
            session.learn(row.get(0), row.get(1))?;
        }
        Ok(())
    }

    /// Learns the keys of integrations; those without a row get one, with its lanes.
    pub(super) async fn keys(
        &self,
        session: &Session,
        connection: &Connection,
        ids: &[&IntegrationId],
    ) -> Result<(), OutboxError> {
        self.find_keys(session, connection, ids).await?;
        let unknown = session.without_key(ids);
        if unknown.is_empty() {
            return Ok(());
        }
        const SQL: &str = "
            WITH new AS (
                INSERT INTO integrations (integration_id) SELECT unnest($1::text[])
                ON CONFLICT (integration_id) DO NOTHING RETURNING key
            )
            INSERT INTO lanes (lane) SELECT key * $2::int8 + n FROM new, generate_series(0, $2::int8 - 1) AS n";
        connection
            .count(super::READ, SQL, &[&unknown, &LANES])
            .await?;
        self.find_keys(session, connection, ids).await
    }

    /// The ids of integrations whose keys are not known yet.
    pub(super) async fn learn_ids(
        &self,
        session: &Session,
        connection: &Connection,
        keys: impl Iterator<Item = i64>,
    ) -> Result<(), OutboxError> {
        let unknown: Vec<i64> = {
            let known = lock(&session.integrations);
            keys.filter(|key| !known.ids.contains_key(key)).collect()
        };
        if unknown.is_empty() {
            return Ok(());
        }
        const SQL: &str = "SELECT key, integration_id FROM integrations WHERE key = ANY ($1)";
        for row in connection.rows(super::READ, SQL, &[&unknown]).await? {
            session.learn(row.get(0), row.get(1))?;
        }
        Ok(())
    }
}

impl Session {
    pub(super) fn new(identity: Identity, relay: i64, sealing: Sealing) -> Self {
        Self {
            identity,
            relay,
            sealing,
            integrations: Mutex::default(),
            held: Mutex::default(),
            relays: Mutex::new(Relays {
                live: vec![relay],
                ..Relays::default()
            }),
        }
    }

    /// Notes the key of an integration.
    pub(super) fn learn(&self, key: i64, id: &str) -> Result<IntegrationId, OutboxError> {
        let id = IntegrationId::new(id).ok_or_else(|| damaged("integration"))?;
        let mut known = lock(&self.integrations);
        known.keys.insert(id.clone(), key);
        known.ids.insert(key, id.clone());
        Ok(id)
    }

    fn without_key<'a>(&self, ids: &[&'a IntegrationId]) -> Vec<&'a str> {
        let known = lock(&self.integrations);
        let unknown = ids.iter().filter(|id| !known.keys.contains_key(**id));
        unknown.map(|id| id.as_str()).collect()
    }

    pub(super) fn key(&self, id: &IntegrationId) -> Option<i64> {
        lock(&self.integrations).keys.get(id).copied()
    }

    /// Notes the revision of an integration that the registry has read.
    pub(super) fn note_revision(&self, key: i64, revision: i64) {
        lock(&self.integrations).revisions.insert(key, revision);
    }

    /// Notes the revisions of all integrations.
    pub(super) fn note_revisions(&self, revisions: impl Iterator<Item = (i64, i64)>) {
        lock(&self.integrations).revisions = revisions.collect();
    }

    /// Whether the registry has read this revision of the integration.
    pub(super) fn has_read(&self, key: i64, revision: i64) -> bool {
        let known = lock(&self.integrations);
        known.revisions.get(&key).copied().unwrap_or(0) == revision
    }

    pub(super) fn id(&self, key: i64) -> Option<IntegrationId> {
        lock(&self.integrations).ids.get(&key).cloned()
    }

    /// The number of a lane, where its integration is known.
    pub(super) fn lane(&self, lane: &LaneKey) -> Option<i64> {
        let key = self.key(&lane.integration_id)?;
        Some(lane_number(key, lane.region, lane.shard))
    }

    /// The lane of a number, where its integration is known.
    pub(super) fn lane_key(&self, lane: i64) -> Option<LaneKey> {
        Some(LaneKey {
            integration_id: self.id(lane.div_euclid(LANES))?,
            region: region_of(lane),
            shard: u16::try_from(lane.rem_euclid(LANES)).unwrap_or(0) % SHARDS,
        })
    }

    /// Whether this relay is the one to deliver or to do what is named, of all that live:
    /// rendezvous hashing, so that a relay that comes or goes moves only its share. All lanes
    /// of an integration have one relay, which keeps its rate and its condition.
    pub(super) fn prefers(&self, name: &str) -> bool {
        let weight = |relay: i64| {
            let mut bytes = relay.to_le_bytes().to_vec();
            bytes.extend_from_slice(name.as_bytes());
            (twox_hash::XxHash3_64::oneshot(&bytes), relay)
        };
        let own = weight(self.relay);
        let relays = lock(&self.relays);
        relays.live.iter().all(|relay| weight(*relay) <= own)
    }

    pub(super) fn relays(&self) -> MutexGuard<'_, Relays> {
        lock(&self.relays)
    }

    pub(super) fn held(&self) -> MutexGuard<'_, HashMap<i64, Held>> {
        lock(&self.held)
    }
}

/// The number of a lane.
pub(super) fn lane_number(key: i64, region: Region, shard: u16) -> i64 {
    let region = i64::from(region == Region::Eu);
    key * LANES + region * i64::from(SHARDS) + i64::from(shard)
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
