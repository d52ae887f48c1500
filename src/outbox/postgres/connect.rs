//! Connections to one database: a bounded pool, TLS, session settings, time limits.

use std::{
    future::{Future, poll_fn},
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool_postgres::{Connect, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use futures_util::future::BoxFuture;
use secrecy::{ExposeSecret, SecretString};
use tokio::task::JoinHandle;
use tokio_postgres::{
    AsyncMessage, Client, Config, Connection as Wire, Row, Socket, Statement, config::Host,
    error::Severity, tls::MakeTlsConnect, types::ToSql,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{
    PostgresConnection, PostgresError,
    error::{Effect, damaged, no_connection},
    tls,
};
use crate::outbox::OutboxError;

/// How much longer than a statement the relay waits for its answer.
const ANSWER_MARGIN: Duration = Duration::from_secs(1);
/// Unacknowledged data on a connection for this long ends it.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE: Duration = Duration::from_secs(10);

/// One database's servers, and the pool of connections to its primary.
#[derive(Clone)]
pub(super) struct Connector {
    pool: Pool,
    hosts: Hosts,
    statement_timeout: Duration,
    connect_timeout: Duration,
    /// Commits whose wait for a standby was cancelled on the server: they are not confirmed.
    unconfirmed: Arc<AtomicU64>,
}

/// A connection of the pool. One that was left in the middle of its work is closed.
pub(super) struct Connection {
    object: Option<Object>,
    is_clean: AtomicBool,
    in_transaction: AtomicBool,
    limit: Duration,
    unconfirmed: Arc<AtomicU64>,
}

impl Connector {
    /// The connector of the database at `place` in the URLs. Connects to nothing yet.
    pub(super) fn new(options: &PostgresConnection, place: usize) -> Result<Self, PostgresError> {
        let config = config(options, place)?;
        let hosts = Hosts {
            configs: single_hosts(&config).into(),
            tls: MakeRustlsConnect::new(tls::client_config(options)?),
        };
        let unconfirmed = Arc::new(AtomicU64::new(0));
        let watched = Watched {
            hosts: hosts.clone(),
            unconfirmed: Arc::clone(&unconfirmed),
        };
        let recycling_method = RecyclingMethod::Fast;
        let manager = Manager::from_connect(config, watched, ManagerConfig { recycling_method });
        let pool = Pool::builder(manager)
            .max_size(options.pool_size)
            .wait_timeout(Some(options.connect_timeout))
            .create_timeout(Some(options.connect_timeout))
            .recycle_timeout(Some(options.connect_timeout))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| PostgresError::Misfit(place, error.to_string()))?;
        Ok(Self {
            pool,
            hosts,
            statement_timeout: options.statement_timeout,
            connect_timeout: options.connect_timeout,
            unconfirmed,
        })
    }

    /// A connection of the pool.
    pub(super) async fn get(&self) -> Result<Connection, OutboxError> {
        let object = self.pool.get().await.map_err(|e| no_connection(&e))?;
        Ok(Connection {
            object: Some(object),
            is_clean: AtomicBool::new(true),
            in_transaction: AtomicBool::new(false),
            unconfirmed: Arc::clone(&self.unconfirmed),
            limit: self.statement_timeout + ANSWER_MARGIN,
        })
    }

    /// Closes the idle connections: they may lead to a server that is no primary any more.
    pub(super) fn forget_connections(&self) {
        self.pool.retain(|_, _| false);
    }

    pub(super) fn close(&self) {
        self.pool.close();
    }

    /// A connection outside the pool that hands its notifications to `heard`. The task ends
    /// with the connection.
    pub(super) async fn listen(
        &self,
        heard: impl FnMut(&str) + Send + 'static,
    ) -> Result<(Client, JoinHandle<()>), OutboxError> {
        let connected = tokio::time::timeout(self.connect_timeout, self.hosts.connect()).await;
        let (client, wire) = connected
            .map_err(|_| Effect::None.timed_out())?
            .map_err(|error| Effect::None.failed(&error))?;
        let unconfirmed = Arc::clone(&self.unconfirmed);
        Ok((client, tokio::spawn(drive(wire, unconfirmed, heard))))
    }
}

impl Connection {
    /// Runs statements within the time limit.
    pub(super) async fn run<T>(
        &self,
        effect: Effect,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, OutboxError> {
        self.run_for(self.limit, effect, work).await
    }

    /// The rows of a statement.
    pub(super) async fn rows(
        &self,
        effect: Effect,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, OutboxError> {
        let work = async {
            let statement = self.prepare_cached(sql).await?;
            self.query(&statement, parameters).await
        };
        self.run(effect, work).await
    }

    /// The only row of a statement.
    pub(super) async fn row(
        &self,
        effect: Effect,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, OutboxError> {
        let rows = self.rows(effect, sql, parameters).await?;
        rows.into_iter().next().ok_or_else(|| damaged("answer"))
    }

    /// The first row of a statement, if there is one.
    pub(super) async fn optional(
        &self,
        effect: Effect,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, OutboxError> {
        let rows = self.rows(effect, sql, parameters).await?;
        Ok(rows.into_iter().next())
    }

    /// How many rows a statement has changed.
    pub(super) async fn count(
        &self,
        effect: Effect,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, OutboxError> {
        let work = async {
            let statement = self.prepare_cached(sql).await?;
            self.execute(&statement, parameters).await
        };
        self.run(effect, work).await
    }

    /// Prepares a statement, or takes it from the cache.
    pub(super) async fn prepared(&self, sql: &str) -> Result<Statement, OutboxError> {
        self.run(Effect::None, self.prepare_cached(sql)).await
    }

    /// Runs statements of which the last one ends a transaction.
    pub(super) async fn commit<T>(
        &self,
        effect: Effect,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, OutboxError> {
        let value = self.run(effect, work).await?;
        self.in_transaction.store(false, Ordering::Relaxed);
        Ok(value)
    }

    /// Begins a transaction. Unless [`Connection::commit`] ends it, the connection is closed.
    pub(super) async fn begin(&self) -> Result<(), OutboxError> {
        self.enter_transaction();
        self.run(Effect::None, self.batch_execute("BEGIN")).await
    }

    /// The caller begins a transaction by a statement of its own.
    pub(super) fn enter_transaction(&self) {
        self.in_transaction.store(true, Ordering::Relaxed);
    }

    /// Runs statements within another time limit.
    pub(super) async fn run_for<T>(
        &self,
        limit: Duration,
        effect: Effect,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, OutboxError> {
        self.is_clean.store(false, Ordering::Relaxed);
        let unconfirmed = self.unconfirmed.load(Ordering::Acquire);
        let done = tokio::time::timeout(limit, work).await;
        let done = done.map_err(|_| effect.timed_out())?;
        let value = done.map_err(|error| effect.failed(&error))?;
        self.is_clean.store(true, Ordering::Relaxed);
        // Of this connection or another one: it may concern this commit.
        if effect == Effect::Commit && unconfirmed != self.unconfirmed.load(Ordering::Acquire) {
            return Err(OutboxError::OutcomeUnknown(
                "the wait for the synchronous standby was cancelled".to_owned(),
            ));
        }
        Ok(value)
    }
}

impl Deref for Connection {
    type Target = Object;

    #[expect(clippy::expect_used, reason = "taken in Drop alone")]
    fn deref(&self) -> &Object {
        self.object.as_ref().expect("present until it is dropped")
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let is_idle = !self.in_transaction.load(Ordering::Relaxed);
        if !(self.is_clean.load(Ordering::Relaxed) && is_idle)
            && let Some(object) = self.object.take()
        {
            drop(Object::take(object));
        }
    }
}

type TlsStream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

/// The hosts of one database.
#[derive(Clone)]
struct Hosts {
    /// One for each host.
    configs: Arc<[Config]>,
    tls: MakeRustlsConnect,
}

impl Hosts {
    /// Connects to the primary: to all hosts at once, so that one that hangs does not use up
    /// the time of the others.
    async fn connect(&self) -> Result<(Client, Wire<Socket, TlsStream>), tokio_postgres::Error> {
        let configs = self.configs.iter();
        let connecting = configs.map(|config| Box::pin(config.connect(self.tls.clone())));
        let (connected, _) = futures_util::future::select_ok(connecting).await?;
        Ok(connected)
    }
}

/// The configuration of each host alone.
fn single_hosts(config: &Config) -> Vec<Config> {
    let (ports, addresses) = (config.get_ports(), config.get_hostaddrs());
    let one = |(place, host): (usize, &Host)| {
        let mut one = Config::new();
        match host {
            Host::Tcp(name) => one.host(name),
            #[cfg(unix)]
            Host::Unix(path) => one.host_path(path),
        };
        if let Some(address) = addresses.get(place) {
            one.hostaddr(*address);
        }
        if let Some(port) = ports.get(place).or(ports.first()) {
            one.port(*port);
        }
        if let Some(user) = config.get_user() {
            one.user(user);
        }
        if let Some(password) = config.get_password() {
            one.password(password);
        }
        if let Some(name) = config.get_dbname() {
            one.dbname(name);
        }
        if let Some(timeout) = config.get_connect_timeout() {
            one.connect_timeout(*timeout);
        }
        if let Some(timeout) = config.get_tcp_user_timeout() {
            one.tcp_user_timeout(*timeout);
        }
        one.options(config.get_options().unwrap_or_default())
            .application_name(config.get_application_name().unwrap_or_default())
            .ssl_mode(config.get_ssl_mode())
            .channel_binding(config.get_channel_binding())
            .keepalives(config.get_keepalives())
            .keepalives_idle(config.get_keepalives_idle())
            .target_session_attrs(config.get_target_session_attrs());
        one
    };
    config.get_hosts().iter().enumerate().map(one).collect()
}

/// Connects for the pool, and watches what the server says besides its answers.
struct Watched {
    hosts: Hosts,
    unconfirmed: Arc<AtomicU64>,
}

impl Connect for Watched {
    fn connect(
        &self,
        _: &Config,
    ) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        Box::pin(async move {
            let (client, wire) = self.hosts.connect().await?;
            let unconfirmed = Arc::clone(&self.unconfirmed);
            Ok((client, tokio::spawn(drive(wire, unconfirmed, |_| {}))))
        })
    }
}

/// Drives a connection to its end.
async fn drive<S, T>(
    mut wire: Wire<S, T>,
    unconfirmed: Arc<AtomicU64>,
    mut heard: impl FnMut(&str) + Send,
) where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send,
{
    while let Some(message) = poll_fn(|context| wire.poll_message(context)).await {
        match message {
            // "canceling wait for synchronous replication": the commit is local alone. The
            // notice comes before the commit's answer.
            Ok(AsyncMessage::Notice(notice))
                if notice.parsed_severity() == Some(Severity::Warning) =>
            {
                unconfirmed.fetch_add(1, Ordering::Release);
                tracing::warn!(message = notice.message(), "PostgreSQL warns");
            }
            Ok(AsyncMessage::Notification(notification)) => heard(notification.payload()),
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "a connection to PostgreSQL has ended");
                return;
            }
        }
    }
}

fn config(options: &PostgresConnection, place: usize) -> Result<Config, PostgresError> {
    let url = options.urls.get(place).map(SecretString::expose_secret);
    let parsed = url.unwrap_or_default().parse::<Config>();
    // The parser's error names the part that is wrong and quotes no value but the host's.
    let mut config = parsed.map_err(|error| PostgresError::Url(place, error.to_string()))?;
    if let Some(user) = &options.user {
        config.user(user);
    }
    if let Some(password) = &options.password {
        config.password(password.expose_secret());
    }
    let timeout = options.statement_timeout.as_millis();
    // Plans are made for tables that have grown, also while statistics say that they are
    // empty: all access is by index.
    let session = format!(
        "-c statement_timeout={timeout} -c lock_timeout={timeout} \
         -c idle_in_transaction_session_timeout={} -c synchronous_commit={} \
         -c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c enable_hashjoin=off \
         -c enable_mergejoin=off -c jit=off -c client_min_messages=warning",
        2 * timeout,
        options.synchronous_commit.as_str(),
    );
    let given = config.get_options().unwrap_or_default().to_owned();
    config
        .options(format!("{given} {session}").trim())
        .connect_timeout(options.connect_timeout)
        .keepalives_idle(KEEPALIVE)
        .tcp_user_timeout(TCP_USER_TIMEOUT);
    if config.get_application_name().is_none() {
        config.application_name("segment-relay");
    }
    if config.get_hosts().len() > 1 {
        config.target_session_attrs(tokio_postgres::config::TargetSessionAttrs::ReadWrite);
    }
    Ok(config)
}
