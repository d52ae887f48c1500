//! Connects, checks that the servers fit, and starts what runs beside the calls.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_nats::jetstream::{ErrorCode, context::AccountErrorKind};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    JetStreamOptions, JetStreamOutbox, Layout, LayoutReport, NatsConnection, Shared, connect,
    counts::Counts, deleter::Deleter, intake, lanes::Lanes, news, scout, sessions::Sessions,
    state::StateStore, wire::Wire,
};
use crate::{
    outbox::{OutboxError, Signals, sealing::Sealing},
    vault::{UnsealError, Vault, VaultError},
};

/// The oldest server with all that is needed: atomic batches came with it.
const OLDEST_SERVER: (i64, i64, i64) = (2, 12, 0);

/// Why the shared outbox can't be used.
#[derive(Debug, thiserror::Error)]
pub enum JetStreamError {
    /// No server lets the relay in.
    #[error("[nats] servers {servers}: {why}")]
    Connect {
        /// The configured servers.
        servers: String,
        /// What went wrong, and what to change.
        why: String,
    },
    /// A file of `[nats]` can't be used.
    #[error("[nats] {setting} {path}: {rule}")]
    File {
        /// Which setting names it.
        setting: &'static str,
        /// The configured file.
        path: PathBuf,
        /// What is wrong with it.
        rule: String,
    },
    /// The server is too old.
    #[error(
        "[nats] servers: nats-server {0} is too old; segment-relay needs 2.12 or newer, on all servers of the cluster"
    )]
    TooOld(String),
    /// The relay may not ask, or nobody is there to answer.
    #[error(
        "[nats] servers: no answer to a question to JetStream; most servers of a cluster have to be up, and the \
         relay's user needs the rights to publish to $JS.API.>, $JS.FC.>, $KV.{0}-state.> and {0}.>, and to \
         subscribe to {0}.> and _INBOX.>"
    )]
    NoRights(String),
    /// The servers do not agree upon a leader, at the moment.
    #[error(
        "[nats] servers: JetStream is not available now ({0}); most servers of the cluster have to be up and to reach each other"
    )]
    NoLeader(String),
    /// The server has no JetStream.
    #[error(
        "[nats] servers: this NATS has no JetStream for the relay ({0}); start nats-server with -js, or enable it for the account"
    )]
    NoJetStream(String),
    /// Streams are missing.
    #[error("JetStream lacks {}; run `segment-relay nats init` with the same configuration", .0.join(", "))]
    Missing(Vec<String>),
    /// Streams are not as they have to be.
    #[error("JetStream is not as configured: {}; see `segment-relay nats init`", .0.join("; "))]
    Differs(Vec<String>),
    /// The servers refused something.
    #[error("JetStream: {0}")]
    Refused(String),
    /// The keys of what is stored can't be used.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// What is stored is sealed under a key that is not known.
    #[error(
        "the shared outbox is sealed under keys that are not those of [secrets]: {0}; all relays need the same keys"
    )]
    Keys(#[from] UnsealError),
    /// The servers failed.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
}

/// A connection whose servers fit.
pub struct NatsHandle {
    pub(super) wire: Wire,
    pub(super) layout: Layout,
}

impl NatsHandle {
    /// Connects to the servers.
    ///
    /// # Errors
    /// [`JetStreamError`]: no server answers, it is too old, or has no JetStream.
    pub async fn connect(
        connection: &NatsConnection,
        layout: Layout,
    ) -> Result<Self, JetStreamError> {
        let client = connect::connect(connection).await?;
        let info = client.server_info();
        let (major, minor, patch) = OLDEST_SERVER;
        if !client.is_server_compatible(major, minor, patch) {
            return Err(JetStreamError::TooOld(info.version));
        }
        let wire = Wire::new(client);
        wire.context
            .query_account()
            .await
            .map_err(|error| match error.kind() {
                AccountErrorKind::TimedOut => JetStreamError::NoRights(layout.prefix.clone()),
                AccountErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::CLUSTER_NOT_AVAILABLE =>
                {
                    JetStreamError::NoLeader(error.to_string())
                }
                _ => JetStreamError::NoJetStream(error.to_string()),
            })?;
        Ok(Self { wire, layout })
    }

    /// Looks at the streams and the bucket.
    ///
    /// # Errors
    /// [`JetStreamError::Refused`].
    pub async fn check(&self) -> Result<LayoutReport, JetStreamError> {
        self.layout.check(&self.wire.context, false).await
    }

    /// Makes what is missing; the report says what that was, and what differs.
    ///
    /// # Errors
    /// [`JetStreamError::Refused`].
    pub async fn init(&self) -> Result<LayoutReport, JetStreamError> {
        self.layout.check(&self.wire.context, true).await
    }

    /// Changes what differs and can be changed: replicas, bounds, placement.
    ///
    /// # Errors
    /// [`JetStreamError::Refused`].
    pub async fn apply(&self) -> Result<(), JetStreamError> {
        self.layout.apply(&self.wire.context).await
    }

    /// Whether something is stored there that needs the keys of a vault.
    ///
    /// # Errors
    /// The bucket is missing or can't be read.
    pub async fn store_exists(&self) -> Result<bool, JetStreamError> {
        self.refuse_misfits().await?;
        let state = StateStore::open(&self.wire, &self.layout).await?;
        Ok(state.index().await?.is_some())
    }

    pub(super) async fn refuse_misfits(&self) -> Result<(), JetStreamError> {
        let report = self.check().await?;
        if !report.missing.is_empty() {
            return Err(JetStreamError::Missing(report.missing));
        }
        let (fatal, other): (Vec<_>, Vec<_>) =
            report.differences.into_iter().partition(|one| one.fatal);
        for difference in other {
            tracing::warn!(%difference, "JetStream is not quite as configured");
        }
        if fatal.is_empty() {
            return Ok(());
        }
        Err(JetStreamError::Differs(
            fatal.iter().map(ToString::to_string).collect(),
        ))
    }
}

impl JetStreamOutbox {
    /// Opens the shared outbox and takes a session.
    ///
    /// # Errors
    /// [`JetStreamError`]: something is missing or does not fit; nothing was changed.
    pub async fn open(
        handle: NatsHandle,
        options: JetStreamOptions,
        vault: &Arc<Vault>,
    ) -> Result<Self, JetStreamError> {
        handle.refuse_misfits().await?;
        let NatsHandle { wire, layout } = handle;
        let state = StateStore::open(&wire, &layout).await?;
        let index = state.index_key(vault).await?;
        let sealing = Arc::new(Sealing::new(
            Arc::clone(vault),
            &index,
            options.encrypt_payloads,
        ));
        let lease = options.request_timeout + super::LEASE_MARGIN;
        let sessions = Sessions::start(&wire, &layout, lease).await?;
        let closing = CancellationToken::new();
        let tasks = TaskTracker::new();
        let mut inbound = Vec::new();
        let mut intakes = Vec::new();
        for _ in 0..intake::count(layout.partitions) {
            let (sender, receiver) = intake::channel();
            intakes.push(sender);
            inbound.push(receiver);
        }
        let shared = Arc::new(Shared {
            counts: Counts::new(options.limits),
            deleter: Deleter::start(wire.clone(), &tasks, closing.clone()),
            lanes: Lanes::default(),
            signals: Signals::default(),
            wire,
            layout,
            options,
            sealing,
            sessions,
            intakes,
            state,
            closing,
            tasks,
        });
        scout::look(&shared).await?;
        for (place, receiver) in inbound.into_iter().enumerate() {
            let partition = intake::partition(place);
            shared
                .tasks
                .spawn(intake::run(Arc::clone(&shared), partition, receiver));
        }
        shared.tasks.spawn(Sessions::keep(Arc::clone(&shared)));
        shared.tasks.spawn(Sessions::follow(Arc::clone(&shared)));
        shared.tasks.spawn(scout::run(Arc::clone(&shared)));
        shared.tasks.spawn(news::follow(Arc::clone(&shared)));
        shared
            .tasks
            .spawn(super::state::follow(Arc::clone(&shared)));
        shared
            .tasks
            .spawn(super::lanes::serve_wanted(Arc::clone(&shared)));
        Ok(Self(shared))
    }

    /// How long a relay's lanes stay its own after it has gone without a word.
    #[must_use]
    pub fn lease(&self) -> Duration {
        self.0.lease()
    }
}
