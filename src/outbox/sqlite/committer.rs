//! The thread that acknowledges: it makes captures and settlements durable in the
//! journal, and has them put into the database later, many at a time.

mod flush;
mod staged;
mod tell;

use std::{
    sync::{Arc, mpsc as channel},
    time::{Duration, Instant},
};

use tokio::{
    runtime::Runtime,
    sync::{mpsc, oneshot},
};

use super::{
    SqliteOptions,
    journal::{
        Journal,
        record::{ACCEPTED, PROBE, SETTLED, write_accepted, write_settled},
    },
    lookup::Lookup,
    overlay::{Entry, Key, Shared, key_of},
    tally::Tally,
    writer::WriteCommand,
};
use crate::{
    event::EventType,
    metrics::Metrics,
    outbox::{
        Content, Limits, NewCapture, OutboxError, Settlement, Signals, Submitted,
        sealing::SealedCapture,
    },
    status::CaptureRecord,
};

use flush::Flushing;
pub(super) use flush::{Done, SEGMENT_BYTES};
pub(super) use staged::settled;
use staged::{Next, Staged, accepted};

type Reply<T> = oneshot::Sender<Result<T, OutboxError>>;

/// How long the thread waits for commands while the database is written.
const BUSY_WAIT: Duration = Duration::from_millis(10);
/// How long it waits while something is to be put into the database.
const CALM_WAIT: Duration = Duration::from_millis(200);

/// What the thread is asked.
#[derive(Debug)]
pub(super) enum Command {
    Submit {
        captures: Vec<SealedCapture>,
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

impl Command {
    /// How much of a group it takes; `None` where it can't be in one.
    fn weight(&self) -> Option<usize> {
        match self {
            Self::Submit { captures, .. } => Some(captures.len()),
            Self::Settle { settlement, .. } => Some(settlement.captures.len()),
            Self::Flush { .. } | Self::Alone(_) | Self::Close => None,
        }
    }
}

/// What is owed to a caller once the group is durable.
enum Owed {
    Submitted(Reply<Vec<Submitted>>, Vec<Submitted>),
    Settled(Reply<()>),
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
    shared: Arc<Shared>,
    store: mpsc::Sender<WriteCommand>,
    done: (channel::SyncSender<Done>, channel::Receiver<Done>),
    flushing: Flushing,
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
        Self {
            journal: parts.journal,
            lookup: parts.lookup,
            shared: parts.shared,
            store: parts.store,
            // One thing at a time is asked of the writer.
            done: channel::sync_channel(1),
            flushing: Flushing::default(),
            tally,
            next_sequence: parts.next_sequence,
            limits: options.limits,
            group_commit_max: options.group_commit_max,
            metrics: options.metrics.clone(),
            signals: parts.signals,
        }
    }

    /// Works until it is closed. The runtime is for this thread's waits alone.
    pub(super) fn run(mut self, mut commands: mpsc::Receiver<Command>, clock: &Runtime) {
        let mut next = None;
        loop {
            let command = match next.take() {
                Some(command) => Some(command),
                None => match self.wait() {
                    None => commands.blocking_recv(),
                    Some(wait) => {
                        let waited = clock
                            .block_on(async { tokio::time::timeout(wait, commands.recv()).await });
                        let Ok(command) = waited else {
                            self.keep_house();
                            continue;
                        };
                        command
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
        let mut owed = Vec::with_capacity(group.len());
        let mut staged = Staged::default();
        let mut result = self.ready();
        for command in group {
            match command {
                Command::Submit { captures, reply } => {
                    let mut submitted = Vec::with_capacity(captures.len());
                    if result.is_ok() {
                        result = captures.into_iter().try_for_each(|capture| {
                            submitted.push(self.submit(capture, &mut staged)?);
                            Ok(())
                        });
                    }
                    owed.push(Owed::Submitted(reply, submitted));
                }
                Command::Settle { settlement, reply } => {
                    if result.is_ok() {
                        result = self.settle(&settlement, &mut staged);
                    }
                    owed.push(Owed::Settled(reply));
                }
                // They are in no group.
                Command::Flush { .. } | Command::Alone(_) | Command::Close => {}
            }
        }
        // A snapshot keeps SQLite's log from being used anew.
        self.lookup.refresh();
        let result = self.make_durable(result, &staged);
        self.metrics
            .commit(weight as u64, begun.elapsed(), result.is_ok());
        for debt in owed {
            // Whoever asked may have gone; then nobody needs the answer.
            match debt {
                Owed::Submitted(reply, submitted) => {
                    let _ = reply.send(result.clone().map(|()| submitted));
                }
                Owed::Settled(reply) => {
                    let _ = reply.send(result.clone());
                }
            }
        }
        if result.is_ok() {
            self.tell(&staged);
        }
        self.start_flush_if_due();
    }

    fn make_durable(
        &mut self,
        result: Result<(), OutboxError>,
        staged: &Staged,
    ) -> Result<(), OutboxError> {
        let wrote = !staged.states.is_empty();
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
        match &result {
            Ok(()) => {
                let mut overlay = self.shared.lock();
                for next in &staged.states {
                    overlay.put(next.key, Arc::clone(&next.entry), next.before);
                }
                drop(overlay);
                self.flushing.note_change();
            }
            Err(error) => {
                tracing::error!(%error, "the outbox cannot be written; nothing was acknowledged");
                self.tally = self.shared.lock().tally.clone();
            }
        }
        result
    }

    fn submit(
        &mut self,
        sealed: SealedCapture,
        staged: &mut Staged,
    ) -> Result<Submitted, OutboxError> {
        let SealedCapture { capture, subject } = sealed;
        let key = key_of(&capture.integration_id, &capture.capture_id);
        if let Some((digest, record)) = self.known(key, &capture, staged)? {
            return Ok(if digest == capture.digest {
                Submitted::Duplicate(record)
            } else {
                Submitted::Conflict
            });
        }
        if let Content::Send { events, .. } = &capture.content {
            let bytes = (events.identify.len() + events.track.len()) as u64;
            let id = &capture.integration_id;
            if let Some(quota) = self.tally.full(&self.limits, id, bytes) {
                return Ok(Submitted::Full(quota));
            }
        }
        let since = self.journal.last() + 1;
        let entry = accepted(self.next_sequence, since, capture, subject);
        self.next_sequence += 1;
        if let Some(lane) = entry.lane() {
            for bytes in entry.waiting.into_iter().flatten() {
                self.tally.add(&lane, 1, bytes);
            }
        }
        self.journal
            .push(ACCEPTED, |body| write_accepted(&entry, body));
        let record = entry.record.clone();
        staged.put(Next {
            key,
            entry: Arc::new(entry),
            before: [None, None],
            announce: EventType::ALL.into(),
            is_new: true,
        });
        Ok(Submitted::Accepted(record))
    }

    /// Digest and record of a capture that was accepted before.
    fn known(
        &mut self,
        key: Key,
        capture: &NewCapture,
        staged: &Staged,
    ) -> Result<Option<([u8; 16], CaptureRecord)>, OutboxError> {
        let known = |entry: &Arc<Entry>| (entry.digest, entry.record.clone());
        if let Some(entry) = staged.find(key) {
            return Ok(Some(known(entry)));
        }
        if let Some(entry) = self.shared.lock().find(key) {
            return Ok(Some(known(entry)));
        }
        self.lookup
            .find(key, &capture.integration_id, &capture.capture_id)
    }

    fn settle(&mut self, settlement: &Settlement, staged: &mut Staged) -> Result<(), OutboxError> {
        for settled in &settlement.captures {
            let mut before = [None, None];
            let current = staged.get(settled.sequence).cloned();
            let current = match current {
                Some(entry) => Some(entry),
                None => self.shared.lock().get(settled.sequence).cloned(),
            };
            let current = match current {
                Some(entry) => Some(entry),
                None => {
                    let stored =
                        self.lookup
                            .waiting(&settlement.lane, settled, self.journal.last() + 1)?;
                    before = stored.as_ref().map_or(before, |stored| stored.waiting);
                    stored.map(Arc::new)
                }
            };
            let Some(current) = current else { continue };
            let Some(entry) = staged::settled(&current, settled) else {
                continue;
            };
            for (was, is) in current.waiting.iter().zip(entry.waiting) {
                if let (Some(bytes), None) = (was, is) {
                    self.tally.remove(&settlement.lane, 1, *bytes);
                }
            }
            staged.put(Next {
                key: key_of(&entry.record.integration_id, &entry.record.capture_id),
                entry: Arc::new(entry),
                before,
                announce: settled.changed.clone(),
                is_new: false,
            });
        }
        self.journal
            .push(SETTLED, |body| write_settled(settlement, body));
        Ok(())
    }

    /// Writes something that says nothing, to see whether that works again.
    fn probe(&mut self) -> Result<(), OutboxError> {
        let result = self.ready().and_then(|()| {
            self.journal.push(PROBE, |_| {});
            self.journal.commit().map_err(failed)
        });
        self.signals.set_writable(result.is_ok());
        result
    }
}

/// A runtime for the waits of one thread.
pub(super) fn clock() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
}

fn failed(error: std::io::Error) -> OutboxError {
    OutboxError::Unavailable(format!("the journal: {error}"))
}
