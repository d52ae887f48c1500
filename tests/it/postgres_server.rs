//! Real PostgreSQL servers on loopback. Shared by the crate's own tests and by these.
//!
//! One server serves all tests of a process, each in a database of its own. A test that
//! kills, stops or restarts a server starts its own. A small shell process watches each
//! server: its standard input is a pipe from the test process, and at the end of that pipe
//! it ends the server and removes its directory. So no server outlives the test process,
//! however that process ends.

use std::{
    io::Write,
    net::TcpListener,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

// Named by its path, since this file is a module of two crates.
#[path = "postgres_server/programs.rs"]
mod programs;
use programs::{as_server_user, programs, unprivileged};

/// Longest wait for a server to start or to end.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval at which readiness is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Arguments: the server's directory and its command. Starts the server at each line of its
/// standard input; at the end of it stops the server with SIGQUIT (no checkpoint).
/// `FILE_LIMIT`: no file grows beyond this number of KiB, as on a full disk.
const WATCHER: &str = r#"
trap '' INT TERM HUP
[ -z "$FILE_LIMIT" ] || ulimit -f $((FILE_LIMIT * 2))
directory=$1
shift
while read -r _; do "$@" </dev/null & done
pid=$(head -n 1 "$directory/data/postmaster.pid" 2>/dev/null) &&
  kill -CONT "$pid" && kill -QUIT "$pid"
wait
rm -rf "$directory"
"#;

/// One server with its data in a directory of its own.
struct Instance {
    programs: &'static Path,
    directory: PathBuf,
    port: u16,
    watcher: Child,
}

impl Instance {
    fn create(programs: &'static Path, settings: &[(&str, &str)]) -> Self {
        Self::with_data(programs, settings, "", |directory| {
            initialize(programs, directory)
        })
    }

    /// A server whose data `fill` puts into its directory. `file_limit`: KiB, or empty.
    fn with_data(
        programs: &'static Path,
        settings: &[(&str, &str)],
        file_limit: &str,
        fill: impl FnOnce(&Path),
    ) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("segment-relay-pg-")
            .tempdir();
        let directory = directory.expect("a directory");
        if let Some((uid, gid)) = unprivileged() {
            chown(directory.path(), Some(uid), Some(gid)).expect("the server's directory");
        }
        let private = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(directory.path(), private).expect("a private directory");
        fill(directory.path());
        let port = free_port();
        let mut instance = Self {
            watcher: watch(
                programs,
                directory.path(),
                &arguments(port, settings),
                file_limit,
            ),
            programs,
            // From here on the watcher removes it.
            directory: directory.keep(),
            port,
        };
        instance.run();
        instance
    }

    /// A standby of this server that streams from it.
    fn standby(&self, settings: &[(&str, &str)]) -> Self {
        Self::with_data(self.programs, settings, "", |directory| {
            let output = as_server_user(&self.programs.join("pg_basebackup"))
                .args([
                    "--write-recovery-conf",
                    "--checkpoint=fast",
                    "--no-sync",
                    "--dbname",
                ])
                .arg(format!("{}?application_name=standby", self.url("postgres")))
                .arg("--pgdata")
                .arg(directory.join("data"))
                .current_dir(directory)
                .output()
                .expect("pg_basebackup runs");
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "pg_basebackup: {error}");
        })
    }

    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Starts the server and waits until it takes connections.
    fn run(&mut self) {
        let stdin = self.watcher.stdin.as_mut().expect("piped");
        stdin.write_all(b"start\n").expect("the watcher reads");
        self.wait_until(|instance| {
            instance
                .pid_file()
                .is_some_and(|(_, state)| state == "ready")
        });
    }

    /// The postmaster, and its state in its own words.
    fn pid_file(&self) -> Option<(Pid, String)> {
        let text = std::fs::read_to_string(self.data().join("postmaster.pid")).ok()?;
        let mut lines = text.lines();
        let pid = Pid::from_raw(lines.next()?.trim().parse().ok()?)?;
        Some((pid, lines.nth(6)?.trim().to_owned()))
    }

    /// The postmaster, then its children.
    fn processes(&self) -> Vec<Pid> {
        let Some((postmaster, _)) = self.pid_file() else {
            return Vec::new();
        };
        let raw = postmaster.as_raw_nonzero();
        let children = std::fs::read_to_string(format!("/proc/{raw}/task/{raw}/children"));
        let children = children.unwrap_or_default();
        let children = children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok());
        std::iter::once(postmaster)
            .chain(children.filter_map(Pid::from_raw))
            .collect()
    }

    fn signal(&self, signal: Signal) {
        for process in self.processes() {
            let _ = kill_process(process, signal);
        }
    }

    #[allow(
        clippy::disallowed_methods,
        reason = "there is nothing but a file to wait on"
    )]
    fn wait_until(&mut self, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + START_TIMEOUT;
        while !done(self) {
            let runs = matches!(self.watcher.try_wait(), Ok(None));
            assert!(runs, "the watcher of PostgreSQL has ended: {}", self.log());
            let late = Instant::now() > deadline;
            assert!(!late, "PostgreSQL is not ready: {}", self.log());
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// SIGKILL for all its processes: neither a checkpoint nor a flush.
    fn kill9(&mut self) {
        let processes = self.processes();
        for process in &processes {
            let _ = kill_process(*process, Signal::KILL);
        }
        self.wait_until(|_| processes.iter().all(has_ended));
        let _ = std::fs::remove_file(self.data().join("postmaster.pid"));
    }

    fn url(&self, database: &str) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/{database}", self.port)
    }

    fn execute(&self, statement: &str) -> Result<(), String> {
        let output = Command::new(self.programs.join("psql"))
            .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d"])
            .arg(self.url("postgres"))
            .args(["-c", statement])
            .stdin(Stdio::null())
            .output()
            .expect("psql runs");
        let error = || String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(()).ok_or_else(error)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
        drop(self.watcher.stdin.take());
        let _ = self.watcher.wait();
    }
}

fn initialize(programs: &Path, directory: &Path) {
    let output = as_server_user(&programs.join("initdb"))
        .args(["--username=postgres", "--auth=trust", "--encoding=UTF8"])
        .args(["--no-locale", "--no-sync", "--no-instructions", "--pgdata"])
        .arg(directory.join("data"))
        .current_dir(directory)
        .output()
        .expect("initdb runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "initdb: {error}");
}

fn arguments(port: u16, settings: &[(&str, &str)]) -> Vec<String> {
    let port = port.to_string();
    let defaults = [
        ("port", port.as_str()),
        ("listen_addresses", "127.0.0.1"),
        ("unix_socket_directories", ""),
        ("max_connections", "300"),
        ("jit", "off"),
        ("timezone", "UTC"),
        ("log_timezone", "UTC"),
    ];
    let settings = defaults.iter().chain(settings);
    settings
        .flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")])
        .collect()
}

/// Starts the watcher, in a process group that a Ctrl-C does not reach.
fn watch(programs: &Path, directory: &Path, arguments: &[String], file_limit: &str) -> Child {
    let server = as_server_user(&programs.join("postgres"));
    let log = std::fs::File::create(directory.join("log")).expect("a log");
    Command::new("sh")
        .args(["-c", WATCHER, "watch-postgres"])
        .arg(directory)
        .arg(server.get_program())
        .args(server.get_args())
        .arg("-D")
        .arg(directory.join("data"))
        .args(arguments)
        .current_dir(directory)
        .env("FILE_LIMIT", file_limit)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0)
        .spawn()
        .expect("sh runs")
}

/// Whether a process is gone, or only waits for its parent to notice.
fn has_ended(pid: &Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    let zombie = |stat: String| {
        let state = stat.rsplit(')').next().map(str::trim_start);
        state.is_some_and(|state| state.starts_with('Z'))
    };
    stat.map_or(true, zombie)
}

/// The server of this process. A static is never dropped: its watcher ends it.
fn shared() -> Option<&'static Instance> {
    static SERVER: OnceLock<Instance> = OnceLock::new();
    let programs = programs()?;
    Some(SERVER.get_or_init(|| Instance::create(programs, &[])))
}

/// An empty database of this process's server; `None` where there is no PostgreSQL.
pub(crate) fn database() -> Option<Database> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let server = shared()?;
    let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let created = server.execute(&format!("CREATE DATABASE {name}"));
    created.expect("a database");
    Some(Database { name })
}

/// An empty database; removed at the end, also with connections open.
pub(crate) struct Database {
    name: String,
}

impl Database {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn url(&self) -> String {
        shared().expect("a server").url(&self.name)
    }
}

impl Database {
    /// The directory of its server, with the data of all databases.
    pub(crate) fn directory(&self) -> &Path {
        &shared().expect("a server").directory
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if let Some(server) = shared() {
            let statement = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
            let _ = server.execute(&statement);
        }
    }
}

/// Starts servers for single tests.
pub(crate) struct Server;

impl Server {
    /// A server with these settings besides the usual ones; `None` where there is no PostgreSQL.
    pub(crate) fn start_own(settings: &[(&str, &str)]) -> Option<OwnServer> {
        let instance = Instance::create(programs()?, settings);
        instance
            .execute("CREATE DATABASE relay")
            .expect("a database");
        Some(OwnServer(instance))
    }

    /// A server of which no file grows beyond this number of KiB: for tables a full disk. It
    /// is more than a segment of the WAL (16 MiB).
    pub(crate) fn start_with_little_room(file_limit: &str) -> Option<OwnServer> {
        let programs = programs()?;
        let fill = |directory: &Path| initialize(programs, directory);
        let instance = Instance::with_data(programs, &[], file_limit, fill);
        instance
            .execute("CREATE DATABASE relay")
            .expect("a database");
        Some(OwnServer(instance))
    }
}

/// A server that one test may kill, pause and restart; ended when it is dropped.
pub(crate) struct OwnServer(Instance);

impl OwnServer {
    /// The URL of its database `relay`.
    pub(crate) fn url(&self) -> String {
        self.0.url("relay")
    }

    pub(crate) fn port(&self) -> u16 {
        self.0.port
    }

    /// Holds its data and its log.
    pub(crate) fn directory(&self) -> &Path {
        &self.0.directory
    }

    /// Its processes: the postmaster first.
    pub(crate) fn processes(&self) -> Vec<Pid> {
        self.0.processes()
    }

    /// Runs a statement in the database `postgres`.
    pub(crate) fn execute(&self, statement: &str) {
        self.0.execute(statement).expect("done");
    }

    /// A standby of this server, with these settings besides the usual ones.
    pub(crate) fn standby(&self, settings: &[(&str, &str)]) -> Self {
        Self(self.0.standby(settings))
    }

    /// Makes the standbys synchronous: commits wait for one.
    pub(crate) fn require_standby(&self) {
        self.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'");
        self.execute("SELECT pg_reload_conf()");
    }

    /// Ends all its processes with SIGKILL.
    pub(crate) fn kill9(&mut self) {
        self.0.kill9();
    }

    /// Starts it after a kill, with the same data and port.
    pub(crate) fn start_again(&mut self) {
        self.0.run();
    }

    /// Stops all its processes with SIGSTOP: connections stay open, nothing is answered.
    pub(crate) fn pause(&self) {
        self.0.signal(Signal::STOP);
    }

    pub(crate) fn resume(&self) {
        self.0.signal(Signal::CONT);
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("bound").port()
}
