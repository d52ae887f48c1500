//! The embedded outbox: a journal that is synced before anything is acknowledged,
//! and a SQLite database in WAL mode that takes over what stands in it.
//!
//! # How it works
//! - `committer` takes all submissions and settlements that have arrived, up to a
//!   bound, and appends them to the journal with one sync (group commit). Then they
//!   are in the `overlay`, callers are answered, and signals given. If the sync fails,
//!   all of them fail, and the journal is written anew before it is used again.
//! - Once a second, or when a segment of the journal is full, the newest states of
//!   all captures in the overlay go into the database in one transaction (a flush).
//!   The segment is free then. So a capture that is delivered at once goes into the
//!   database as one small row, and its payload never does.
//! - Whoever looks for a capture looks into the overlay first, then into the database. A
//!   new one is not looked for: a `filter` in memory knows that it is new.
//! - All else is done by `writer` in the database; what touches captures that may be
//!   in the overlay is done alone, after a flush.
//! - At a start the journal is read, and put into the database.
//!
//! # The database
//! `capture` holds one row for each capture, with its status, for as long as its id
//! is remembered; `queue` one row with both payloads for as long as an event waits;
//! `dead_letter` the payloads of events that were given up; `lane` counts what waits.
//! `capture_key` finds a capture by its id; new ones are found in memory (`recent`), for which
//! `id_run` keeps them.
//!
//! # Files
//! `relay.db` with its `-wal` and `-shm`, `relay.journal-0` to `-2`, and
//! `relay.lock`, which the relay holds locked: a second one on the same directory is
//! refused.

mod admission;
mod calls;
mod check;
mod committer;
mod entry;
mod exclusive;
pub(super) mod export;
mod filter;
mod fresh;
mod hidden;
mod journal;
mod keys;
mod lookup;
mod open;
mod overlay;
mod priority;
mod read_command;
mod read_queue;
mod reader;
mod recent;
mod row;
mod schema;
mod selection;
mod subjects;
mod tally;
mod writer;

use std::{
    fs::File,
    path::PathBuf,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};

use super::{
    FoundSubject, LaneKey, LeaseBudget, LeaseScope, LeasedCapture, Limits, Outbox, OutboxError,
    Selection, Signals, SubjectQuery, sealing::Sealing,
};
use crate::{metrics::Metrics, vault::Vault};

pub use check::{CheckError, CheckReport, Damage, accept_damage, check};
use committer::Command;
use exclusive::{Exclusive, FlushPace};
pub use export::ExportError;
use hidden::Hidden;
pub use journal::JournalError;
pub use keys::KeyError;
use overlay::Shared;
use read_command::ReadCommand;
use read_queue::ReadSender;
use selection::{Found, Walk, Want};
use subjects::SubjectScan;
use writer::WriteCommand;

/// Commands that wait for the committer or the writer; a full queue makes callers wait.
const WRITE_QUEUE: usize = 4_096;
/// Captures of one person that a search finds at the most.
const MAX_FOUND: usize = 100_000;
/// Commands of one rank that wait for the reader.
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
    /// The journal can't be opened.
    #[error("the outbox in {path} cannot be opened: {source}{}", remedy(source))]
    Journal {
        /// The configured directory.
        path: PathBuf,
        /// Why.
        source: JournalError,
    },
    /// The database failed.
    #[error("the outbox in {path} cannot be opened: {source}")]
    Database {
        /// The configured directory.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
}

/// What to do about it.
fn remedy(error: &JournalError) -> &'static str {
    match error {
        JournalError::Damaged(_) | JournalError::Missing(_) => {
            ". `segment-relay outbox check` says more; restore the directory from a backup, or \
             accept the loss with `segment-relay outbox check --accept-damage`"
        }
        JournalError::Io(_) | JournalError::NoDatabase(_) => "",
    }
}

/// The embedded outbox. See the module's description.
#[derive(Debug)]
pub struct SqliteOutbox {
    committer: mpsc::Sender<Command>,
    writer: mpsc::Sender<WriteCommand>,
    reader: ReadSender,
    exclusive: Exclusive,
    flushes: FlushPace,
    signals: Arc<Signals>,
    sealing: Arc<Sealing>,
    shared: Arc<Shared>,
    limits: Limits,
    hidden: Hidden,
    open: Mutex<Option<OpenFiles>>,
}

#[derive(Debug)]
struct OpenFiles {
    committer: JoinHandle<()>,
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
        open::open(options, vault)
    }

    /// Forgets captures that are older than configured, and gives free space
    /// back to the disk: a bounded piece of work, to be called now and then.
    /// Returns whether there is more to do. With the last piece delivery looks into all
    /// lanes in which something waits, should one have been forgotten.
    ///
    /// # Errors
    /// [`OutboxError`]; it may work at the next call.
    pub async fn maintain(&self) -> Result<bool, OutboxError> {
        let maintain = |reply| WriteCommand::Maintain { reply };
        let more = if self.signals.is_writable() && !self.shared.is_rekeying() {
            self.write(maintain).await?
        } else {
            self.alone(maintain).await?
        };
        if !more {
            self.signals.wake_lanes(self.waiting_lanes().await?);
        }
        Ok(more)
    }

    /// Waits until all that has been acknowledged is in the database.
    async fn flush(&self) -> Result<(), OutboxError> {
        self.commit(|reply| Command::Flush { whole: true, reply })
            .await
    }

    /// Goes through all that was accepted, piece by piece, so that leases are
    /// answered in between.
    async fn scan_subjects(&self, query: SubjectQuery) -> Result<FoundSubject, OutboxError> {
        self.flushes.wait().await;
        self.flush().await?;
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

    async fn commit<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, OutboxError>>) -> Command,
    ) -> Result<T, OutboxError> {
        ask(&self.committer, command).await
    }

    async fn lease_once(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
        scope: LeaseScope,
    ) -> Result<Vec<LeasedCapture>, OutboxError> {
        let lane = lane.clone();
        let scope = scope.map(|user| self.sealing.subject(user));
        let fresh = self.shared.lock().fresh(&lane, budget, &scope);
        let mut leased = if fresh.stored_wait || self.committer.is_closed() {
            let command = move |reply| ReadCommand::Lease {
                lane,
                budget,
                scope,
                reply,
            };
            self.read(command).await?
        } else {
            let captures = fresh.captures.iter();
            captures.map(|entry| entry.leased(budget)).collect()
        };
        for capture in &mut leased {
            self.sealing.leased(capture)?;
        }
        Ok(leased)
    }

    /// Done while nothing is accepted or settled.
    async fn alone<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, OutboxError>>) -> WriteCommand,
    ) -> Result<T, OutboxError> {
        ask(&self.committer, |reply| Command::Alone(command(reply))).await
    }

    async fn write<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, OutboxError>>) -> WriteCommand,
    ) -> Result<T, OutboxError> {
        ask(&self.writer, command).await
    }

    async fn read<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, OutboxError>>) -> ReadCommand,
    ) -> Result<T, OutboxError> {
        let (reply, answer) = oneshot::channel();
        self.reader.send(command(reply)).await?;
        answer.await.unwrap_or(Err(OutboxError::Closed))
    }

    /// What is wanted of the selected dead letters after an id, piece by piece.
    async fn walk(
        &self,
        selection: &Arc<Selection>,
        after: i64,
        want: Want,
    ) -> Result<Found, OutboxError> {
        let names = selection.integrations();
        if self.shared.lock().has_dead_letters(names) {
            self.flushes.wait().await;
            self.flush().await?;
        }
        let mut found = Found::default();
        let mut rest = Some(Walk::new(Arc::clone(selection), after));
        while let Some(walk) = rest.filter(|_| !found.is_enough(want)) {
            let command = move |reply| ReadCommand::DeadLetters { walk, want, reply };
            let piece = self.read(command).await?;
            found.append(piece.found);
            rest = piece.rest;
        }
        Ok(found)
    }
}

async fn ask<C, T>(
    thread: &mpsc::Sender<C>,
    command: impl FnOnce(oneshot::Sender<Result<T, OutboxError>>) -> C,
) -> Result<T, OutboxError> {
    let (reply, answer) = oneshot::channel();
    thread
        .send(command(reply))
        .await
        .map_err(|_| OutboxError::Closed)?;
    answer.await.unwrap_or(Err(OutboxError::Closed))
}

async fn join(thread: JoinHandle<()>) {
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    if !matches!(joined, Ok(Ok(()))) {
        tracing::error!("a thread of the outbox panicked");
    }
}

#[cfg(test)]
mod tests;
