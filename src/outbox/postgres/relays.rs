//! This relay's registration at a database: heartbeats, who else is alive, and the checks
//! that notice a database that is away, was replaced, or was restored from a backup.

use std::{sync::Arc, time::Duration};

use super::{
    PostgresError,
    accept::key_of_id,
    counts::Load,
    database::{Database, Relays, Session},
    error::Effect,
    row::{RECORD_COLUMNS, RECORDS, record_of},
    schema::{check, open_index_key},
    sql::{Arguments, Connection, Part},
};
use crate::outbox::{OutboxError, sealing::Sealing};

/// How often a relay says that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(1);
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
        const SQL: &str = "
            INSERT INTO relays (relay, expires)
            VALUES ($1, clock_timestamp() + interval '5 seconds')";
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
        // Random: after a restore a sequence would give the number of another relay that
        // still runs.
        let relay = fastrand::i64(1..);
        connection.apply(SQL, &[&relay]).await.map_err(away)?;
        let session = Arc::new(Session::new(identity, relay, sealing));
        self.beat(&connection, &session).await.map_err(away)?;
        tracing::info!(database = self.place, relay, "registered");
        self.set_session(Some(session));
        self.set_available(true);
        context.note_change();
        Ok(())
    }

    /// Keeps the registration until the outbox closes.
    pub(super) async fn keep_alive(self: Arc<Self>, available: impl Fn() + Send) {
        let mut beats = 0_u32;
        let closing = &self.context.closing;
        while let Some(()) = closing
            .run_until_cancelled(tokio::time::sleep(HEARTBEAT))
            .await
        {
            beats = beats.wrapping_add(1);
            if let Err(error) = self.step(beats).await {
                // Connections may lead to a server that is no primary any more.
                self.connector.forget_connections();
                self.control.forget_connections();
                if self.set_available(false) {
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
            let sums = connection.rows(SUMS, &[]).await?;
            let loads = sums.iter().map(|row| (row.get(0), Load::of(row, 1)));
            self.counts().set_all(loads);
        }
        match self.beat(&connection, &session).await? {
            Beat::Replaced => {
                tracing::error!(
                    database = self.place,
                    "the database was replaced, or restored from a backup: all is read anew"
                );
                self.set_session(None);
                self.set_available(false);
            }
            Beat::Alive { changed } => {
                let returned = self.set_available(true);
                if returned {
                    tracing::info!(database = self.place, "the database answers again");
                    self.context.note_change();
                }
                self.release_lanes().await?;
                if changed || returned || beats.is_multiple_of(POLL) {
                    self.poll_lanes().await?;
                }
            }
        }
        Ok(())
    }

    /// Wakes the lanes with waiting events that this relay is to deliver.
    async fn poll_lanes(&self) -> Result<(), OutboxError> {
        let session = self.session()?;
        let lanes = self.waiting_lanes().await?.into_iter();
        let own = lanes.filter(|lane| session.prefers(lane.integration_id.as_str()));
        self.context.signals.wake_lanes(own);
        Ok(())
    }

    async fn beat(&self, connection: &Connection, session: &Session) -> Result<Beat, OutboxError> {
        let state = connection.row(STATE, &[]).await?;
        let same = state.get::<_, i64>(0) == session.identity.system
            && state.get::<_, Option<&[u8]>>(1) == Some(session.identity.store.as_slice());
        if !same {
            return Ok(Beat::Replaced);
        }
        let unfit = |text: &str| Err(OutboxError::Unavailable(text.to_owned()));
        if state.get(2) {
            return unfit("a standby answers");
        }
        if state.get(3) {
            return unfit("no synchronous standby is connected: commits would wait for one");
        }
        let signals = &self.context.signals;
        let listens = signals.is_watched() || signals.is_expected();
        let statements: [(&str, Arguments<'_>); 2] = [
            (BEAT, &[&session.relay, &listens]),
            (LIVE, &[&session.relay]),
        ];
        let beaten = connection.transact_with(Effect::None, Part::Whole, &statements);
        let answers = beaten.await?;
        // Without its row it was taken for dead, or the row is not in the backup.
        let Some(beaten) = answers[0].first() else {
            return Ok(Beat::Replaced);
        };
        let mut live: Vec<i64> = answers[1].iter().map(|row| row.get(0)).collect();
        live.sort_unstable();
        let mut others = answers[1]
            .iter()
            .filter(|row| row.get::<_, i64>(0) != session.relay);
        let now = Relays {
            live,
            others_listen: others.any(|row| row.get(1)),
            lsn: beaten.get(0),
            changes: beaten.get(1),
        };
        let mut known = session.relays();
        // A position in the WAL that has gone back is an older state, too: what was committed
        // with the row before was on the synchronous standby.
        if now.lsn < known.lsn {
            return Ok(Beat::Replaced);
        }
        let changed = now.live != known.live;
        if now.changes != known.changes {
            self.context.note_change();
        }
        *known = now;
        Ok(Beat::Alive { changed })
    }

    /// Looks up the captures for which callers wait here, until the outbox closes: other
    /// relays may deliver them, and NOTIFY may be lost.
    pub(super) async fn follow_expected(self: Arc<Self>) {
        let closing = &self.context.closing;
        while let Some(()) = closing
            .run_until_cancelled(tokio::time::sleep(EXPECTED))
            .await
        {
            if let Err(error) = self.look_for_expected().await {
                tracing::debug!(%error, "awaited captures cannot be looked up");
            }
        }
    }

    async fn look_for_expected(&self) -> Result<(), OutboxError> {
        let signals = &self.context.signals;
        if !signals.is_expected() || self.session()?.relays().live.len() < 2 {
            return Ok(());
        }
        let call = self.call().await?;
        let (mut keys, mut ids) = (Vec::new(), Vec::new());
        for (id, capture_id) in signals.expected() {
            if let Some(key) = call.session.key(&id) {
                keys.push(key);
                ids.push(key_of_id(&capture_id));
            }
        }
        let sql = format!(
            "SELECT {RECORD_COLUMNS}
             FROM unnest($1::int8[], $2::uuid[]) AS o (integration, id), {RECORDS}
             WHERE c.integration = o.integration AND c.id = o.id"
        );
        for row in call.rows(&sql, &[&keys, &ids]).await? {
            let record = record_of(&row, 0)?;
            if record.is_final() {
                signals.settled(&record.integration_id, &record.capture_id);
            }
        }
        Ok(())
    }
}

const STATE: &str = "
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
    RETURNING pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::int8,
        (SELECT count FROM integration_changes)";
const LIVE: &str = "
    SELECT relay, listens FROM relays WHERE expires > clock_timestamp() OR relay = $1";
const SUMS: &str = "
    SELECT integration, sum(events)::int8, sum(bytes)::int8 FROM backlog GROUP BY integration";
