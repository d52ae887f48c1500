//! The thread that writes the database, with group commit.

mod apply;
mod command;
mod counters;
mod erase;
mod flush;
mod ids;
mod log;
mod rekey;
mod replay;
mod rests;

use std::{
    path::PathBuf,
    sync::{Arc, mpsc as channel},
};

use rusqlite::{Connection, Transaction, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

use super::{
    SqliteOptions, entry::Entry, keys::Prepared, overlay::Shared, row::unavailable,
    schema::LOG_LIMIT_BYTES, tally::Tally,
};
use crate::{
    integration::IntegrationId,
    outbox::{Change, LaneKey, OutboxError, Quota, Signals, Taken, sealing::Sealing},
    proto::ErasureReceipt,
    time::UnixMillis,
};

pub(super) use command::{Done, FlushJob, WriteCommand};
use counters::Counters;
pub(super) use ids::Ids;
use rekey::Rekey;
pub(super) use replay::CHUNK;
use rests::Rests;

type Reply<T> = oneshot::Sender<Result<T, OutboxError>>;

/// Commands that share one transaction, at the most.
const GROUP: usize = 512;

/// What is owed to a caller once the transaction is durable.
enum Owed {
    Flushed(FlushJob),
    Alone(channel::SyncSender<Done>),
    Replayed(Reply<Result<Taken, Quota>>, Result<Taken, Quota>),
    Discarded(Reply<Taken>, Taken),
    Erased(Reply<ErasureReceipt>, Box<ErasureReceipt>),
    Maintained(Reply<bool>, bool),
    Done(Reply<()>),
}

/// What is told to others once the transaction is durable.
#[derive(Default)]
struct News {
    /// SQLite's log is to be emptied: what was removed may not stay there.
    empty_log: bool,
    lanes: Vec<LaneKey>,
    changes: Vec<Change>,
    settled: Vec<(IntegrationId, String)>,
}

pub(super) struct Writer {
    connection: Connection,
    counters: Counters,
    ids: Ids,
    remember_millis: i64,
    maintained_to: i64,
    rekey: Rekey,
    sealing: Arc<Sealing>,
    signals: Arc<Signals>,
    shared: Arc<Shared>,
    /// SQLite's log.
    log: PathBuf,
    /// A transaction has failed, and what memory knows of it is void.
    void: bool,
}

impl Writer {
    pub(super) fn new(
        connection: Connection,
        options: &SqliteOptions,
        prepared: &Prepared,
        signals: Arc<Signals>,
        shared: Arc<Shared>,
    ) -> rusqlite::Result<Self> {
        shared.set_rekeying(prepared.rekey);
        let counters = Counters::load(&connection, options.limits)?;
        let ids = Ids::load(&connection, Arc::clone(&shared.recent))?;
        Ok(Self {
            connection,
            counters,
            ids,
            remember_millis: i64::try_from(options.remember.as_millis()).unwrap_or(i64::MAX),
            maintained_to: 0,
            rekey: if prepared.rekey {
                Rekey::Queue { after: 0 }
            } else {
                Rekey::Done
            },
            sealing: Arc::clone(&prepared.sealing),
            signals,
            shared,
            log: options.directory.join("relay.db-wal"),
            void: false,
        })
    }

    /// Puts what a journal held into the database, at a start.
    pub(super) fn recover(
        &mut self,
        entries: Vec<Arc<Entry>>,
        through: u64,
    ) -> Result<(), OutboxError> {
        // The start waits for it.
        self.shared.set_urgent(true);
        let (done, _) = channel::sync_channel(1);
        let job = FlushJob {
            entries,
            through,
            done,
        };
        let mut commands = std::iter::once(WriteCommand::Flush(job));
        self.apply_all(&mut commands, &mut Vec::new(), &mut News::default())
    }

    /// What waits, and the number of the next capture.
    pub(super) fn known(&self) -> rusqlite::Result<(Tally, i64)> {
        let next = load_next_sequence(&self.connection)?;
        Ok((self.counters.tally().clone(), next))
    }

    /// The database and its index of ids, for somebody who goes on without this thread.
    pub(super) fn into_parts(self) -> (Connection, Ids) {
        (self.connection, self.ids)
    }

    /// Works until it is closed.
    pub(super) fn run(mut self, mut commands: mpsc::Receiver<WriteCommand>) {
        let mut group = Vec::new();
        while let Some(first) = commands.blocking_recv() {
            let mut closing = matches!(first, WriteCommand::Close);
            group.push(first);
            while !closing && group.len() < GROUP {
                let Ok(next) = commands.try_recv() else { break };
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

    /// Does a group of commands in one transaction.
    pub(super) fn commit(&mut self, group: impl Iterator<Item = WriteCommand>) {
        let mut owed = Vec::new();
        let mut news = News::default();
        let mut commands = group;
        let result = self.apply_all(&mut commands, &mut owed, &mut news);
        if let Err(error) = &result {
            // That it can be written again is for the committer to find out.
            self.signals.set_writable(false);
            tracing::error!(%error, "the database cannot be written");
            for command in commands {
                command.refuse(error);
            }
            self.void = true;
            if let Err(error) = self.reload() {
                tracing::error!(%error, "the outbox cannot be read");
            }
        }
        if result.is_ok() && news.empty_log {
            log::cut(&self.connection);
        }
        if owed.iter().any(|debt| matches!(debt, Owed::Alone(_))) {
            let tally = self.counters.tally().clone();
            self.shared.lock().replace_tally(tally);
            self.shared.set_rekeying(!matches!(self.rekey, Rekey::Done));
        }
        for debt in owed {
            // Whoever asked may have gone; then nobody needs the answer.
            match debt {
                Owed::Flushed(job) => {
                    let done = job.done.clone();
                    let _ = done.send(Done::Flushed(job, result.clone()));
                }
                Owed::Alone(done) => {
                    let _ = done.send(Done::Alone);
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
            // Readers may have kept SQLite from beginning its log anew.
            if std::fs::metadata(&self.log).map_or(0, |known| known.len()) > LOG_LIMIT_BYTES {
                self.checkpoint("RESTART");
            }
        }
    }

    /// Takes SQLite's log into the database file. Here no caller waits for it.
    fn checkpoint(&self, mode: &str) {
        let sql = format!("PRAGMA wal_checkpoint({mode})");
        if let Err(error) = self.connection.query_row(&sql, [], |_| Ok(())) {
            tracing::warn!(%error, mode, "SQLite's log is not emptied");
        }
    }

    fn apply_all(
        &mut self,
        commands: &mut impl Iterator<Item = WriteCommand>,
        owed: &mut Vec<Owed>,
        news: &mut News,
    ) -> Result<(), OutboxError> {
        if self.void {
            self.reload().map_err(unavailable)?;
        }
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(unavailable)?;
        let mut work = Work {
            transaction: &transaction,
            counters: &mut self.counters,
            ids: &mut self.ids,
            remember_millis: self.remember_millis,
            maintained_to: &mut self.maintained_to,
            rekey: &mut self.rekey,
            sealing: &self.sealing,
            signals: &self.signals,
            shared: &self.shared,
            news,
        };
        for command in commands {
            work.apply(command, owed)?;
        }
        work.counters.store(&transaction).map_err(unavailable)?;
        work.ids.store(&transaction).map_err(unavailable)?;
        transaction.commit().map_err(unavailable)?;
        self.ids.committed();
        Ok(())
    }

    /// Asks the database what memory should know.
    fn reload(&mut self) -> rusqlite::Result<()> {
        if !matches!(self.rekey, Rekey::Done) {
            self.rekey = Rekey::Queue { after: 0 };
        }
        self.counters = Counters::load(&self.connection, self.counters.limits())?;
        self.ids = Ids::load(&self.connection, Arc::clone(&self.shared.recent))?;
        self.void = false;
        Ok(())
    }

    fn tell(&self, news: News) {
        self.signals.wake_lanes(news.lanes);
        for change in &news.changes {
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
    ids: &'a mut Ids,
    remember_millis: i64,
    maintained_to: &'a mut i64,
    rekey: &'a mut Rekey,
    sealing: &'a Sealing,
    signals: &'a Signals,
    shared: &'a Shared,
    news: &'a mut News,
}

impl Work<'_> {
    fn apply(&mut self, command: WriteCommand, owed: &mut Vec<Owed>) -> Result<(), OutboxError> {
        // The debt is noted first, so that a failure reaches this caller too.
        match command {
            WriteCommand::Flush(mut job) => {
                let flushed = self.flush(&mut job.entries, job.through);
                owed.push(Owed::Flushed(job));
                flushed
            }
            WriteCommand::Alone(command, done) => {
                let applied = self.apply(*command, owed);
                owed.push(Owed::Alone(done));
                applied
            }
            WriteCommand::PutIntegration { id, sealed, reply } => {
                owed.push(Owed::Done(reply));
                self.put_integration(id.as_str(), &sealed)
                    .map_err(unavailable)
            }
            WriteCommand::DeleteIntegration { id, reply } => {
                owed.push(Owed::Done(reply));
                self.delete_integration(&id).map_err(unavailable)
            }
            WriteCommand::Replay {
                ids,
                selection,
                now,
                reply,
            } => {
                owed.push(Owed::Replayed(reply, Ok(Taken::default())));
                let replayed = self.replay(&ids, &selection, now)?;
                if let Some(Owed::Replayed(_, answer)) = owed.last_mut() {
                    *answer = replayed;
                }
                Ok(())
            }
            WriteCommand::Discard {
                ids,
                selection,
                reply,
            } => {
                owed.push(Owed::Discarded(reply, Taken::default()));
                let discarded = self.discard(&ids, &selection)?;
                self.news.empty_log = true;
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
                self.news.empty_log |= !erasure.captures.is_empty();
                if let Some(Owed::Erased(_, answer)) = owed.last_mut() {
                    **answer = receipt;
                }
                Ok(())
            }
            WriteCommand::Maintain { reply } => {
                owed.push(Owed::Maintained(reply, false));
                let more = self.maintain(UnixMillis::now()).map_err(unavailable)?;
                let more = self.rekey()? || more;
                self.news.empty_log |= !more;
                if let Some(Owed::Maintained(_, answer)) = owed.last_mut() {
                    *answer = more;
                }
                Ok(())
            }
            WriteCommand::Close => Ok(()),
        }
    }
}

/// Number of the next capture.
pub(super) fn load_next_sequence(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row(
        "SELECT coalesce(max(sequence), 0) + 1 FROM capture",
        [],
        |row| row.get(0),
    )
}
