//! The thread that writes, with group commit.

mod apply;
mod counters;
mod replay;

use std::sync::Arc;

use rusqlite::{Connection, Transaction, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

use super::{SqliteOptions, row::unavailable};
use crate::{
    integration::IntegrationId,
    outbox::{
        Change, LaneKey, NewCapture, OutboxError, Quota, Selection, Settlement, Signals,
        StoredIntegration, Submitted,
    },
    time::UnixMillis,
};

use counters::Counters;

type Reply<T> = oneshot::Sender<Result<T, OutboxError>>;

/// What the writer is asked.
#[derive(Debug)]
pub(super) enum WriteCommand {
    Submit {
        captures: Vec<NewCapture>,
        reply: Reply<Vec<Submitted>>,
    },
    Settle {
        settlement: Arc<Settlement>,
        reply: Reply<()>,
    },
    PutIntegration {
        integration: Box<StoredIntegration>,
        reply: Reply<()>,
    },
    DeleteIntegration {
        id: IntegrationId,
        reply: Reply<()>,
    },
    Replay {
        selection: Selection,
        now: UnixMillis,
        reply: Reply<Result<u64, Quota>>,
    },
    Discard {
        selection: Selection,
        reply: Reply<u64>,
    },
    Maintain {
        reply: Reply<bool>,
    },
    Close,
}

impl WriteCommand {
    /// How much of a group commit it takes.
    fn weight(&self) -> usize {
        match self {
            Self::Submit { captures, .. } => captures.len(),
            Self::Settle { settlement, .. } => settlement.captures.len(),
            _ => 1,
        }
    }
}

/// What is owed to a caller once the transaction is durable.
enum Owed {
    Submitted(Reply<Vec<Submitted>>, Vec<Submitted>),
    Replayed(Reply<Result<u64, Quota>>, Result<u64, Quota>),
    Discarded(Reply<u64>, u64),
    Maintained(Reply<bool>, bool),
    Done(Reply<()>),
}

/// What is told to others once the transaction is durable.
#[derive(Default)]
struct News {
    lanes: Vec<LaneKey>,
    changes: Vec<Change>,
    settled: Vec<(IntegrationId, String)>,
}

pub(super) struct Writer {
    connection: Connection,
    counters: Counters,
    next_sequence: i64,
    group_commit_max: usize,
    remember_millis: i64,
    maintained_to: i64,
    signals: Arc<Signals>,
}

impl Writer {
    pub(super) fn new(
        connection: Connection,
        options: &SqliteOptions,
        signals: Arc<Signals>,
    ) -> rusqlite::Result<Self> {
        let next_sequence = load_next_sequence(&connection)?;
        let counters = Counters::load(&connection, options.limits)?;
        Ok(Self {
            connection,
            counters,
            next_sequence,
            group_commit_max: options.group_commit_max,
            remember_millis: i64::try_from(options.remember.as_millis()).unwrap_or(i64::MAX),
            maintained_to: 0,
            signals,
        })
    }

    /// Works until it is closed.
    pub(super) fn run(mut self, mut commands: mpsc::Receiver<WriteCommand>) {
        let mut group = Vec::new();
        while let Some(first) = commands.blocking_recv() {
            let mut weight = first.weight();
            let mut closing = matches!(first, WriteCommand::Close);
            group.push(first);
            while !closing && weight < self.group_commit_max {
                let Ok(next) = commands.try_recv() else { break };
                weight += next.weight();
                closing = matches!(next, WriteCommand::Close);
                group.push(next);
            }
            self.commit(group.drain(..));
            if closing {
                break;
            }
        }
        if let Err(error) = self.connection.close() {
            tracing::error!(error = %error.1, "the outbox did not close cleanly");
        }
    }

    fn commit(&mut self, group: impl Iterator<Item = WriteCommand>) {
        let mut owed = Vec::new();
        let mut news = News::default();
        let mut commands = group;
        let before = self.connection.total_changes();
        let result = self.apply_all(&mut commands, &mut owed, &mut news);
        // A transaction that wrote nothing says nothing about the disk.
        if result.is_err() || self.connection.total_changes() > before {
            self.signals.set_writable(result.is_ok());
        }
        if let Err(error) = &result {
            tracing::error!(%error, "the outbox cannot be written; nothing was acknowledged");
            // Those that were not reached drop their replies with the iterator.
            for command in commands {
                refuse(command, error);
            }
            self.reload();
        }
        for debt in owed {
            // Whoever asked may have gone; then nobody needs the answer.
            match debt {
                Owed::Submitted(reply, submitted) => {
                    let _ = reply.send(result.clone().map(|()| submitted));
                }
                Owed::Replayed(reply, replayed) => {
                    let _ = reply.send(result.clone().map(|()| replayed));
                }
                Owed::Discarded(reply, discarded) => {
                    let _ = reply.send(result.clone().map(|()| discarded));
                }
                Owed::Maintained(reply, more) => {
                    let _ = reply.send(result.clone().map(|()| more));
                }
                Owed::Done(reply) => {
                    let _ = reply.send(result.clone());
                }
            }
        }
        if result.is_ok() {
            self.tell(news);
        }
    }

    fn apply_all(
        &mut self,
        commands: &mut impl Iterator<Item = WriteCommand>,
        owed: &mut Vec<Owed>,
        news: &mut News,
    ) -> Result<(), OutboxError> {
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(unavailable)?;
        let mut work = Work {
            transaction: &transaction,
            counters: &mut self.counters,
            next_sequence: &mut self.next_sequence,
            remember_millis: self.remember_millis,
            maintained_to: &mut self.maintained_to,
            signals: &self.signals,
            news,
        };
        for command in commands {
            work.apply(command, owed)?;
        }
        work.counters.store(&transaction).map_err(unavailable)?;
        transaction.commit().map_err(unavailable)
    }

    /// What memory knew of the failed transaction is void: asks the database.
    fn reload(&mut self) {
        match load_next_sequence(&self.connection) {
            Ok(next) => self.next_sequence = self.next_sequence.max(next),
            Err(error) => tracing::error!(%error, "the outbox cannot be read"),
        }
        match Counters::load(&self.connection, self.counters.limits()) {
            Ok(counters) => self.counters = counters,
            Err(error) => tracing::error!(%error, "the outbox cannot be read"),
        }
    }

    fn tell(&self, news: News) {
        self.signals.wake_lanes(news.lanes);
        for change in news.changes {
            self.signals.publish(change);
        }
        for (integration_id, capture_id) in &news.settled {
            self.signals.settled(integration_id, capture_id);
        }
    }
}

/// One transaction under way.
struct Work<'a> {
    transaction: &'a Transaction<'a>,
    counters: &'a mut Counters,
    next_sequence: &'a mut i64,
    remember_millis: i64,
    maintained_to: &'a mut i64,
    signals: &'a Signals,
    news: &'a mut News,
}

impl Work<'_> {
    fn apply(&mut self, command: WriteCommand, owed: &mut Vec<Owed>) -> Result<(), OutboxError> {
        // The debt is noted first, so that a failure reaches this caller too.
        match command {
            WriteCommand::Submit { captures, reply } => {
                owed.push(Owed::Submitted(reply, Vec::with_capacity(captures.len())));
                for capture in captures {
                    let submitted = self.submit(capture)?;
                    if let Some(Owed::Submitted(_, done)) = owed.last_mut() {
                        done.push(submitted);
                    }
                }
                Ok(())
            }
            WriteCommand::Settle { settlement, reply } => {
                owed.push(Owed::Done(reply));
                self.settle(&settlement)
            }
            WriteCommand::PutIntegration { integration, reply } => {
                owed.push(Owed::Done(reply));
                self.put_integration(&integration).map_err(unavailable)
            }
            WriteCommand::DeleteIntegration { id, reply } => {
                owed.push(Owed::Done(reply));
                self.delete_integration(&id).map_err(unavailable)
            }
            WriteCommand::Replay {
                selection,
                now,
                reply,
            } => {
                owed.push(Owed::Replayed(reply, Ok(0)));
                let replayed = self.replay(&selection, now)?;
                if let Some(Owed::Replayed(_, answer)) = owed.last_mut() {
                    *answer = replayed;
                }
                Ok(())
            }
            WriteCommand::Discard { selection, reply } => {
                owed.push(Owed::Discarded(reply, 0));
                let discarded = self.discard(&selection).map_err(unavailable)?;
                if let Some(Owed::Discarded(_, answer)) = owed.last_mut() {
                    *answer = discarded;
                }
                Ok(())
            }
            WriteCommand::Maintain { reply } => {
                owed.push(Owed::Maintained(reply, false));
                let more = self.maintain(UnixMillis::now()).map_err(unavailable)?;
                if let Some(Owed::Maintained(_, answer)) = owed.last_mut() {
                    *answer = more;
                }
                Ok(())
            }
            WriteCommand::Close => Ok(()),
        }
    }
}

fn refuse(command: WriteCommand, error: &OutboxError) {
    match command {
        WriteCommand::Submit { reply, .. } => {
            let _ = reply.send(Err(error.clone()));
        }
        WriteCommand::Maintain { reply } => {
            let _ = reply.send(Err(error.clone()));
        }
        WriteCommand::Replay { reply, .. } => {
            let _ = reply.send(Err(error.clone()));
        }
        WriteCommand::Discard { reply, .. } => {
            let _ = reply.send(Err(error.clone()));
        }
        WriteCommand::Settle { reply, .. }
        | WriteCommand::PutIntegration { reply, .. }
        | WriteCommand::DeleteIntegration { reply, .. } => {
            let _ = reply.send(Err(error.clone()));
        }
        WriteCommand::Close => {}
    }
}

fn load_next_sequence(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row(
        "SELECT coalesce(max(sequence), 0) + 1 FROM capture",
        [],
        |row| row.get(0),
    )
}
