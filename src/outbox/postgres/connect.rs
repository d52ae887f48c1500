//! A bounded pool of connections to the primary of one database.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool_postgres::{Connect, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use futures_util::future::{BoxFuture, select_ok};
use secrecy::{ExposeSecret, SecretString};
use tokio::task::JoinHandle;
use tokio_postgres::{
    AsyncMessage, Client, Config, Connection as Wire, Socket,
    config::{Host, TargetSessionAttrs},
    error::Severity,
    tls::MakeTlsConnect,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{
    PostgresConnection, PostgresError,
    error::{Effect, no_connection},
    sql::Connection,
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
}

impl Connector {
    /// The connector of the database at `place` in the URLs. Connects to nothing yet.
    pub(super) fn new(options: &PostgresConnection, place: usize) -> Result<Self, PostgresError> {
        let configs = configs(options, place)?;
        let first = configs.first().cloned().unwrap_or_default();
        let hosts = Hosts {
            configs: configs.into(),
            tls: MakeRustlsConnect::new(tls::client_config(options)?),
            unconfirmed: Arc::default(),
        };
        let recycling_method = RecyclingMethod::Fast;
        let settings = ManagerConfig { recycling_method };
        let pool = Pool::builder(Manager::from_connect(first, hosts.clone(), settings))
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
        })
    }

    /// A connection of the pool.
    pub(super) async fn get(&self) -> Result<Connection, OutboxError> {
        let object = self.pool.get().await.map_err(|e| no_connection(&e))?;
        let limit = self.statement_timeout + ANSWER_MARGIN;
        let unconfirmed = Arc::clone(&self.hosts.unconfirmed);
        Ok(Connection::new(object, limit, unconfirmed))
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
        let connected = tokio::time::timeout(self.connect_timeout, self.hosts.connect(heard));
        let connected = connected.await.map_err(|_| Effect::None.timed_out())?;
        connected.map_err(|error| Effect::None.failed(&error))
    }
}

/// The hosts of one database.
#[derive(Clone)]
struct Hosts {
    /// One for each host.
    configs: Arc<[Config]>,
    tls: MakeRustlsConnect,
    unconfirmed: Arc<AtomicU64>,
}

impl Hosts {
    /// Connects to the primary: to all hosts at once, so that one that hangs does not use up
    /// the time of the others.
    async fn connect(
        &self,
        heard: impl FnMut(&str) + Send + 'static,
    ) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        let configs = self.configs.iter();
        let connecting = configs.map(|config| Box::pin(config.connect(self.tls.clone())));
        let ((client, wire), _) = select_ok(connecting).await?;
        let unconfirmed = Arc::clone(&self.unconfirmed);
        Ok((client, tokio::spawn(drive(wire, unconfirmed, heard))))
    }
}

impl Connect for Hosts {
    fn connect(
        &self,
        _: &Config,
    ) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        Box::pin(self.connect(|_| {}))
    }
}

type TlsStream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

/// Drives a connection to its end, and watches what the server says besides its answers.
async fn drive(
    mut wire: Wire<Socket, TlsStream>,
    unconfirmed: Arc<AtomicU64>,
    mut heard: impl FnMut(&str) + Send,
) {
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

/// The configuration of each host of a database.
fn configs(options: &PostgresConnection, place: usize) -> Result<Vec<Config>, PostgresError> {
    let url = options.urls.get(place).map(SecretString::expose_secret);
    let parsed = url.unwrap_or_default().parse::<Config>();
    // The parser's error names the part that is wrong and quotes no value but the host's.
    let parsed = parsed.map_err(|error| PostgresError::Url(place, error.to_string()))?;
    let hosts = parsed.get_hosts().iter().enumerate();
    Ok(hosts
        .map(|(number, host)| config(options, &parsed, number, host))
        .collect())
}

fn config(options: &PostgresConnection, parsed: &Config, number: usize, host: &Host) -> Config {
    let mut config = Config::new();
    match host {
        Host::Tcp(name) => config.host(name),
        #[cfg(unix)]
        Host::Unix(path) => config.host_path(path),
    };
    let ports = parsed.get_ports();
    let port = ports.get(number).or(ports.first());
    port.map(|port| config.port(*port));
    let address = parsed.get_hostaddrs().get(number);
    address.map(|address| config.hostaddr(*address));
    let user = options.user.as_deref().or(parsed.get_user());
    user.map(|user| config.user(user));
    let password = options
        .password
        .as_ref()
        .map(|it| it.expose_secret().as_bytes());
    password
        .or(parsed.get_password())
        .map(|it| config.password(it));
    parsed.get_dbname().map(|name| config.dbname(name));
    let timeout = options.statement_timeout.as_millis();
    // Plans are made for tables that have grown, also while statistics say that they are
    // empty: all access is by index.
    let session = format!(
        "{} -c statement_timeout={timeout} -c lock_timeout={timeout} \
         -c idle_in_transaction_session_timeout={} -c synchronous_commit={} \
         -c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c enable_hashjoin=off \
         -c enable_mergejoin=off -c jit=off -c client_min_messages=warning",
        parsed.get_options().unwrap_or_default(),
        2 * timeout,
        options.synchronous_commit.as_str(),
    );
    let many = parsed.get_hosts().len() > 1;
    config
        .options(session.trim())
        .application_name(parsed.get_application_name().unwrap_or("segment-relay"))
        .ssl_mode(parsed.get_ssl_mode())
        .channel_binding(parsed.get_channel_binding())
        .keepalives(parsed.get_keepalives())
        .keepalives_idle(KEEPALIVE)
        .connect_timeout(options.connect_timeout)
        .tcp_user_timeout(TCP_USER_TIMEOUT)
        .target_session_attrs(match many {
            true => TargetSessionAttrs::ReadWrite,
            false => parsed.get_target_session_attrs(),
        });
    config
}
