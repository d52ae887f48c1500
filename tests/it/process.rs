//! The relay as a process of its own, and a sandbox that outlives it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use rustix::process::{Signal, WaitId, WaitIdOptions};
use segment_relay::sandbox::{self, Sandbox, SandboxOptions};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::{
    collector::Collector,
    command::first_line,
    scan::{self, Written},
};

/// A sandbox that keeps everything, with the URLs of its two endpoints.
pub(crate) async fn lasting_sandbox() -> (Arc<Sandbox>, [String; 2]) {
    let options = SandboxOptions {
        keep_entries: 1_000_000,
        ..SandboxOptions::default()
    };
    let sandbox = Arc::new(Sandbox::new(options));
    let (non_eu, eu) = (listener().await, listener().await);
    let urls = [&non_eu, &eu]
        .map(|one| format!("http://{}/v1/batch", one.local_addr().expect("an address")));
    let listeners = vec![(sandbox::Region::NonEu, non_eu), (sandbox::Region::Eu, eu)];
    tokio::spawn(sandbox::run(
        listeners,
        Arc::clone(&sandbox),
        CancellationToken::new(),
    ));
    (sandbox, urls)
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port")
}

/// `segment-relay serve`, killed when it is dropped.
pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) address: String,
    pub(crate) channel: Channel,
    pub(crate) log: Written,
}

impl Process {
    pub(crate) async fn start(outbox: &Path, urls: &[String; 2]) -> Self {
        Self::start_with(outbox, urls, &[]).await
    }

    /// Starts it with a configuration file, which has its log's filter.
    pub(crate) async fn start_configured(outbox: &Path, urls: &[String; 2], file: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
        command.arg("serve").arg("--config").arg(file);
        Self::run(command, outbox, urls, &[]).await
    }

    /// Starts it with so many file descriptors at the most.
    pub(crate) async fn start_limited(outbox: &Path, urls: &[String; 2], limit: u32) -> Self {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("ulimit -n {limit} && exec \"$0\" serve"))
            .arg(env!("CARGO_BIN_EXE_segment-relay"))
            .env("SEGMENT_RELAY__LOG__FILTER", "trace");
        Self::run(command, outbox, urls, &[]).await
    }

    /// Starts it on a Unix socket.
    pub(crate) async fn start_on(outbox: &Path, urls: &[String; 2], address: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
        command.arg("serve");
        let environment = [("SEGMENT_RELAY__SERVER__LISTEN", Path::new(address))];
        Self::run(command, outbox, urls, &environment).await
    }

    /// The same with more variables in its environment.
    pub(crate) async fn start_faulty(
        outbox: &Path,
        urls: &[String; 2],
        file: &Path,
        environment: &[(&str, PathBuf)],
    ) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
        command.arg("serve").arg("--config").arg(file);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        Self::run(command, outbox, urls, &[]).await
    }

    /// Starts it with a configuration file and a collector of its own.
    pub(crate) async fn start_against(
        outbox: &Path,
        urls: &[String; 2],
        file: &Path,
        collector: SocketAddr,
    ) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
        command.arg("serve").arg("--config").arg(file);
        let endpoint = PathBuf::from(format!("http://{collector}"));
        let environment = [("SEGMENT_RELAY__OTLP__ENDPOINT", endpoint.as_path())];
        Self::run(command, outbox, urls, &environment).await
    }

    /// Starts it with more variables in its environment.
    pub(crate) async fn start_with(
        outbox: &Path,
        urls: &[String; 2],
        environment: &[(&str, &Path)],
    ) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
        command
            .arg("serve")
            .env("SEGMENT_RELAY__LOG__FILTER", "trace");
        Self::run(command, outbox, urls, environment).await
    }

    async fn run(
        mut command: Command,
        outbox: &Path,
        urls: &[String; 2],
        environment: &[(&str, &Path)],
    ) -> Self {
        let mut child = command
            .env("SEGMENT_RELAY__SERVER__LISTEN", "127.0.0.1:0")
            .env("SEGMENT_RELAY__OUTBOX__PATH", outbox)
            .env(
                "SEGMENT_RELAY__SECRETS__KEY_FILE",
                outbox.with_extension("key"),
            )
            .env("SEGMENT_RELAY__SEGMENT__ENDPOINTS__NON_EU", &urls[0])
            .env("SEGMENT_RELAY__SEGMENT__ENDPOINTS__EU", &urls[1])
            .env("SEGMENT_RELAY__DELIVERY__MAX_EVENTS_PER_SECOND", "1000000")
            .env("SEGMENT_RELAY__DELIVERY__BURST_EVENTS", "1000000")
            .env("SEGMENT_RELAY__DELIVERY__RETRY_BASE_MS", "10")
            .env("SEGMENT_RELAY__DELIVERY__RETRY_MAX_MS", "50")
            .env(
                "SEGMENT_RELAY__OTLP__ENDPOINT",
                format!("http://{}", Collector::for_all()),
            )
            .env("SEGMENT_RELAY__TRACES__SAMPLE_RATIO", "1")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let log = scan::of_process(child.stderr.take().expect("piped"));
        let (line, child) = tokio::task::spawn_blocking(move || (first_line(&mut child), child))
            .await
            .expect("read");
        let address = line
            .trim()
            .rsplit(' ')
            .next()
            .expect("an address")
            .to_owned();
        let url = match address.strip_prefix("unix:") {
            Some(path) => format!("unix:{path}"),
            None => format!("http://{address}"),
        };
        let channel = Endpoint::try_from(url).expect("a URL");
        Self {
            child,
            address,
            channel: channel.connect().await.expect("connects"),
            log,
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("signalled");
    }

    /// SIGTERM, and waits for the end of the drain.
    pub(crate) async fn terminate(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        self.signal(Signal::TERM);
        let ended = tokio::task::spawn_blocking(move || {
            // Leaves the status to `wait`.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            rustix::process::waitid(WaitId::Pid(pid), options)
        });
        ended.await.expect("no panic").expect("it ends");
        let status = self.child.wait().expect("its status");
        assert!(status.success(), "{status}");
    }

    /// SIGKILL: no drain, no flush.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
