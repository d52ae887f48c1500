//! The outbox that the configuration names, opened, and what it needs meanwhile.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{RunError, parts};
use crate::{
    config::{self, Config, OutboxKind},
    metrics::Metrics,
    outbox::{Outbox, OutboxError, PostgresOptions, PostgresOutbox, SqliteOutbox},
    vault::Vault,
};

/// How often the embedded outbox forgets what is old.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(10);
/// How often it does while there is much to forget or to give back.
const BUSY_MAINTENANCE_INTERVAL: Duration = Duration::from_millis(200);
/// How often an outbox that could not be written is tried again.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// The outbox.
pub(super) struct Store {
    pub(super) outbox: Arc<dyn Outbox>,
    /// The embedded one forgets and cleans up when it is told to.
    embedded: Option<Arc<SqliteOutbox>>,
    directory: Option<PathBuf>,
}

impl Store {
    /// Opens it.
    pub(super) async fn open(config: &Config, metrics: &Metrics) -> Result<Self, RunError> {
        if config.outbox.kind == OutboxKind::Postgres {
            return Self::open_postgres(config, metrics).await;
        }
        let exists = config.outbox.path.join("relay.db").exists();
        let vault = Arc::new(Vault::load(&config.secrets, exists)?);
        let options = parts::outbox_options(&config.outbox, metrics);
        let outbox = Arc::new(SqliteOutbox::open(&options, &vault)?);
        Ok(Self {
            outbox: Arc::clone(&outbox) as Arc<dyn Outbox>,
            embedded: Some(outbox),
            directory: Some(config.outbox.path.clone()),
        })
    }

    async fn open_postgres(config: &Config, metrics: &Metrics) -> Result<Self, RunError> {
        let connection = &config.postgres;
        for host in config::hosts_in_clear(connection) {
            tracing::warn!(
                host,
                "connections to PostgreSQL may be in clear: set sslmode=require in [postgres] urls"
            );
        }
        let exists = PostgresOutbox::store_exists(connection).await?;
        let vault = Arc::new(Vault::load(&config.secrets, exists)?);
        let options = PostgresOptions {
            limits: parts::limits(&config.outbox),
            remember: config.outbox.idempotency,
            encrypt_payloads: config.outbox.encryption,
            request_timeout: config.segment.request_timeout,
            group_commit_max: config.outbox.group_commit_max,
            metrics: metrics.clone(),
        };
        Ok(Self {
            outbox: Arc::new(PostgresOutbox::open(connection, options, &vault).await?),
            embedded: None,
            directory: None,
        })
    }

    /// Where the embedded one is; `None` for the shared one.
    pub(super) fn directory(&self) -> Option<PathBuf> {
        self.directory.clone()
    }

    /// Forgets what is old, and finds out soon whether a failing disk works again. The
    /// shared outbox does both itself.
    pub(super) fn maintain(&self) -> impl Future<Output = ()> + Send + use<> {
        let embedded = self.embedded.clone();
        async move {
            if let Some(outbox) = embedded {
                maintain(outbox).await;
            }
        }
    }
}

async fn maintain(outbox: Arc<SqliteOutbox>) {
    let mut writable = outbox.signals().writable();
    loop {
        match outbox.maintain().await {
            Ok(true) => tokio::time::sleep(BUSY_MAINTENANCE_INTERVAL).await,
            Ok(false) => {
                let fails = writable.wait_for(|writable| !writable);
                let _ = tokio::time::timeout(MAINTENANCE_INTERVAL, fails).await;
            }
            Err(OutboxError::Closed) => return,
            Err(error) => {
                tracing::warn!(%error, "maintenance of the outbox failed");
                tokio::time::sleep(PROBE_INTERVAL).await;
            }
        }
    }
}
