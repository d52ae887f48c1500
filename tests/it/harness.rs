//! A relay and a sandbox on free loopback ports.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::postgres_server::{self, Database};
use segment_relay::{
    config::{Config, Outside},
    proto::{
        self, AttributeValue, Capture, CaptureRequest, CaptureResult, Credential, DataRegion,
        DeliveryState, EventDelivery, FieldMapping, GetCaptureRequest, GetCaptureResponse,
        Integration, WaitFor, attribute_value::Kind,
        integration_service_client::IntegrationServiceClient,
        segment_relay_client::SegmentRelayClient,
    },
    sandbox::{self, Rule, Sandbox, SandboxOptions},
    server::{Relay, RunError},
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, transport::Channel};

use crate::collector::Collector;

/// No test waits longer than this for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const WRITE_KEY: &str = "write-key-of-acme-0001";

pub(crate) struct World {
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) address: SocketAddr,
    pub(crate) channel: Channel,
    settings: String,
    endpoints: String,
    directory: TempDir,
    store: PathBuf,
    metrics: SocketAddr,
    shutdown: CancellationToken,
    relay: JoinHandle<Result<(), RunError>>,
    shared: Shared,
    sandbox_shutdown: CancellationToken,
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::with("").await
    }

    /// A world whose relay has these settings beside those that lead it to the
    /// sandbox. `[delivery]` has short waits unless the settings name it.
    pub(crate) async fn with(settings: &str) -> Self {
        Self::with_front(settings, async |endpoint| {
            format!("http://{endpoint}/v1/batch")
        })
        .await
    }

    /// The same with another URL before the non-EU endpoint, whose address `front` gets.
    pub(crate) async fn with_front(
        settings: &str,
        front: impl AsyncFnOnce(String) -> String,
    ) -> Self {
        crate::scan::this_process();
        let sandbox = Arc::new(Sandbox::new(SandboxOptions::default()));
        let sandbox_shutdown = CancellationToken::new();
        let (non_eu, eu) = (listener().await, listener().await);
        let url = |listener: &TcpListener| {
            format!("http://{}", listener.local_addr().expect("an address"))
        };
        let non_eu_url = front(non_eu.local_addr().expect("an address").to_string()).await;
        let endpoints = format!(
            "[segment.endpoints]\nnon_eu = \"{non_eu_url}\"\neu = \"{}/v1/batch\"\n",
            url(&eu)
        );
        tokio::spawn(sandbox::run(
            vec![(sandbox::Region::NonEu, non_eu), (sandbox::Region::Eu, eu)],
            Arc::clone(&sandbox),
            sandbox_shutdown.clone(),
        ));
        let directory = tempfile::tempdir().expect("a directory");
        let short_waits = if settings.contains("[delivery]") {
            ""
        } else {
            "[delivery]\nretry_base_ms = 10\nretry_max_ms = 50\n"
        };
        let settings = format!("{short_waits}{endpoints}{settings}");
        let shared = Shared::start(&directory).await;
        let Started {
            address,
            metrics,
            shutdown,
            relay,
        } = run_relay(&settings, &directory, &shared).await;
        Self {
            sandbox,
            address,
            channel: connect(address),
            metrics,
            settings,
            endpoints,
            store: directory.path().join("outbox"),
            directory,
            shutdown,
            relay,
            shared,
            sandbox_shutdown,
        }
    }

    /// Drains the relay and starts another on the same outbox.
    pub(crate) async fn restart(&mut self) {
        self.drain().await;
        self.restarted().await;
    }

    async fn restarted(&mut self) {
        let started = run_relay(&self.settings, &self.directory, &self.shared).await;
        self.address = started.address;
        self.metrics = started.metrics;
        self.shutdown = started.shutdown;
        self.relay = started.relay;
        self.channel = connect(self.address);
    }

    /// The same, with something done to the store of the stopped relay.
    pub(crate) async fn restart_after(&mut self, change: impl FnOnce(&Path)) {
        self.drain().await;
        change(&self.store);
        self.restarted().await;
    }

    /// The same with other settings.
    pub(crate) async fn restart_with(mut self, settings: &str) -> Self {
        self.settings = format!("{}{settings}", self.endpoints);
        self.restart().await;
        self
    }

    /// Tells the relay to stop, without waiting for it.
    pub(crate) fn begin_drain(&self) {
        self.shutdown.cancel();
    }

    async fn drain(&mut self) {
        // Where the test has begun the drain, they may be gone already.
        if !self.shutdown.is_cancelled() {
            crate::scan::of_metrics(self.metrics).await;
        }
        self.shutdown.cancel();
        let ended = tokio::time::timeout(PATIENCE, &mut self.relay).await;
        ended
            .expect("drained in time")
            .expect("no panic")
            .expect("a clean end");
    }

    pub(crate) async fn stop(mut self) {
        self.drain().await;
        self.sandbox_shutdown.cancel();
    }

    /// The directory of all that the relay stores, its key apart: here, or with its server.
    pub(crate) fn outbox(&self) -> &Path {
        match &self.shared {
            Shared::None => &self.store,
            Shared::Postgres(database) => database.directory(),
        }
    }

    /// Whether the store is this relay's alone. A shared one leaves dead rows and WAL on the
    /// disk after an erasure, and refuses captures without room after they are mapped.
    pub(crate) fn is_embedded(&self) -> bool {
        matches!(self.shared, Shared::None)
    }

    pub(crate) fn relay(&self) -> SegmentRelayClient<Channel> {
        SegmentRelayClient::new(self.channel.clone())
    }

    pub(crate) fn integrations(&self) -> IntegrationServiceClient<Channel> {
        IntegrationServiceClient::new(self.channel.clone())
    }

    pub(crate) async fn create(&self, integration: Integration) -> Integration {
        let request = proto::CreateIntegrationRequest {
            integration: Some(integration),
        };
        let created = self
            .integrations()
            .create_integration(request)
            .await
            .expect("created");
        created.into_inner().integration.expect("an integration")
    }

    pub(crate) async fn capture(
        &self,
        capture: Capture,
        wait_for: WaitFor,
    ) -> Result<CaptureResult, Status> {
        let mut request = Request::new(CaptureRequest {
            integration_id: "acme".into(),
            capture: Some(capture),
            wait_for: wait_for.into(),
        });
        request.set_timeout(PATIENCE);
        let answer = self.relay().capture(request).await?;
        Ok(answer.into_inner().result.expect("a result"))
    }

    pub(crate) async fn deliver(&self, capture: Capture) -> CaptureResult {
        self.capture(capture, WaitFor::Delivered)
            .await
            .expect("accepted")
    }

    /// Waits until a request to Segment is under way.
    pub(crate) async fn request_under_way(&self) {
        let begun = self
            .sandbox
            .wait_for(|stats| stats.requests_in_flight == 1, PATIENCE)
            .await;
        begun.expect("a request is under way");
    }

    pub(crate) async fn accept(&self, capture: Capture) -> CaptureResult {
        self.capture(capture, WaitFor::Accepted)
            .await
            .expect("accepted")
    }

    pub(crate) async fn status(&self, capture_id: &str) -> Result<GetCaptureResponse, Status> {
        let request = GetCaptureRequest {
            integration_id: "acme".into(),
            capture_id: capture_id.into(),
        };
        Ok(self.relay().get_capture(request).await?.into_inner())
    }

    /// Waits until both events of a capture are final, by sending it again.
    pub(crate) async fn settled(&self, capture: Capture) -> CaptureResult {
        let result = self.deliver(capture).await;
        assert!(result.duplicate, "{result:?} was not accepted before");
        result
    }

    pub(crate) fn misbehave(&self, rule: Rule) {
        self.sandbox.set_rules(vec![rule]).expect("a fine rule");
    }

    /// Requests with events of this person are answered this status.
    pub(crate) fn refuse_person(&self, email: &str, status: u16) {
        self.misbehave(Rule {
            reject_containing: Some(hex::encode(Sha256::digest(email))),
            reject_status: Some(status),
            ..Rule::default()
        });
    }

    /// Makes dead letters of a capture: Segment refuses its person's events, and takes
    /// another's after that.
    pub(crate) async fn dead_letter(
        &self,
        id: &str,
        capture: Capture,
        status: u16,
    ) -> CaptureResult {
        self.refuse_person(&capture.email, status);
        let send = async |capture: Capture, wait_for: WaitFor| {
            let mut request = Request::new(CaptureRequest {
                integration_id: id.into(),
                capture: Some(capture),
                wait_for: wait_for.into(),
            });
            request.set_timeout(PATIENCE);
            let answer = self.relay().capture(request).await.expect("accepted");
            answer.into_inner().result.expect("a result")
        };
        let stats = self.sandbox.stats();
        let refused = stats.statuses.get(&status).copied().unwrap_or(0);
        send(capture.clone(), WaitFor::Accepted).await;
        let again = move |stats: &sandbox::Stats| {
            stats
                .statuses
                .get(&status)
                .is_some_and(|count| *count > refused)
        };
        let tried = self.sandbox.wait_for(again, PATIENCE).await;
        tried.expect("it is tried");
        let first = 1_000_000 + 1_000 * usize::try_from(stats.requests).expect("few");
        for control in first..first + 1_000 {
            send(numbered(control), WaitFor::Delivered).await;
            let result = send(capture.clone(), WaitFor::Accepted).await;
            if states(&result.events) == [DeliveryState::DeadLettered; 2] {
                return result;
            }
        }
        panic!("they are no dead letters");
    }

    pub(crate) fn behave(&self) {
        self.sandbox.set_rules(Vec::new()).expect("no rules");
    }

    /// Waits until so many events were accepted by the sandbox.
    pub(crate) async fn arrived(&self, events: u64) {
        self.sandbox
            .wait_for(|stats| stats.events_accepted >= events, PATIENCE)
            .await
            .expect("the events arrive");
    }
}

/// The relay's shared outbox: with `SEGMENT_RELAY_TEST_OUTBOX=postgres` all tests of a relay run
/// over PostgreSQL.
enum Shared {
    None,
    Postgres(Database),
}

impl Shared {
    async fn start(directory: &TempDir) -> Self {
        let kind = std::env::var_os("SEGMENT_RELAY_TEST_OUTBOX");
        match kind.as_ref().and_then(|kind| kind.to_str()) {
            Some("postgres") => {
                let database = postgres_server::database().expect("PostgreSQL");
                let made = std::process::Command::new(env!("CARGO_BIN_EXE_segment-relay"))
                    .args(["outbox", "init"])
                    .env("SEGMENT_RELAY__POSTGRES__URLS", database.url())
                    .env(
                        "SEGMENT_RELAY__SECRETS__KEY_FILE",
                        directory.path().join("key"),
                    )
                    .output();
                let made = made.expect("runs");
                assert!(made.status.success(), "{made:?}");
                Self::Postgres(database)
            }
            _ => Self::None,
        }
    }

    /// The variables that lead a relay to it.
    fn settings(&self) -> Vec<(String, String)> {
        match self {
            Self::None => Vec::new(),
            Self::Postgres(database) => vec![
                (
                    "SEGMENT_RELAY__OUTBOX__KIND".to_owned(),
                    "postgres".to_owned(),
                ),
                ("SEGMENT_RELAY__POSTGRES__URLS".to_owned(), database.url()),
            ],
        }
    }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port")
}

/// A relay that runs.
struct Started {
    address: SocketAddr,
    metrics: SocketAddr,
    shutdown: CancellationToken,
    relay: JoinHandle<Result<(), RunError>>,
}

async fn run_relay(settings: &str, directory: &TempDir, shared: &Shared) -> Started {
    let outside = Outside {
        validate: &|_| Vec::new(),
        read_key_file: &|_| Err(std::io::ErrorKind::NotFound.into()),
    };
    let outbox = directory.path().join("outbox").display().to_string();
    let key = directory.path().join("key").display().to_string();
    let collector = format!("http://{}", Collector::for_all());
    let environment = [
        ("SEGMENT_RELAY__OUTBOX__PATH", outbox.as_str()),
        ("SEGMENT_RELAY__SECRETS__KEY_FILE", key.as_str()),
        ("SEGMENT_RELAY__OTLP__ENDPOINT", collector.as_str()),
        ("SEGMENT_RELAY__TRACES__SAMPLE_RATIO", "1"),
        ("SEGMENT_RELAY__METRICS__LISTEN", "127.0.0.1:0"),
    ];
    let mut environment: Vec<(String, String)> = environment
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    environment.extend(shared.settings());
    let config = Config::load(Some(("test.toml", settings)), environment, &outside);
    let config = config.unwrap_or_else(|faults| panic!("{faults}"));
    let relay = Relay::open(config).await.expect("opens");
    let listener = listener().await;
    let address = listener.local_addr().expect("an address");
    let metrics = relay.metrics_address().expect("there are metrics");
    let shutdown = CancellationToken::new();
    let relay = tokio::spawn(relay.run(listener, shutdown.clone()));
    Started {
        address,
        metrics,
        shutdown,
        relay,
    }
}

/// Connects with the first call.
pub(crate) fn connect(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}"))
        .expect("a URL")
        .connect_lazy()
}

/// An integration of one region that forwards all attributes.
pub(crate) fn acme() -> Integration {
    Integration {
        integration_id: "acme".into(),
        credentials: vec![credential(DataRegion::NonEu, WRITE_KEY)],
        unmapped_attributes: proto::UnmappedAttributes::Forward.into(),
        ..Integration::default()
    }
}

pub(crate) fn credential(region: DataRegion, write_key: &str) -> Credential {
    Credential {
        data_region: region.into(),
        write_key: write_key.into(),
        write_key_hint: String::new(),
    }
}

pub(crate) fn mapping(attribute_id: &str) -> FieldMapping {
    FieldMapping {
        attribute_id: attribute_id.into(),
        ..FieldMapping::default()
    }
}

pub(crate) fn text(text: &str) -> AttributeValue {
    AttributeValue {
        kind: Some(Kind::StringValue(text.into())),
    }
}

pub(crate) fn worked_example() -> Capture {
    Capture {
        email: "test@aol.com".into(),
        campaign_id: "n3zrik6g".into(),
        campaign_name: "New Quiz".into(),
        session_id: "y2P5ks05mqzGsdkIGjbQ".into(),
        traffic_source: "Owned+Web".into(),
        occur_time: Some(prost_types::Timestamp {
            seconds: 1_615_507_200,
            nanos: 0,
        }),
        attributes: [
            ("attribute_id_1".to_owned(), text("attribute_value_1")),
            ("attribute_id_2".to_owned(), text("attribute_value_2")),
        ]
        .into(),
        ..Capture::default()
    }
}

/// A capture of its own id and person.
pub(crate) fn numbered(number: usize) -> Capture {
    Capture {
        capture_id: format!("capture-{number}"),
        email: format!("person-{number}@example.com"),
        ..worked_example()
    }
}

pub(crate) fn states(events: &[EventDelivery]) -> Vec<DeliveryState> {
    events.iter().map(EventDelivery::state).collect()
}

/// Field paths and reasons of the violations in a status.
pub(crate) fn violations(status: &Status) -> Vec<(String, String)> {
    use tonic_types::StatusExt;
    let details = status.get_error_details();
    let violations = details
        .bad_request()
        .map(|bad| bad.field_violations.clone());
    violations
        .unwrap_or_default()
        .into_iter()
        .map(|v| (v.field, v.reason))
        .collect()
}

/// The stable word of a status.
pub(crate) fn reason(status: &Status) -> String {
    use tonic_types::StatusExt;
    let details = status.get_error_details();
    details
        .error_info()
        .map(|info| info.reason.clone())
        .unwrap_or_default()
}
