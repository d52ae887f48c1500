//! `segment-relay demo`: the main job in one process. A sandbox stands in for
//! Segment, a relay serves real gRPC, and a client sends it captures.

mod story;

use std::{io::Write, net::Ipv4Addr, sync::Arc, time::Duration};

use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{
    config::{Config, Faults, Outside},
    sandbox::{self, Sandbox, SandboxOptions},
    server::{Relay, RunError},
};

/// Why the demo failed.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A port or a file could not be had, or the output is gone.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The relay could not start.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The demo's own configuration is wrong.
    #[error(transparent)]
    Config(#[from] Faults),
    /// The client could not connect.
    #[error("no connection to the relay: {0}")]
    Connect(#[from] tonic::transport::Error),
    /// A call failed that should not have.
    #[error("a call failed: {0}")]
    Call(Box<tonic::Status>),
    /// Something is not as it should be.
    #[error("{0}")]
    Unexpected(String),
}

impl From<tonic::Status> for DemoError {
    fn from(status: tonic::Status) -> Self {
        Self::Call(Box::new(status))
    }
}

/// Runs the demo and prints it. All it needs are free ports on loopback and a
/// directory for temporary files, which it removes.
///
/// # Errors
/// [`DemoError`], also where an event did not become what it should.
pub async fn run(out: &mut impl Write) -> Result<(), DemoError> {
    let stage = Stage::set().await?;
    let told = story::tell(out, &stage).await;
    stage.clear().await?;
    told
}

/// The sandbox and the relay, running.
struct Stage {
    sandbox: Arc<Sandbox>,
    relay_address: std::net::SocketAddr,
    endpoints: [String; 2],
    channel: Channel,
    shutdown: CancellationToken,
    relay: JoinHandle<Result<(), RunError>>,
    sandbox_task: JoinHandle<()>,
    directory: TempDir,
}

impl Stage {
    async fn set() -> Result<Self, DemoError> {
        let shutdown = CancellationToken::new();
        let sandbox = Arc::new(Sandbox::new(SandboxOptions::default()));
        let (non_eu, eu) = (free_port().await?, free_port().await?);
        let endpoints = [
            format!("http://{}/v1/batch", non_eu.local_addr()?),
            format!("http://{}/v1/batch", eu.local_addr()?),
        ];
        let directory = tempfile::Builder::new()
            .prefix("segment-relay-demo-")
            .tempdir()?;
        let relay = Relay::open(configuration(&endpoints, &directory)?).await?;
        let listener = free_port().await?;
        let relay_address = listener.local_addr()?;
        let listeners = vec![(sandbox::Region::NonEu, non_eu), (sandbox::Region::Eu, eu)];
        // The sandbox ends with the process, so that the relay can drain into it.
        let sandbox_run = sandbox::run(listeners, Arc::clone(&sandbox), CancellationToken::new());
        let sandbox_task = tokio::spawn(async move {
            let _ = sandbox_run.await;
        });
        let relay = tokio::spawn(relay.run(listener, shutdown.clone()));
        let channel = Channel::from_shared(format!("http://{relay_address}"))
            .map_err(|error| DemoError::Unexpected(error.to_string()))?
            .connect_timeout(Duration::from_secs(5))
            .connect()
            .await?;
        Ok(Self {
            sandbox,
            relay_address,
            endpoints,
            channel,
            shutdown,
            relay,
            sandbox_task,
            directory,
        })
    }

    async fn clear(self) -> Result<(), DemoError> {
        drop(self.channel);
        self.shutdown.cancel();
        let ended = self.relay.await;
        self.sandbox_task.abort();
        self.directory.close()?;
        match ended {
            Ok(ended) => Ok(ended?),
            Err(error) => Err(DemoError::Unexpected(format!(
                "the relay panicked: {error}"
            ))),
        }
    }
}

async fn free_port() -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await
}

fn configuration(endpoints: &[String; 2], directory: &TempDir) -> Result<Config, DemoError> {
    let [non_eu, eu] = endpoints;
    let settings = format!(
        "[delivery]\nretry_base_ms = 50\nretry_max_ms = 200\n\
         [segment.endpoints]\nnon_eu = \"{non_eu}\"\neu = \"{eu}\"\n"
    );
    let outbox = directory.path().join("outbox").into_os_string();
    let key = directory.path().join("key").into_os_string();
    let environment = [
        ("SEGMENT_RELAY__OUTBOX__PATH", outbox),
        ("SEGMENT_RELAY__SECRETS__KEY_FILE", key),
    ];
    let outside = Outside {
        validate: &|_| Vec::new(),
        read_key_file: &|_| Err(std::io::ErrorKind::NotFound.into()),
    };
    Ok(Config::load(
        Some(("demo", &settings)),
        environment,
        &outside,
    )?)
}
