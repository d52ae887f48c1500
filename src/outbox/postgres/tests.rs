//! The conformance suite, and what is special to several relays, against a real PostgreSQL.
//! Without one the tests say so and check nothing: `tests/run` brings it.

#[allow(dead_code, reason = "shared with tests/it")]
#[path = "../../../tests/it/postgres_server.rs"]
mod server;

mod migrations;
mod moving;
mod outage;
mod relays;

use std::{sync::Arc, time::Duration};

use super::{PostgresConnection, PostgresOptions, PostgresOutbox, SynchronousCommit, init};
use crate::{
    metrics::Metrics,
    outbox::{
        BoxFuture, Outbox,
        conformance::{LIMITS, Rig},
    },
    vault::Vault,
};

/// One outbox in databases of its own.
struct PostgresRig {
    databases: Vec<server::Database>,
    vault: Arc<Vault>,
}

impl PostgresRig {
    fn new(databases: usize) -> Option<Self> {
        let databases = (0..databases).map(|_| server::database());
        Some(Self {
            databases: databases.collect::<Option<_>>()?,
            vault: Arc::new(Vault::forgetful().expect("random")),
        })
    }

    fn connection(&self) -> PostgresConnection {
        connection(self.databases.iter().map(server::Database::url))
    }

    /// One relay's outbox.
    async fn relay(&self) -> PostgresOutbox {
        open(&self.connection(), options(), &self.vault).await
    }
}

fn connection(urls: impl Iterator<Item = String>) -> PostgresConnection {
    PostgresConnection {
        urls: urls.map(Into::into).collect(),
        user: None,
        password: None,
        ca_file: None,
        identity: None,
        pool_size: 6,
        connect_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(5),
        synchronous_commit: SynchronousCommit::On,
        require_synchronous_standby: false,
    }
}

fn options() -> PostgresOptions {
    PostgresOptions {
        limits: LIMITS,
        remember: Duration::from_secs(3_600),
        encrypt_payloads: true,
        request_timeout: Duration::from_secs(2),
        group_commit_max: 512,
        metrics: Metrics::off(),
    }
}

async fn open(
    connection: &PostgresConnection,
    options: PostgresOptions,
    vault: &Arc<Vault>,
) -> PostgresOutbox {
    init(connection, vault).await.expect("made");
    let opened = PostgresOutbox::open(connection, options, vault);
    opened.await.expect("opens")
}

impl Rig for PostgresRig {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Outbox>> {
        Box::pin(async { Arc::new(self.relay().await) as Arc<dyn Outbox> })
    }
}

/// The suite's tests, each where there is a server.
macro_rules! with_server {
    ($databases:expr; $($name:ident)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                if let Some(rig) = super::PostgresRig::new($databases) {
                    $crate::outbox::conformance::$name(&rig).await;
                }
            }
        )*
    };
}

mod one_database {
    crate::outbox::conformance::names!(with_server; 1;);
}

mod three_databases {
    crate::outbox::conformance::names!(with_server; 3;);
}
