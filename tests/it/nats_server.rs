//! A real nats-server on loopback, with its data in a directory of its own. Shared by the
//! crate's own tests and by these.

use std::{
    io::Write,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Once,
    time::{Duration, Instant},
};

/// Longest wait for a server to listen.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// The program: named by `SEGMENT_RELAY_NATS_SERVER`, or in the target folder, where `tests/run`
/// puts it. Without it the tests that need it are not run, and say so; where
/// `SEGMENT_RELAY_NEEDS_NATS` is set they fail.
pub(crate) fn program() -> Option<PathBuf> {
    static SAID: Once = Once::new();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target"),
        PathBuf::from,
    );
    let named = std::env::var_os("SEGMENT_RELAY_NATS_SERVER").map(PathBuf::from);
    let program = named.unwrap_or_else(|| target.join("python/bin/nats-server"));
    if program.exists() {
        return Some(program);
    }
    assert!(
        std::env::var_os("SEGMENT_RELAY_NEEDS_NATS").is_none(),
        "nats-server is missing: {}",
        program.display()
    );
    SAID.call_once(|| {
        let _ = writeln!(
            std::io::stderr(),
            "NOT RUN: tests with NATS JetStream, since there is no {}; `bash tests/run` installs it",
            program.display()
        );
    });
    None
}

/// One server; killed at the end.
pub(crate) struct Server {
    program: PathBuf,
    child: Option<Child>,
    directory: tempfile::TempDir,
    arguments: Vec<String>,
    pub(crate) port: u16,
}

impl Server {
    /// A server with JetStream that stands alone; `None` where there is no program.
    pub(crate) fn start() -> Option<Self> {
        Self::start_with(&["--jetstream"])
    }

    /// A server with other arguments.
    pub(crate) fn start_with(arguments: &[&str]) -> Option<Self> {
        Some(Self::start_program(program()?, arguments))
    }

    /// A server of another program.
    pub(crate) fn start_program(program: PathBuf, arguments: &[&str]) -> Self {
        let mut server = Self {
            program,
            child: None,
            directory: tempfile::tempdir().expect("a directory"),
            arguments: arguments.iter().map(|one| (*one).to_owned()).collect(),
            port: free_port(),
        };
        server.run();
        server
    }

    /// Several servers that know each other.
    pub(crate) fn cluster(count: usize) -> Option<Vec<Self>> {
        let program = program()?;
        let ports = free_ports(2 * count);
        let (routes, clients) = ports.split_at(count);
        let all = routes.iter().map(|port| format!("nats://127.0.0.1:{port}"));
        let all = all.collect::<Vec<_>>().join(",");
        let mut servers: Vec<Self> = routes
            .iter()
            .zip(clients)
            .enumerate()
            .map(|(index, (route, client))| Self {
                program: program.clone(),
                child: None,
                directory: tempfile::tempdir().expect("a directory"),
                arguments: vec![
                    "--jetstream".to_owned(),
                    "--server_name".to_owned(),
                    format!("n{index}"),
                    "--cluster_name".to_owned(),
                    "test".to_owned(),
                    "--cluster".to_owned(),
                    format!("nats://127.0.0.1:{route}"),
                    "--no_advertise=true".to_owned(),
                    "--routes".to_owned(),
                    all.clone(),
                ],
                port: *client,
            })
            .collect();
        for server in &mut servers {
            server.run();
        }
        Some(servers)
    }

    /// Starts it, again after a kill.
    #[allow(
        clippy::disallowed_methods,
        reason = "there is nothing but the port to wait on"
    )]
    pub(crate) fn run(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join("log"))
            .expect("a log");
        let child = Command::new(&self.program)
            .args(["--addr", "127.0.0.1", "--port", &self.port.to_string()])
            .arg("--store_dir")
            .arg(self.directory.path())
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("starts");
        self.child = Some(child);
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let ended = self.child.as_mut().map(Child::try_wait);
            let log = || std::fs::read_to_string(self.directory.path().join("log"));
            assert!(
                matches!(ended, Some(Ok(None))),
                "nats-server has ended: {}",
                log().unwrap_or_default()
            );
            assert!(Instant::now() < deadline, "nats-server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it as a power loss would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Where its streams are.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its process, while it runs.
    #[allow(dead_code, reason = "for the benchmark")]
    pub(crate) fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn free_port() -> u16 {
    free_ports(1)[0]
}

/// Ports of which no two are the same.
fn free_ports(count: usize) -> Vec<u16> {
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").expect("a port"))
        .collect();
    let port = |listener: &TcpListener| listener.local_addr().expect("bound").port();
    listeners.iter().map(port).collect()
}
