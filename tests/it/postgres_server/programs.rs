//! Where PostgreSQL's programs are, and as whom they run.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::{Once, OnceLock},
};

/// The oldest version that the outbox supports.
const MINIMUM_VERSION: u32 = 14;
/// Unprivileged users for the server where the tests run as root.
const USERS: [&str; 2] = ["postgres", "nobody"];

/// The folder of PostgreSQL's programs, or `None` where the tests cannot run. Panics
/// instead where `SEGMENT_RELAY_NEEDS_POSTGRES` is set.
pub(crate) fn programs() -> Option<&'static Path> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    static SAID: Once = Once::new();
    match FOUND.get_or_init(find_programs) {
        Ok(path) => Some(path),
        Err(missing) => {
            assert!(
                std::env::var_os("SEGMENT_RELAY_NEEDS_POSTGRES").is_none(),
                "{missing}"
            );
            SAID.call_once(|| {
                let _ = writeln!(
                    std::io::stderr(),
                    "NOT RUN: tests with PostgreSQL: {missing}; `bash tests/run` installs it"
                );
            });
            None
        }
    }
}

/// `SEGMENT_RELAY_POSTGRES_BIN`, Debian's folder of the newest version, or the `PATH`.
fn find_programs() -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os("SEGMENT_RELAY_POSTGRES_BIN") {
        return checked(PathBuf::from(named));
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let mut folders: Vec<(u32, PathBuf)> = versions
        .filter_map(Result::ok)
        .filter_map(|one| {
            let version = one.file_name().to_str()?.parse().ok()?;
            Some((version, one.path().join("bin")))
        })
        .collect();
    folders.sort();
    let debian = folders.into_iter().rev().map(|(_, folder)| folder);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all: Vec<PathBuf> = debian.chain(std::env::split_paths(&path)).collect();
    let found = all.into_iter().find_map(|folder| checked(folder).ok());
    found.ok_or_else(|| {
        format!(
            "no PostgreSQL {MINIMUM_VERSION} or newer in SEGMENT_RELAY_POSTGRES_BIN, \
             /usr/lib/postgresql/*/bin and PATH"
        )
    })
}

/// The folder, if it has all programs and a version that is new enough.
fn checked(folder: PathBuf) -> Result<PathBuf, String> {
    for program in ["postgres", "initdb", "psql"] {
        if !folder.join(program).exists() {
            return Err(format!("no {program} in {}", folder.display()));
        }
    }
    let output = Command::new(folder.join("postgres"))
        .arg("--version")
        .output();
    let output = output.map_err(|error| format!("{}: {error}", folder.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = text.split_whitespace().find_map(|word| {
        let digits = word.split(|one: char| !one.is_ascii_digit()).next()?;
        digits.parse::<u32>().ok()
    });
    match number {
        Some(number) if number >= MINIMUM_VERSION => Ok(folder),
        _ => Err(format!("{text} in {}: too old", folder.display())),
    }
}

/// Uid and gid of the server's user where this process is root, which PostgreSQL refuses.
pub(crate) fn unprivileged() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").expect("/etc/passwd");
    let ids = |name: &str| {
        let line = users
            .lines()
            .find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2).map(|field| field.parse().ok());
        Some((fields.next()??, fields.next()??))
    };
    let found = USERS.iter().find_map(|name| ids(name));
    Some(found.expect("an unprivileged user to run PostgreSQL: postgres or nobody"))
}

/// A command that runs a program as the server's user.
pub(crate) fn as_server_user(program: &Path) -> Command {
    let Some((uid, gid)) = unprivileged() else {
        return Command::new(program);
    };
    let mut command = Command::new("setpriv");
    command
        .arg(format!("--reuid={uid}"))
        .arg(format!("--regid={gid}"))
        .args(["--clear-groups", "--"])
        .arg(program);
    command
}
