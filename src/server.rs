//! The relay as a whole: built from its configuration, run on a listener, and
//! drained when it is told to stop.
//!
//! Drain: health NOT_SERVING -> no new calls -> calls and streams in hand end ->
//! no new leases -> requests in flight are settled -> the outbox is closed. All
//! of it within `[server] drain_timeout_ms`.

mod backlog;
mod connections;
mod health;
mod http2;
mod listener;
mod parts;
mod removal;
mod store;
mod tls;
mod transport;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::pb::health_server::HealthServer;

use crate::{
    audit::Audit,
    auth::JwksError,
    config::Config,
    delivery::{Delivery, DeliveryParts},
    grpc::{Access, Services, with_reflection},
    metrics::{self, BacklogBoard, MetricsError},
    notify::{self, Notices, SenderOptions},
    outbox::{OpenError, OutboxError, PostgresError},
    registry::{Bounds, Configured, LoadError, Registry, Told},
    segment::SetupError,
    telemetry::{FLUSH_TIMEOUT, OtlpError, until},
    time::UnixMillis,
    vault::VaultError,
};

use connections::Connections;
use health::HealthService;
pub use listener::Listener;
use store::Store;
use tls::Tls;
pub use tls::TlsError;

/// Longest question for health, in bytes: it has the name of a service.
const MAX_HEALTH_BYTES: usize = 1_024;
/// This part of the drain's time-out is kept for requests to Segment.
const SHARE_FOR_DELIVERY: u32 = 4;
/// Of that, this part of the whole is kept for the last exports.
const SHARE_FOR_EXPORT: u32 = 8;
/// These have a little time even where the drain has none left.
const LEAST_CLOSE: Duration = Duration::from_secs(2);
const LEAST_EXPORT: Duration = Duration::from_millis(250);

/// Why the relay can't run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The outbox can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The shared outbox can't be opened.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    /// The outbox failed.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// The stored or configured integrations are not valid.
    #[error("integrations: {0}")]
    Registry(#[from] LoadError),
    /// The HTTP client can't be set up.
    #[error(transparent)]
    Segment(#[from] SetupError),
    /// The keys of what is stored can't be had.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// TLS of the server can't be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The keys of the tokens' issuer can't be had.
    #[error(transparent)]
    Jwks(#[from] JwksError),
    /// The way to the collector can't be set up.
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    /// Metrics can't be set up.
    #[error(transparent)]
    MetricsSetup(#[from] MetricsError),
    /// Nobody can scrape there.
    #[error("[metrics] listen = \"{address}\": {source}")]
    Metrics {
        /// The configured address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The audit file can't be opened.
    #[error("[log] audit_file {path}: {source}")]
    Audit {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Reflection can't be set up.
    #[error("reflection: {0}")]
    Reflection(#[from] prost_reflect::DescriptorError),
}

/// A relay that is ready to run.
pub struct Relay {
    store: Store,
    services: Services,
    delivery: DeliveryParts,
    access: Arc<Access>,
    tls: Option<Arc<Tls>>,
    board: Arc<BacklogBoard>,
    metrics_listener: Option<TcpListener>,
    config: Arc<Config>,
    draining: CancellationToken,
}

impl Relay {
    /// Opens the outbox and loads the integrations.
    ///
    /// # Errors
    /// [`RunError`]; nothing has been sent then.
    pub async fn open(config: Config) -> Result<Self, RunError> {
        let config = Arc::new(config);
        let audit = match &config.log.audit_file {
            None => Audit::new(),
            Some(path) => Audit::to_file(path).map_err(|source| RunError::Audit {
                path: path.clone(),
                source,
            })?,
        };
        let board = Arc::new(BacklogBoard::default());
        let metrics = parts::metrics(&config, &board)?;
        let metrics_listener = match config.metrics.listen {
            None => None,
            Some(address) => {
                if !address.ip().is_loopback() {
                    tracing::warn!(
                        %address,
                        "[metrics] listen is not a loopback address: all that reach it read the \
                         names of integrations and what they send, without TLS or a token"
                    );
                }
                let listener = TcpListener::bind(address).await;
                Some(listener.map_err(|source| RunError::Metrics { address, source })?)
            }
        };
        let store = Store::open(&config, &metrics).await?;
        let outbox = Arc::clone(&store.outbox);
        let notices = match &config.notify {
            Some(_) => Notices::new(Arc::clone(&outbox)),
            None => Notices::nobody(),
        };
        let told = Told {
            audit: &audit,
            notices: &notices,
        };
        let configured = Configured {
            integrations: &config.integrations,
            version: config.outbox.integrations_version,
        };
        let now = UnixMillis::now();
        let registry = Registry::load(Arc::clone(&outbox), configured, &told, now);
        let bounds = Bounds {
            integrations: config.limits.max_integrations,
            size: config.limits.max_integration_size,
        };
        let registry = Arc::new(registry.await?.bounded(bounds));
        let draining = CancellationToken::new();
        let services = parts::services(
            &config, outbox, registry, notices, audit, metrics, &draining,
        )?;
        let delivery = parts::delivery_parts(&config, &services);
        let access = Access::new(
            parts::authenticator(&config).await?,
            Arc::clone(&services.gate),
            Arc::clone(&services.usage),
            services.audit.clone(),
            services.metrics.clone(),
            services.traces,
        );
        let tls = match &config.tls {
            Some(options) => Some(Arc::new(Tls::new(options.clone())?)),
            None => None,
        };
        Ok(Self {
            store,
            services,
            delivery,
            access: Arc::new(access),
            tls,
            board,
            metrics_listener,
            config,
            draining,
        })
    }

    /// Where Prometheus can scrape, if it can.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        let listener = self.metrics_listener.as_ref()?;
        listener.local_addr().ok()
    }

    /// Serves until `shutdown`, then drains.
    ///
    /// # Errors
    /// [`RunError`]: the server failed. What was acknowledged is on disk.
    pub async fn run(
        self,
        listener: impl Into<Listener>,
        shutdown: CancellationToken,
    ) -> Result<(), RunError> {
        self.run_beside(listener, shutdown, async |_| {}).await
    }

    /// The same; `last` is done at the end, until the drain's deadline, beside the last export
    /// of metrics.
    ///
    /// # Errors
    /// As with [`Self::run`].
    pub async fn run_beside(
        mut self,
        listener: impl Into<Listener>,
        shutdown: CancellationToken,
        last: impl AsyncFnOnce(Instant),
    ) -> Result<(), RunError> {
        let delivery = Delivery::start(self.delivery.clone()).await?;
        let maintenance = tokio::spawn(self.store.maintain());
        let (serving, health) = watch::channel(true);
        let health = HealthServer::new(HealthService {
            serving: health,
            closing: self.draining.clone(),
        });
        let writable = self.services.outbox.signals().writable();
        let closing = CancellationToken::new();
        let drain = self.drain_on(shutdown.clone(), closing.clone());
        let mut routes = self.services.routes();
        // Anybody may ask for it.
        routes = routes.add_service(health.max_decoding_message_size(MAX_HEALTH_BYTES));
        if self.config.server.reflection {
            routes = with_reflection(routes, self.draining.clone())?;
        }
        let background = self.background(&closing);
        let scraped = CancellationToken::new();
        if let Some(listener) = self.metrics_listener.take() {
            let metrics = self.services.metrics.clone();
            tokio::spawn(metrics::serve(listener, metrics, scraped.clone()));
        }
        let reports = tokio::spawn(report_health(serving, writable, shutdown.clone()));
        let connections = Connections {
            options: Arc::clone(&self.services.limits),
            tls: self.tls.clone(),
            access: Arc::clone(&self.access),
            services: self.services.dispatch(routes),
        };
        let serve = connections.serve(listener.into(), closing.clone());
        let deadline = serve_until_drained(serve, drain, self.config.server.drain_timeout).await;
        background.close();
        maintenance.abort();
        reports.abort();
        let for_export = FLUSH_TIMEOUT.min(self.config.server.drain_timeout / SHARE_FOR_EXPORT);
        let stopped = tokio::time::timeout_at(deadline - for_export, async {
            background.wait().await;
            self.services.gate.drained().await;
            delivery.stop().await;
        });
        if stopped.await.is_err() {
            tracing::warn!("requests to Segment were still under way; they are sent again");
        }
        let closed = self.services.outbox.close();
        if timeout_at(deadline.max(Instant::now() + LEAST_CLOSE), closed)
            .await
            .is_err()
        {
            tracing::warn!("the disk does not answer; the next start reads what it has");
        }
        // To the end, so that a drain can be watched.
        scraped.cancel();
        tracing::info!("stopped");
        // Both may have to wait for a collector.
        let deadline = deadline
            .max(Instant::now() + LEAST_EXPORT)
            .min(Instant::now() + FLUSH_TIMEOUT);
        let metrics = self.services.metrics.clone();
        tokio::join!(last(deadline), until(deadline, move || metrics.close()));
        Ok(())
    }

    /// What goes on beside calls and deliveries, until `stop`.
    fn background(&self, stop: &CancellationToken) -> TaskTracker {
        let tasks = TaskTracker::new();
        let access = Arc::clone(&self.access);
        let refreshed = stop.clone();
        tasks.spawn(async move { access.refresh_keys(refreshed).await });
        if let Some(tls) = &self.tls {
            tasks.spawn(Arc::clone(tls).follow(stop.clone()));
        }
        tasks.spawn(Arc::clone(&self.services.registry).follow(stop.clone()));
        tasks.spawn(removal::follow(self.services.clone(), stop.clone()));
        if self.services.metrics.are_read() {
            tasks.spawn(backlog::follow(
                Arc::clone(&self.services.outbox),
                Arc::clone(&self.services.registry),
                Arc::clone(&self.services.sources),
                self.store.directory(),
                Arc::clone(&self.board),
                stop.clone(),
            ));
        }
        if let Some(notify) = &self.config.notify {
            let options = SenderOptions {
                notify: notify.clone(),
                haste: 1,
            };
            let notices = self.services.notices.clone();
            tasks.spawn(notify::run(notices, options, stop.clone()));
        }
        tasks
    }

    /// The steps of the drain up to the point where connections are closed.
    fn drain_on(
        &self,
        shutdown: CancellationToken,
        closing: CancellationToken,
    ) -> impl Future<Output = ()> + use<> {
        let draining = self.draining.clone();
        let delay = self.config.server.drain_delay;
        async move {
            shutdown.cancelled().await;
            tracing::info!("draining");
            tokio::time::sleep(delay).await;
            draining.cancel();
            closing.cancel();
        }
    }
}

/// Serves until the drain, and then until the calls in hand have ended, but keeps
/// a share of the time-out for the requests to Segment. Returns the drain's deadline.
async fn serve_until_drained(
    serve: impl Future<Output = ()>,
    drain: impl Future<Output = ()>,
    timeout: Duration,
) -> Instant {
    tokio::pin!(serve);
    tokio::select! {
        () = &mut serve => return Instant::now() + timeout,
        () = drain => {}
    }
    let deadline = Instant::now() + timeout;
    let share = deadline - timeout / SHARE_FOR_DELIVERY;
    if tokio::time::timeout_at(share, serve).await.is_err() {
        tracing::warn!("calls were still under way at the end of the drain; they are cut off");
    }
    deadline
}

/// Health follows the outbox, until the drain: then it is NOT_SERVING for good.
async fn report_health(
    serving: watch::Sender<bool>,
    mut writable: watch::Receiver<bool>,
    draining: CancellationToken,
) {
    loop {
        serving.send_replace(*writable.borrow_and_update());
        tokio::select! {
            () = draining.cancelled() => break,
            changed = writable.changed() => if changed.is_err() { break },
        }
        tracing::warn!(
            writable = *writable.borrow(),
            "the outbox has changed its state"
        );
    }
    serving.send_replace(false);
    // Receivers take a channel without a sender for one that changes no more.
    serving.closed().await;
}
