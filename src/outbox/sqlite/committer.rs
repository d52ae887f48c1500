//! The thread that acknowledges: it makes captures and settlements durable in the
//! journal, and has them put into the database later, many at a time.

mod flush;
mod known;
mod owed;
mod pace;
pub(super) mod parked;
mod stage;
mod staged;
mod tell;

use std::{
    sync::{Arc, mpsc as channel},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    SqliteOptions,
    admission::Reservation,
    entry::Key,
    journal::{Journal, record::PROBE},
    lookup::Lookup,
    overlay::Shared,
    tally::Tally,
    writer::{Done, WriteCommand},
};
use crate::{
    metrics::Metrics,
    outbox::{Content, Limits, NewCapture, OutboxError, Settlement, Signals, Submitted},
};

use flush::Flushing;
pub(super) use flush::SEGMENT_BYTES;
use known::Known;
use owed::Owed;
use pace::Pace;
use parked::{Elapsed, Parked};
use staged::Staged;
pub(super) use staged::settled;

type Reply<T> = oneshot::Sender<Result<T, OutboxError>>;

/// How long the thread waits for commands while the database is written.
const BUSY_WAIT: Duration = Duration::from_millis(10);
/// How long it waits while something is to be put into the database.
const CALM_WAIT: Duration = Duration::from_millis(200);

/// What the thread is asked.
#[derive(Debug)]
pub(super) enum Command {
    Submit {
        captures: Vec<Incoming>,
        reservation: Option<Reservation>,
        reply: Reply<Vec<Submitted>>,
    },
    Settle {
        settlement: Arc<Settlement>,
        reply: Reply<()>,
    },
    /// Answered once all that was acknowledged is in the database; or, where not the
    /// `whole` journal is meant, what a full segment would have put there.
    Flush {
        whole: bool,
        reply: Reply<()>,
    },
    /// Done by the writer while nothing is accepted or settled, and all that was is
    /// in the database.
    Alone(WriteCommand),
    Close,
}

/// A capture as it is to be stored.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) key: Key,
    /// With blinded digest and, where that is wanted, sealed payloads.
    pub(super) capture: NewCapture,
    /// Whose data it is, blinded.
    pub(super) subject: Option<i64>,
}

/// Bytes in the journal beside a capture's payloads, and of a settled one: about.
const RECORD_BYTES: usize = 256;

impl Command {
    /// About how many bytes it takes in the journal.
    fn bytes(&self) -> usize {
        match self {
            Self::Submit { captures, .. } => {
                let payloads = captures.iter().map(|one| match &one.capture.content {
                    Content::Send { events, .. } => events.identify.len() + events.track.len(),
                    Content::Skip { .. } => 0,
                });
                payloads.sum::<usize>() + captures.len() * RECORD_BYTES
            }
            Self::Settle { settlement, .. } => settlement.captures.len() * RECORD_BYTES,
            Self::Flush { .. } | Self::Alone(_) | Self::Close => 0,
        }
    }

    /// How much of a group it takes; `None` where it can't be in one.
    fn weight(&self) -> Option<usize> {
        match self {
            Self::Submit { captures, .. } => Some(captures.len()),
            Self::Settle { settlement, .. } => Some(settlement.captures.len()),
            Self::Flush { .. } | Self::Alone(_) | Self::Close => None,
        }
    }
}

/// What the thread works with.
pub(super) struct Parts {
    pub(super) journal: Journal,
    pub(super) lookup: Lookup,
    pub(super) shared: Arc<Shared>,
    pub(super) store: mpsc::Sender<WriteCommand>,
    pub(super) signals: Arc<Signals>,
    pub(super) next_sequence: i64,
}

pub(super) struct Committer {
    journal: Journal,
    lookup: Lookup,
    known: Known,
    /// What the group under way makes of captures.
    staged: Staged,
    /// A record's body while it is written.
    body: Vec<u8>,
    shared: Arc<Shared>,
    store: mpsc::Sender<WriteCommand>,
    done: (channel::SyncSender<Done>, channel::Receiver<Done>),
    flushing: Flushing,
    pace: Pace,
    /// What waits, with what this group adds.
    tally: Tally,
    next_sequence: i64,
    limits: Limits,
    group_commit_max: usize,
    metrics: Metrics,
    signals: Arc<Signals>,
}

impl Committer {
    pub(super) fn new(parts: Parts, options: &SqliteOptions) -> Self {
        let tally = parts.shared.lock().tally.clone();
        let ids = parts.next_sequence.saturating_sub(1).cast_unsigned();
        let database = options.directory.join("relay.db");
        Self {
            journal: parts.journal,
            lookup: parts.lookup,
            known: Known::new(database, Arc::clone(&parts.shared), ids),
            staged: Staged::default(),
            body: Vec::new(),
            shared: parts.shared,
            store: parts.store,
            // One thing at a time is asked of the writer.
            done: channel::sync_channel(1),
            flushing: Flushing::default(),
            pace: Pace::default(),
            tally,
            next_sequence: parts.next_sequence,
            limits: options.limits,
            group_commit_max: options.group_commit_max,
            metrics: options.metrics.clone(),
            signals: parts.signals,
        }
    }

    /// Works until it is closed.
    pub(super) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let parked = Parked::here();
        let mut next = None;
        loop {
            let command = match next.take() {
                Some(command) => Some(command),
                None => match parked.receive(&mut commands, self.wait()) {
                    Ok(command) => command,
                    Err(Elapsed) => {
                        self.keep_house();
                        continue;
                    }
                },
            };
            self.keep_house();
            let Some(command) = command else { break };
            match command {
                Command::Flush { whole, reply } => self.flush_for(whole, reply),
                Command::Alone(command) => self.alone(command),
                Command::Close => break,
                first => {
                    if let Some(left) = self.pace.left(Instant::now()) {
                        parked.rest(left);
                    }
                    let (group, after) = self.gather(first, &mut commands);
                    next = after;
                    self.commit(group);
                }
            }
        }
        self.end();
    }

    fn wait(&self) -> Option<Duration> {
        if self.flushing.is_retiring() {
            return Some(Duration::ZERO);
        }
        if self.flushing.is_running() {
            return Some(BUSY_WAIT);
        }
        let written = self.journal.active_bytes() > 0;
        let calm = self.journal.is_applied() && !written && !self.has_leftovers();
        (!calm).then_some(CALM_WAIT)
    }

    /// All commands that have arrived, up to a bound; and the one that ended it.
    fn gather(
        &self,
        first: Command,
        commands: &mut mpsc::Receiver<Command>,
    ) -> (Vec<Command>, Option<Command>) {
        let mut weight = first.weight().unwrap_or(0);
        let mut group = vec![first];
        while weight < self.group_commit_max {
            let Ok(next) = commands.try_recv() else { break };
            match next.weight() {
                Some(more) => weight += more,
                None => return (group, Some(next)),
            }
            group.push(next);
        }
        (group, None)
    }

    /// Does a group of commands with one sync.
    fn commit(&mut self, group: Vec<Command>) {
        let begun = Instant::now();
        let weight: usize = group.iter().filter_map(Command::weight).sum();
        let is_full = weight >= self.group_commit_max;
        self.pace.begin(group.len(), is_full, begun);
        let mut owed = Vec::with_capacity(group.len());
        let mut result = self.ready();
        self.journal.reserve(group.iter().map(Command::bytes).sum());
        for command in group {
            match command {
                Command::Submit {
                    captures,
                    reservation,
                    reply,
                } => {
                    let mut submitted = Vec::with_capacity(captures.len());
                    if result.is_ok() {
                        result = captures.into_iter().try_for_each(|capture| {
                            submitted.push(self.submit(capture)?);
                            Ok(())
                        });
                    }
                    owed.push(Owed::Submitted {
                        submitted,
                        reservation,
                        reply,
                    });
                }
                Command::Settle { settlement, reply } => {
                    if result.is_ok() {
                        result = self.settle(&settlement);
                    }
                    owed.push(Owed::Settled(reply));
                }
                // They are in no group.
                Command::Flush { .. } | Command::Alone(_) | Command::Close => {}
            }
        }
        // A snapshot keeps SQLite's log from being used anew.
        self.lookup.refresh();
        if result.is_ok() {
            self.answer_refused(&mut owed);
        }
        let result = self.make_durable(result, &mut owed);
        self.metrics
            .commit(weight as u64, begun.elapsed(), result.is_ok());
        for debt in owed {
            debt.answer(&result);
        }
        if result.is_ok() {
            self.tell();
        }
        self.staged.clear();
        self.start_flush_if_due();
    }

    /// Answers those who get nothing but refusals: what becomes of the group is nothing to
    /// them. Whoever comes from now on is refused before the queue.
    fn answer_refused(&self, owed: &mut Vec<Owed>) {
        if owed.iter().any(|debt| debt.refusals() > 0) {
            let mut overlay = self.shared.lock();
            self.shared.note_refusal(&mut overlay, Instant::now());
        }
        for debt in owed.extract_if(.., |debt| debt.is_refused()) {
            debt.answer(&Ok(()));
        }
    }

    fn make_durable(
        &mut self,
        result: Result<(), OutboxError>,
        owed: &mut [Owed],
    ) -> Result<(), OutboxError> {
        let wrote = !self.staged.states.is_empty();
        let result = match result {
            Ok(()) => self.journal.commit().map_err(failed),
            Err(error) => {
                self.journal.forget_group();
                Err(error)
            }
        };
        // A group that wrote nothing says nothing about the disk.
        if wrote || result.is_err() {
            self.signals.set_writable(result.is_ok());
        }
        match result {
            Ok(group) => {
                self.staged.place_payloads(&group);
                let mut overlay = self.shared.lock();
                for next in &self.staged.states {
                    overlay.put(&next.entry, next.before);
                }
                for debt in owed {
                    debt.end_reservation(&mut overlay);
                }
                self.shared.note_room(&overlay, Instant::now());
                drop(overlay);
                self.flushing.note_change();
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "the outbox cannot be written; nothing was acknowledged");
                self.tally = self.shared.lock().tally.clone();
                Err(error)
            }
        }
    }

    /// Writes something that says nothing, to see whether that works again.
    fn probe(&mut self) -> Result<(), OutboxError> {
        let result = self.ready().and_then(|()| {
            self.journal.push(PROBE, &[]);
            self.journal.commit().map(drop).map_err(failed)
        });
        self.signals.set_writable(result.is_ok());
        result
    }
}

fn failed(error: std::io::Error) -> OutboxError {
    OutboxError::Unavailable(format!("the journal: {error}"))
}

#[cfg(test)]
mod tests;
