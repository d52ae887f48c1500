//! Connects, checks that the servers fit, and starts what runs beside the calls.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{ErrorCode, context::AccountErrorKind};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    JetStreamOptions, JetStreamOutbox, Layout, LayoutReport, NatsConnection, Shared, connect,
    counts::Counts, deleter::Deleter, error::JetStreamError, intake, lanes::Lanes, news, scout,
    sessions::Sessions, state::StateStore, wire::Wire,
};
use crate::{
    outbox::{Signals, sealing::Sealing},
    vault::Vault,
};

/// The oldest server with all that is needed: atomic batches came with it.
const OLDEST_SERVER: (i64, i64, i64) = (2, 12, 0);

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
