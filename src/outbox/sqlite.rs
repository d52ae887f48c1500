//! The embedded outbox: one SQLite database in WAL mode with
//! `synchronous=FULL`, one thread that writes and one that reads.
//!
//! # How it works
//! - The writer takes all commands that have arrived, up to a bound, into one
//!   transaction: they share one fsync (group commit). Callers are answered,
//!   and signals given, after the commit; if it fails, all of them fail and
//!   none has left anything behind.
//! - `capture` holds one row for each capture, with its status, for as long as
//!   its id is remembered; `queue` one row with both payloads for as long as an
//!   event waits; `dead_letter` the payloads of events that were given up.
//!   A delivered payload is deleted in the transaction that settles it.
//! - `lane` counts what waits, so that bounds are known at once after a start.
//!
//! # Files
//! `relay.db` with its `-wal` and `-shm`, and `relay.lock`, which the relay
//! holds locked: a second one on the same directory is refused.

mod calls;
pub(super) mod export;
mod keys;
mod reader;
mod row;
mod schema;
mod selection;
mod subjects;
mod writer;

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};

use super::{FoundSubject, Limits, OutboxError, Signals, SubjectQuery, sealing::Sealing};
use crate::{metrics::Metrics, vault::Vault};

pub use export::ExportError;
pub use keys::KeyError;
use reader::ReadCommand;
use subjects::SubjectScan;
use writer::{WriteCommand, Writer};

/// Commands that wait for the writer; a full queue makes callers wait.
const WRITE_QUEUE: usize = 4_096;
/// Captures of one person that a search finds at the most.
const MAX_FOUND: usize = 100_000;
/// Commands that wait for the reader.
const READ_QUEUE: usize = 1_024;

/// How the embedded outbox works.
#[derive(Clone, Debug)]
pub struct SqliteOptions {
    /// Directory of the files; made where it is missing.
    pub directory: PathBuf,
    /// Bounds of what may wait.
    pub limits: Limits,
    /// Captures that share one commit, at the most.
    pub group_commit_max: usize,
    /// How long the id and the status of a capture are remembered.
    pub remember: Duration,
    /// Whether payloads are stored encrypted. Write keys always are.
    pub encrypt_payloads: bool,
    /// Counts and times commits.
    pub metrics: Metrics,
}

/// Why the outbox can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory can't be made or written.
    #[error("[outbox] path {path}: {source}")]
    Directory {
        /// The configured directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another relay has it open.
    #[error("[outbox] path {0}: another segment-relay uses this directory; give each its own")]
    Locked(PathBuf),
    /// It was written by a version that this one does not know.
    #[error(
        "[outbox] path {path}: format version {found}, but this segment-relay knows {known}; \
         run the version that wrote it"
    )]
    Version {
        /// The configured directory.
        path: PathBuf,
        /// What the file says.
        found: i64,
        /// What this version writes.
        known: i64,
    },
    /// The keys of what is stored are not all there.
    #[error("[outbox] path {path}: {source}")]
    Keys {
        /// The configured directory.
        path: PathBuf,
        /// What is wrong.
        source: KeyError,
    },
    /// The file is not a database of the relay.
    #[error("{0} is not an outbox of segment-relay; move it away")]
    Foreign(PathBuf),
    /// The database failed.
    #[error("the outbox in {path} cannot be opened: {source}")]
    Database {
        /// The configured directory.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
}

/// The embedded outbox. See the module's description.
#[derive(Debug)]
pub struct SqliteOutbox {
    writer: mpsc::Sender<WriteCommand>,
    reader: mpsc::Sender<ReadCommand>,
    signals: Arc<Signals>,
    sealing: Arc<Sealing>,
    open: Mutex<Option<OpenFiles>>,
}

#[derive(Debug)]
struct OpenFiles {
    writer: JoinHandle<()>,
    reader: JoinHandle<()>,
    _lock: File,
}

impl SqliteOutbox {
    /// Opens the outbox, making what is missing.
    ///
    /// # Errors
    /// [`OpenError`]; nothing of an existing outbox has been changed then.
    pub fn open(options: &SqliteOptions, vault: &Arc<Vault>) -> Result<Self, OpenError> {
        let lock = lock_directory(&options.directory)?;
        let database = options.directory.join("relay.db");
        let mut write = schema::open_for_writing(&options.directory, &database)?;
        let prepared =
            keys::prepare(&mut write, vault, options.encrypt_payloads).map_err(|source| {
                OpenError::Keys {
                    path: options.directory.clone(),
                    source,
                }
            })?;
        let failed = |source| OpenError::Database {
            path: options.directory.clone(),
            source,
        };
        let read = schema::open_for_reading(&database).map_err(failed)?;

        let signals = Arc::new(Signals::default());
        let writer =
            Writer::new(write, options, &prepared, Arc::clone(&signals)).map_err(failed)?;
        let (write_sender, write_receiver) = mpsc::channel(WRITE_QUEUE);
        let (read_sender, read_receiver) = mpsc::channel(READ_QUEUE);
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(run)
                .map_err(|source| OpenError::Directory {
                    path: options.directory.clone(),
                    source,
                })
        };
        let files = OpenFiles {
            writer: spawn(
                "outbox-writer",
                Box::new(move || writer.run(write_receiver)),
            )?,
            reader: spawn(
                "outbox-reader",
                Box::new(move || reader::run(read, read_receiver)),
            )?,
            _lock: lock,
        };
        Ok(Self {
            writer: write_sender,
            reader: read_sender,
            signals,
            sealing: prepared.sealing,
            open: Mutex::new(Some(files)),
        })
    }

    /// Forgets captures that are older than configured, and gives free space
    /// back to the disk: a bounded piece of work, to be called now and then.
    /// Returns whether there is more to do.
    ///
    /// # Errors
    /// [`OutboxError`]; it may work at the next call.
    pub async fn maintain(&self) -> Result<bool, OutboxError> {
        self.write(|reply| WriteCommand::Maintain { reply }).await
    }

    /// Goes through all that was accepted, piece by piece, so that leases are
    /// answered in between.
    async fn scan_subjects(&self, query: SubjectQuery) -> Result<FoundSubject, OutboxError> {
        let ids = query.user_ids.iter();
        let mut scan = SubjectScan {
            subjects: ids.map(|id| self.sealing.subject(id)).collect(),
            query,
            after: 0,
        };
        let mut all = FoundSubject::default();
        while all.captures.len() < MAX_FOUND {
            let piece = scan.clone();
            let scanned = self
                .read(move |reply| ReadCommand::ScanSubjects { scan: piece, reply })
                .await?;
            for (sequence, lane) in scanned.found {
                all.captures.push(sequence);
                all.lanes.extend(lane);
            }
            let Some(next) = scanned.next else { break };
            scan.after = next;
        }
        all.captures.truncate(MAX_FOUND);
        all.lanes.sort_unstable();
        all.lanes.dedup();
        Ok(all)
    }

    async fn write<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, OutboxError>>) -> WriteCommand,
    ) -> Result<T, OutboxError> {
        let (reply, answer) = oneshot::channel();
        self.writer
            .send(command(reply))
            .await
            .map_err(|_| OutboxError::Closed)?;
        answer.await.unwrap_or(Err(OutboxError::Closed))
    }

    async fn read<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, OutboxError>>) -> ReadCommand,
    ) -> Result<T, OutboxError> {
        let (reply, answer) = oneshot::channel();
        self.reader
            .send(command(reply))
            .await
            .map_err(|_| OutboxError::Closed)?;
        answer.await.unwrap_or(Err(OutboxError::Closed))
    }
}

fn lock_directory(directory: &Path) -> Result<File, OpenError> {
    let failed = |source| OpenError::Directory {
        path: directory.to_owned(),
        source,
    };
    make_private_directory(directory).map_err(failed)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(directory.join("relay.lock"))
        .map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked(directory.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Write keys and addresses are in there, so it is for the relay's user alone.
fn make_private_directory(directory: &Path) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)
}

async fn join(thread: JoinHandle<()>) {
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    if !matches!(joined, Ok(Ok(()))) {
        tracing::error!("a thread of the outbox panicked");
    }
}

#[cfg(test)]
mod tests;
