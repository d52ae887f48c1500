//! The conformance suite against a real nats-server, in a directory of its own. Without
//! one the tests say so and check nothing: `tests/run` brings it, and makes its absence a failure.

#[allow(dead_code, reason = "shared with tests/it")]
#[path = "../../../tests/it/nats_server.rs"]
mod server;

use std::sync::Arc;

use super::{JetStreamOptions, JetStreamOutbox, Layout, NatsAuth, NatsConnection, NatsHandle};
use crate::{
    metrics::Metrics,
    outbox::{
        BoxFuture, Outbox,
        conformance::{LIMITS, Rig},
    },
    vault::Vault,
};

use server::Server;

/// One outbox on a server of its own, with as many partitions as it says.
struct JetStreamRig {
    server: Server,
    vault: Arc<Vault>,
    partitions: usize,
}

impl JetStreamRig {
    fn new(partitions: usize) -> Option<Self> {
        Some(Self {
            server: Server::start()?,
            vault: Arc::new(Vault::forgetful().expect("random")),
            partitions,
        })
    }
}

fn connection(server: &Server) -> NatsConnection {
    NatsConnection {
        servers: vec![server.url()],
        auth: NatsAuth::None,
        tls: None,
    }
}

impl Rig for JetStreamRig {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Outbox>> {
        Box::pin(async {
            let layout = Layout {
                prefix: "test".to_owned(),
                partitions: self.partitions,
                replicas: 1,
                max_bytes: None,
                cluster: None,
                tags: Vec::new(),
            };
            let handle = NatsHandle::connect(&connection(&self.server), layout)
                .await
                .expect("connects");
            handle.init().await.expect("makes its streams");
            let options = JetStreamOptions {
                limits: LIMITS,
                remember: std::time::Duration::from_secs(3_600),
                encrypt_payloads: false,
                request_timeout: std::time::Duration::from_secs(2),
                metrics: Metrics::off(),
            };
            let opened = JetStreamOutbox::open(handle, options, &self.vault).await;
            Arc::new(opened.expect("opens")) as Arc<dyn Outbox>
        })
    }
}

/// The suite's tests, each where there is a server.
macro_rules! with_server {
    ($partitions:expr; $($name:ident)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                if let Some(rig) = super::JetStreamRig::new($partitions) {
                    $crate::outbox::conformance::$name(&rig).await;
                }
            }
        )*
    };
}

mod one_partition {
    crate::outbox::conformance::names!(with_server; 1;);
}

mod three_partitions {
    crate::outbox::conformance::names!(with_server; 3;);
}
