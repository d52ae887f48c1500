//! The thread that writes, with group commit.

mod apply;
mod counters;
mod erase;
mod log;
mod rekey;
mod replay;

use std::{sync::Arc, time::Instant};

use rusqlite::{Connection, Transaction, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

use super::{SqliteOptions, keys::Prepared, row::unavailable};
use crate::{
    integration::IntegrationId,
    metrics::Metrics,
    notice::Notice,
    outbox::{
        Change, Erasure, LaneKey, OutboxError, Quota, Selection, Settlement, Signals, Submitted,
        sealing::{SealedCapture, Sealing},
    },
    proto::ErasureReceipt,
    time::UnixMillis,
};

use counters::Counters;
use rekey::Rekey;

type Reply<T> = oneshot::Sender<Result<T, OutboxError>>;

/// What the writer is asked.
#[derive(Debug)]
pub(super) enum WriteCommand {
    Submit {
        captures: Vec<SealedCapture>,
        reply: Reply<Vec<Submitted>>,
    },
    Settle {
        settlement: Arc<Settlement>,
        reply: Reply<()>,
    },
    PutIntegration {
        id: String,
        sealed: Vec<u8>,
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
    PutNotice {
        notice: Notice,
        reply: Reply<()>,
    },
    DeleteNotice {
        id: String,
        reply: Reply<()>,
    },
    Erase {
        erasure: Box<Erasure>,
        reply: Reply<ErasureReceipt>,
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
    Erased(Reply<ErasureReceipt>, Box<ErasureReceipt>),
    Maintained(Reply<bool>, bool),
    Done(Reply<()>),
}

impl Owed {
    /// Whether payloads are to be gone from the log too by now.
    fn ends_cleaning(&self) -> bool {
        match self {
            Self::Maintained(_, more) => !more,
            Self::Erased(_, receipt) => receipt.completed,
            _ => false,
        }
    }
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
    rekey: Rekey,
    sealing: Arc<Sealing>,
    metrics: Metrics,
    signals: Arc<Signals>,
}

impl Writer {
    pub(super) fn new(
        connection: Connection,
        options: &SqliteOptions,
        prepared: &Prepared,
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
            rekey: if prepared.rekey {
                Rekey::Queue { after: 0 }
            } else {
                Rekey::Done
            },
            sealing: Arc::clone(&prepared.sealing),
            metrics: options.metrics.clone(),
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
            let begun = Instant::now();
            let succeeded = self.commit(group.drain(..));
            self.metrics
                .commit(weight as u64, begun.elapsed(), succeeded);
            if closing {
                break;
            }
        }
        if let Err(error) = self.connection.close() {
            tracing::error!(error = %error.1, "the outbox did not close cleanly");
        }
    }

    /// Does a group of commands in one transaction; returns whether it is durable.
    fn commit(&mut self, group: impl Iterator<Item = WriteCommand>) -> bool {
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
        if result.is_ok() && owed.iter().any(Owed::ends_cleaning) {
            log::cut(&self.connection);
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
                Owed::Erased(reply, receipt) => {
                    let _ = reply.send(result.clone().map(|()| *receipt));
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
        result.is_ok()
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
            rekey: &mut self.rekey,
            sealing: &self.sealing,
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
        if !matches!(self.rekey, Rekey::Done) {
            self.rekey = Rekey::Queue { after: 0 };
        }
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
    rekey: &'a mut Rekey,
    sealing: &'a Sealing,
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
            WriteCommand::PutIntegration { id, sealed, reply } => {
                owed.push(Owed::Done(reply));
                self.put_integration(&id, &sealed).map_err(unavailable)
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
            WriteCommand::PutNotice { notice, reply } => {
                owed.push(Owed::Done(reply));
                self.put_notice(&notice).map_err(unavailable)
            }
            WriteCommand::DeleteNotice { id, reply } => {
                owed.push(Owed::Done(reply));
                self.delete_notice(&id).map_err(unavailable)
            }
            WriteCommand::Erase { erasure, reply } => {
                owed.push(Owed::Erased(reply, Box::default()));
                let receipt = self.erase(&erasure)?;
                if let Some(Owed::Erased(_, answer)) = owed.last_mut() {
                    **answer = receipt;
                }
                Ok(())
            }
            WriteCommand::Maintain { reply } => {
                owed.push(Owed::Maintained(reply, false));
                let more = self.maintain(UnixMillis::now()).map_err(unavailable)?;
                let more = self.rekey()? || more;
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
        WriteCommand::Erase { reply, .. } => {
            let _ = reply.send(Err(error.clone()));
        }
        WriteCommand::Settle { reply, .. }
        | WriteCommand::PutIntegration { reply, .. }
        | WriteCommand::PutNotice { reply, .. }
        | WriteCommand::DeleteNotice { reply, .. }
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
