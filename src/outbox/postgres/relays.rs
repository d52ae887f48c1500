//! This relay's registration at a database: heartbeats, who else is alive, and the checks
//! that notice a database that is away, was replaced, or was restored from a backup.

use std::{sync::Arc, time::Duration};

use futures_util::future::join4;

use super::{
    READ,
    connect::Connection,
    counts::Load,
    database::{Database, Relays, Session},
    error::Effect,
    row::{RECORD_COLUMNS, record_of},
    schema::{check, open_index_key},
    {PostgresError, accept::id_of},
};
use crate::outbox::{OutboxError, sealing::Sealing};

/// How often a relay says that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long it counts as alive after that.
const ALIVE: &str = "5 seconds";
/// How often lanes with waiting events are looked for, in heartbeats.
const POLL: u32 = 2;
/// How often what waits of all integrations is summed up, in heartbeats.
const SUMS_EVERY: u32 = 5;
/// How often captures are looked up for which callers wait here.
const EXPECTED: Duration = Duration::from_millis(500);

/// What a heartbeat found.
enum Beat {
    /// All is as it was; whether relays came or went.
    Alive { changed: bool },
    /// It is another database, or an older state of it.
    Replaced,
}

impl Database {
    /// Registers this relay.
    pub(super) async fn register(&self) -> Result<(), PostgresError> {
        let context = &self.context;
        let away = |source| PostgresError::Database {
            database: self.place,
            source,
        };
        let connection = self.control.get().await.map_err(away)?;
        let identity = check(&connection, self.place, &context.connection).await?;
        let key = open_index_key(self.place, &context.vault, &identity)?;
        let vault = Arc::clone(&context.vault);
        let sealing = Sealing::new(vault, &key, context.options.encrypt_payloads);
        let sql = format!(
            "INSERT INTO relays (relay, expires)
             VALUES ($1, clock_timestamp() + interval '{ALIVE}')"
        );
        // Random: after a restore a sequence would give the number of another relay that
        // still runs.
        let relay = fastrand::i64(1..);
        let registered = connection.count(Effect::None, &sql, &[&relay]).await;
        registered.map_err(away)?;
        let session = Arc::new(Session::new(identity, relay, sealing));
        self.beat(&connection, &session).await.map_err(away)?;
        tracing::info!(database = self.place, relay = session.relay, "registered");
        self.set_session(Some(session));
        self.note_available(true);
        context.changes.send_modify(|count| *count += 1);
        Ok(())
    }

    /// Keeps the registration until the outbox closes.
    pub(super) async fn keep_alive(self: Arc<Self>, available: impl Fn() + Send) {
        let mut beats = 0_u32;
        loop {
            tokio::select! {
                () = self.context.closing.cancelled() => return,
                () = tokio::time::sleep(HEARTBEAT) => {}
            }
            beats = beats.wrapping_add(1);
            if let Err(error) = self.step(beats).await {
                // Connections may lead to a server that is no primary any more.
                self.connector.forget_connections();
                self.control.forget_connections();
                if self.note_available(false) {
                    tracing::error!(database = self.place, %error, "the database is away");
                }
            }
            available();
        }
    }

    async fn step(&self, beats: u32) -> Result<(), OutboxError> {
        let Ok(session) = self.session() else {
            let registered = self.register().await;
            registered.map_err(|error| OutboxError::Unavailable(error.to_string()))?;
            return self.poll_lanes().await;
        };
        let connection = self.control.get().await?;
        if beats.is_multiple_of(SUMS_EVERY) {
            let sums = connection.rows(READ, SUMS, &[]).await?;
            self.note_loads(&sums);
        }
        match self.beat(&connection, &session).await? {
            Beat::Replaced => {
                tracing::error!(
                    database = self.place,
                    "the database was replaced, or restored from a backup: all is read anew"
                );
                self.set_session(None);
                self.note_available(false);
            }
            Beat::Alive { changed } => {
                let returned = self.note_available(true);
                if returned {
                    tracing::info!(database = self.place, "the database answers again");
                    self.context.changes.send_modify(|count| *count += 1);
                }
                self.release_lanes(&session).await?;
                if changed || returned || beats.is_multiple_of(POLL) {
                    self.poll_lanes().await?;
                }
            }
        }
        Ok(())
    }

    fn note_available(&self, available: bool) -> bool {
        self.set_available(available)
    }

    /// Wakes the lanes with waiting events that this relay is to deliver.
    pub(super) async fn poll_lanes(&self) -> Result<(), OutboxError> {
        let session = self.session()?;
        let lanes = self.waiting_lanes().await?.into_iter();
        let own = lanes.filter(|lane| session.prefers(lane.integration_id.as_str()));
        self.context.signals.wake_lanes(own);
        Ok(())
    }

    async fn beat(&self, connection: &Connection, session: &Session) -> Result<Beat, OutboxError> {
        let row = connection
            .run(READ, connection.query_one(IDENTITY, &[]))
            .await?;
        let same = row.get::<_, i64>(0) == session.identity.system
            && row.get::<_, Option<&[u8]>>(1) == Some(session.identity.store.as_slice());
        if !same {
            return Ok(Beat::Replaced);
        }
        if row.get(2) {
            return Err(OutboxError::Unavailable("a standby answers".to_owned()));
        }
        if row.get(3) {
            return Err(OutboxError::Unavailable(
                "no synchronous standby is connected: commits would wait for one".to_owned(),
            ));
        }
        let signals = &self.context.signals;
        let listens = signals.is_watched() || signals.is_expected();
        let work = async {
            let (begun, beaten, committed, relays) = join4(
                connection.batch_execute("BEGIN"),
                connection.query_opt(BEAT, &[&session.relay, &listens]),
                connection.batch_execute("COMMIT"),
                connection.query(LIVE, &[&session.relay]),
            )
            .await;
            begun?;
            let beaten = beaten?.map(|row| row.get(0));
            committed?;
            Ok((beaten, relays?))
        };
        let (lsn, live) = connection.run(Effect::None, work).await?;
        let changes = connection.row(READ, CHANGES, &[]).await?.get(0);
        if std::mem::replace(&mut session.relays().changes, changes) != changes {
            self.context.changes.send_modify(|count| *count += 1);
        }
        Ok(session.note_beat(lsn, &live))
    }

    fn note_loads(&self, rows: &[tokio_postgres::Row]) {
        let loads = rows.iter().map(|row| {
            let load = Load {
                events: row.get(1),
                bytes: row.get(2),
            };
            (row.get(0), load)
        });
        self.counts().set_all(loads);
    }

    /// Looks up the captures for which callers wait here, until the outbox closes: other
    /// relays may deliver them, and NOTIFY may be lost.
    pub(super) async fn follow_expected(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.context.closing.cancelled() => return,
                () = tokio::time::sleep(EXPECTED) => {}
            }
            if let Err(error) = self.look_for_expected().await {
                tracing::debug!(%error, "awaited captures cannot be looked up");
            }
        }
    }

    async fn look_for_expected(&self) -> Result<(), OutboxError> {
        let signals = &self.context.signals;
        if !signals.is_expected() {
            return Ok(());
        }
        let session = self.session()?;
        if session.relays().live.len() < 2 {
            return Ok(());
        }
        let expected = signals.expected();
        let with_key = expected.iter().filter_map(|(id, capture_id)| {
            let key = session.key(id)?;
            Some((key, id_of(capture_id)))
        });
        let (keys, ids): (Vec<i64>, Vec<uuid::Uuid>) = with_key.unzip();
        let sql = format!(
            "SELECT c.integration, {RECORD_COLUMNS}
             FROM unnest($1::int8[], $2::uuid[]) AS i (integration, id)
             JOIN captures c ON c.integration = i.integration AND c.id = i.id"
        );
        let connection = self.connection().await?;
        for row in connection.rows(READ, &sql, &[&keys, &ids]).await? {
            let Some(id) = session.id(row.get(0)) else {
                continue;
            };
            let record = record_of(id, &row, 1)?;
            if record.is_final() {
                signals.settled(&record.integration_id, &record.capture_id);
            }
        }
        Ok(())
    }
}

impl Session {
    fn note_beat(&self, lsn: Option<i64>, rows: &[tokio_postgres::Row]) -> Beat {
        // Without its row it was taken for dead, or the row is not in the backup. A position
        // in the WAL that has gone back is an older state, too: what was committed with the
        // row before was on the synchronous standby.
        let Some(lsn) = lsn else {
            return Beat::Replaced;
        };
        let mut relays = self.relays();
        if lsn < relays.lsn {
            return Beat::Replaced;
        }
        let mut live: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        live.sort_unstable();
        let changed = live != relays.live;
        let others_listen = rows
            .iter()
            .any(|row| row.get::<_, i64>(0) != self.relay && row.get(1));
        *relays = Relays {
            live,
            others_listen,
            lsn,
            changes: relays.changes,
        };
        Beat::Alive { changed }
    }
}

const IDENTITY: &str = "
    SELECT (SELECT system_identifier FROM pg_control_system()),
        (SELECT value FROM settings WHERE name = 'store'),
        pg_is_in_recovery(),
        current_setting('synchronous_standby_names') <> ''
            AND current_setting('synchronous_commit') NOT IN ('local', 'off')
            AND NOT EXISTS (SELECT 1 FROM pg_stat_replication
                WHERE coalesce(sync_state, 'unknown') IN ('sync', 'quorum', 'unknown'))";
const BEAT: &str = "
    UPDATE relays SET expires = clock_timestamp() + interval '5 seconds', listens = $2
    WHERE relay = $1
    RETURNING pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::int8";
const LIVE: &str = "
    SELECT relay, listens FROM relays WHERE expires > clock_timestamp() OR relay = $1";
const CHANGES: &str = "SELECT count FROM integration_changes";
const SUMS: &str = "
    SELECT integration, sum(events)::int8, sum(bytes)::int8 FROM backlog GROUP BY integration";
