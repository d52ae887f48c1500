//! The relay as a whole: built from its configuration, run on a listener, and
//! drained when it is told to stop.
//!
//! Drain: health NOT_SERVING -> no new calls -> calls and streams in hand end ->
//! no new leases -> requests in flight are settled -> the outbox is closed. All
//! of it within `[server] drain_timeout_ms`.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::watch, time::Instant};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic_health::server::HealthReporter;

use crate::{
    config::{self, Config},
    delivery::{Backoff, Delivery, DeliveryParts, LaneOptions, RateLimits, VitalsBoard},
    grpc::{Gate, RELAY_SERVICE, Services},
    outbox::{Limits, OpenError, Outbox, OutboxError, SqliteOptions, SqliteOutbox},
    proto,
    registry::{Registry, RegistryError},
    segment::{REQUEST_OVERHEAD_BYTES, SegmentClient, SetupError},
    time::UnixMillis,
};

/// This part of the drain's time-out is kept for requests to Segment.
const SHARE_FOR_DELIVERY: u32 = 4;
/// How often the outbox forgets what is old.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(10);
/// How often it does while there is much to forget or to give back.
const BUSY_MAINTENANCE_INTERVAL: Duration = Duration::from_millis(200);
/// How often an outbox that could not be written is tried again.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Size of all headers of a call, in bytes.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Streams that a client may open and reset before its connection is closed:
/// against rapid reset (CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 64;

/// Why the relay can't run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The outbox can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The outbox failed.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// The stored or configured integrations are not valid.
    #[error("integrations: {0}")]
    Registry(#[from] RegistryError),
    /// The HTTP client can't be set up.
    #[error(transparent)]
    Segment(#[from] SetupError),
    /// The gRPC server failed.
    #[error("the gRPC server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// Reflection can't be set up.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A relay that is ready to run.
pub struct Relay {
    outbox: Arc<SqliteOutbox>,
    services: Services,
    delivery: DeliveryParts,
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
        let outbox = Arc::new(SqliteOutbox::open(&outbox_options(&config.outbox))?);
        let dyn_outbox: Arc<dyn Outbox> = Arc::clone(&outbox) as Arc<dyn Outbox>;
        let registry = Registry::load(
            Arc::clone(&dyn_outbox),
            &config.integrations,
            UnixMillis::now(),
        );
        let registry = Arc::new(registry.await?);
        let segment = Arc::new(SegmentClient::new(&config.segment)?);
        let vitals = Arc::new(VitalsBoard::default());
        let draining = CancellationToken::new();
        let limits = Arc::new(config.server.clone());
        let gate = Gate::new(
            limits.max_calls_in_flight,
            limits.max_watchers,
            draining.clone(),
        );
        let services = Services {
            outbox: Arc::clone(&dyn_outbox),
            registry: Arc::clone(&registry),
            segment: Arc::clone(&segment),
            vitals: Arc::clone(&vitals),
            gate: Arc::new(gate),
            limits,
        };
        let delivery = DeliveryParts {
            outbox: dyn_outbox,
            segment,
            registry,
            vitals,
            rates: Arc::new(rate_limits(&config.delivery)),
            lanes: lane_options(&config.delivery),
            max_requests_in_flight: config.delivery.max_requests_in_flight,
        };
        Ok(Self {
            outbox,
            services,
            delivery,
            config,
            draining,
        })
    }

    /// Serves until `shutdown`, then drains.
    ///
    /// # Errors
    /// [`RunError`]: the server failed. What was acknowledged is on disk.
    pub async fn run(
        self,
        listener: TcpListener,
        shutdown: CancellationToken,
    ) -> Result<(), RunError> {
        let delivery = Delivery::start(self.delivery.clone()).await?;
        let maintenance = tokio::spawn(maintain(Arc::clone(&self.outbox)));
        let (health, health_service) = tonic_health::server::health_reporter();
        let writable = self.outbox.signals().writable();
        let closing = CancellationToken::new();
        let drain = self.drain_on(shutdown.clone(), closing.clone());
        let mut router = self
            .server()
            .add_routes(self.services.routes())
            .add_service(health_service);
        if self.config.server.reflection {
            router = router.add_service(reflection()?.build_v1()?);
            router = router.add_service(reflection()?.build_v1alpha()?);
        }
        set_health(&health, true).await;
        let reports = tokio::spawn(report_health(health, writable, shutdown.clone()));
        let serve = router.serve_with_incoming_shutdown(
            TcpListenerStream::new(listener),
            closing.clone().cancelled_owned(),
        );
        let drain_timeout = self.config.server.drain_timeout;
        let (served, deadline) = serve_until_drained(serve, drain, drain_timeout).await;
        maintenance.abort();
        reports.abort();
        let stopped = tokio::time::timeout_at(deadline, async {
            self.services.gate.drained().await;
            delivery.stop().await;
        });
        if stopped.await.is_err() {
            tracing::warn!("requests to Segment were still under way; they are sent again");
        }
        self.outbox.close().await;
        tracing::info!("stopped");
        served
    }

    fn server(&self) -> tonic::transport::Server {
        let limits = &self.config.server;
        tonic::transport::Server::builder()
            .max_concurrent_streams(limits.max_concurrent_streams)
            .timeout(limits.request_timeout)
            .http2_keepalive_interval(Some(limits.keepalive_interval))
            .http2_keepalive_timeout(Some(limits.keepalive_timeout))
            .max_connection_age(limits.max_connection_age)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
            .tcp_nodelay(true)
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
    serve: impl Future<Output = Result<(), tonic::transport::Error>>,
    drain: impl Future<Output = ()>,
    timeout: Duration,
) -> (Result<(), RunError>, Instant) {
    tokio::pin!(serve);
    tokio::select! {
        served = &mut serve => return (served.map_err(Into::into), Instant::now() + timeout),
        () = drain => {}
    }
    let deadline = Instant::now() + timeout;
    let served = match tokio::time::timeout_at(deadline - timeout / SHARE_FOR_DELIVERY, serve).await
    {
        Ok(served) => served.map_err(Into::into),
        Err(_) => {
            tracing::warn!("calls were still under way at the end of the drain; they are cut off");
            Ok(())
        }
    };
    (served, deadline)
}

/// Health follows the outbox, until the drain: then it is NOT_SERVING for good.
async fn report_health(
    health: HealthReporter,
    mut writable: watch::Receiver<bool>,
    draining: CancellationToken,
) {
    loop {
        let serving = *writable.borrow_and_update();
        set_health(&health, serving).await;
        tokio::select! {
            () = draining.cancelled() => break,
            changed = writable.changed() => if changed.is_err() { break },
        }
        tracing::warn!(
            writable = *writable.borrow(),
            "the outbox has changed its state"
        );
    }
    set_health(&health, false).await;
}

async fn set_health(health: &HealthReporter, serving: bool) {
    use tonic_health::ServingStatus::{NotServing, Serving};
    let status = if serving { Serving } else { NotServing };
    for service in ["", RELAY_SERVICE] {
        health.set_service_status(service, status).await;
    }
}

fn reflection() -> Result<tonic_reflection::server::Builder<'static>, RunError> {
    Ok(tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // So that a client that knows nothing can read the details of an error.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET))
}

/// Forgets what is old, and finds out soon whether a failing disk works again.
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

fn outbox_options(outbox: &config::Outbox) -> SqliteOptions {
    SqliteOptions {
        directory: outbox.path.clone(),
        limits: Limits {
            max_events: outbox.max_events,
            max_bytes: outbox.max_bytes,
            max_integration_events: outbox.max_integration_events,
            max_integration_bytes: outbox.max_integration_bytes,
        },
        group_commit_max: outbox.group_commit_max,
        remember: outbox.idempotency,
    }
}

fn rate_limits(delivery: &config::Delivery) -> RateLimits {
    // The configuration's bounds leave no room for 0.
    let number = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
    RateLimits::new(
        number(delivery.max_events_per_second),
        number(delivery.burst_events),
    )
}

fn lane_options(delivery: &config::Delivery) -> LaneOptions {
    LaneOptions {
        // A batch beyond the burst could never be paid for.
        max_batch_events: delivery
            .max_batch_events
            .min(delivery.burst_events as usize),
        max_batch_bytes: delivery.max_batch_bytes - REQUEST_OVERHEAD_BYTES,
        backoff: Backoff {
            base: delivery.retry_base,
            max: delivery.retry_max,
        },
        unauthorized_retry: delivery.unauthorized_retry,
        max_age: delivery.max_age,
    }
}
