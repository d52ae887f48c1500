//! The audit log: who changed what, and who was refused. Never a secret, an
//! address or an answer; of a change only which fields it touched.

use std::{
    fs::File,
    io::Write,
    net::SocketAddr,
    num::NonZeroU32,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde::Serialize;

use crate::time::UnixMillis;

/// Target of audits in the log.
pub const TARGET: &str = "audit";

/// Refusals that are noted in a second and at once; the others are counted.
const REFUSALS: (NonZeroU32, NonZeroU32) =
    (NonZeroU32::new(10).unwrap(), NonZeroU32::new(100).unwrap());

/// Takes notes. Cheap to clone.
#[derive(Clone)]
pub struct Audit(Arc<Inner>);

struct Inner {
    file: Option<Mutex<File>>,
    refusals: DefaultDirectRateLimiter,
    unnoted: AtomicU64,
}

/// One line of the audit log.
#[derive(Debug, Default, Serialize)]
pub struct Entry<'a> {
    /// Who did it; empty where nobody was known.
    pub caller: &'a str,
    /// What was done, e.g. `integration.updated`.
    pub action: &'a str,
    /// To which integration, where it was one.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub integration: &'a str,
    /// What it touched or how much, e.g. `credentials[EU] mappings`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    #[serde(flatten)]
    entry: &'a Entry<'a>,
}

impl Audit {
    /// Notes to the log alone.
    #[must_use]
    pub fn new() -> Self {
        Self::with(None)
    }

    /// Notes to the log and to a file, which is made where it is missing.
    ///
    /// # Errors
    /// The file can't be opened for appending.
    pub fn to_file(path: &Path) -> std::io::Result<Self> {
        let mut options = File::options();
        options.create(true).append(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        Ok(Self::with(Some(options.open(path)?)))
    }

    fn with(file: Option<File>) -> Self {
        let (per_second, burst) = REFUSALS;
        Self(Arc::new(Inner {
            file: file.map(Mutex::new),
            refusals: RateLimiter::direct(Quota::per_second(per_second).allow_burst(burst)),
            unnoted: AtomicU64::new(0),
        }))
    }

    /// Notes what was done.
    pub fn note(&self, entry: &Entry<'_>) {
        tracing::info!(
            target: TARGET,
            caller = entry.caller,
            action = entry.action,
            integration = entry.integration,
            detail = entry.detail,
        );
        let Some(file) = &self.0.file else { return };
        let line = Line {
            time: UnixMillis::now().to_iso(),
            entry,
        };
        let written = serde_json::to_vec(&line)
            .map_err(std::io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                // In one piece, so that lines never mix.
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.write_all(&line)
            });
        if let Err(error) = written {
            tracing::error!(%error, "the audit file cannot be written");
        }
    }

    /// Notes a call that was refused; of a storm only some, with the number of the
    /// others.
    pub fn refused(
        &self,
        caller: Option<&str>,
        address: Option<SocketAddr>,
        rpc: &str,
        reason: &str,
    ) {
        if self.0.refusals.check().is_err() {
            self.0.unnoted.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let address = address.map_or_else(|| "unknown".to_owned(), |ip| ip.to_string());
        // A caller chooses the path.
        let rpc: String = rpc
            .chars()
            .take(128)
            .filter(|c| c.is_ascii_graphic())
            .collect();
        let unnoted = self.0.unnoted.swap(0, Ordering::Relaxed);
        let detail = format!("{reason} {rpc} from {address}, {unnoted} more before");
        self.note(&Entry {
            caller: caller.unwrap_or(""),
            action: "call.refused",
            integration: "",
            detail,
        });
    }
}

impl Default for Audit {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_appended_as_json_lines_and_storms_of_refusals_are_counted() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("audit.jsonl");
        let audit = Audit::to_file(&path).expect("opens");
        audit.note(&Entry {
            caller: "ops",
            action: "integration.deleted",
            integration: "acme",
            detail: String::new(),
        });
        for _ in 0..1_000 {
            audit.refused(None, None, "/a b\n/c", "TOKEN_UNKNOWN");
        }
        let text = std::fs::read_to_string(&path).expect("read");
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        assert_eq!(lines[0]["caller"], "ops");
        assert_eq!(lines[0]["integration"], "acme");
        assert!(lines.len() > 100 && lines.len() < 200, "{}", lines.len());
        assert_eq!(
            lines[1]["detail"],
            "TOKEN_UNKNOWN /ab/c from unknown, 0 more before"
        );
    }
}
