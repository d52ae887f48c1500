//! What the writer is asked.

use std::sync::{Arc, mpsc as channel};

use super::Reply;
use crate::{
    integration::IntegrationId,
    notice::Notice,
    outbox::{Erasure, OutboxError, Quota, Selection, Taken, sqlite::entry::Entry},
    proto::ErasureReceipt,
    time::UnixMillis,
};

/// What the writer is asked.
#[derive(Debug)]
pub(in crate::outbox::sqlite) enum WriteCommand {
    /// Puts what the journal holds into the database.
    Flush(FlushJob),
    /// While the committer waits, and all that was acknowledged is in the database.
    Alone(Box<WriteCommand>, channel::SyncSender<Done>),
    PutIntegration {
        id: IntegrationId,
        sealed: Vec<u8>,
        reply: Reply<()>,
    },
    DeleteIntegration {
        id: IntegrationId,
        reply: Reply<()>,
    },
    /// Those of these dead letters that are there and selected.
    Replay {
        ids: Vec<i64>,
        selection: Arc<Selection>,
        now: UnixMillis,
        reply: Reply<Result<Taken, Quota>>,
    },
    Discard {
        ids: Vec<i64>,
        selection: Arc<Selection>,
        reply: Reply<Taken>,
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

/// What was done for whoever sent [`WriteCommand::Flush`] or [`WriteCommand::Alone`].
#[derive(Debug)]
pub(in crate::outbox::sqlite) enum Done {
    Flushed(FlushJob, Result<(), OutboxError>),
    Alone,
}

/// States of captures that the database is to have.
#[derive(Debug)]
pub(in crate::outbox::sqlite) struct FlushJob {
    /// In no order; the writer gives them back in that of their sequences.
    pub(in crate::outbox::sqlite) entries: Vec<Arc<Entry>>,
    /// Number of the journal's last record that is among them.
    pub(in crate::outbox::sqlite) through: u64,
    /// Who is told.
    pub(in crate::outbox::sqlite) done: channel::SyncSender<Done>,
}

impl WriteCommand {
    /// Whether what it removes has to leave the journal too.
    pub(in crate::outbox::sqlite) fn erases(&self) -> bool {
        matches!(self, Self::Erase { .. } | Self::Discard { .. })
    }

    /// Tells the caller that it was not done.
    pub(in crate::outbox::sqlite) fn refuse(self, error: &OutboxError) {
        match self {
            Self::Flush(job) => {
                let done = job.done.clone();
                let _ = done.send(Done::Flushed(job, Err(error.clone())));
            }
            Self::Alone(command, done) => {
                command.refuse(error);
                let _ = done.send(Done::Alone);
            }
            Self::Maintain { reply } => {
                let _ = reply.send(Err(error.clone()));
            }
            Self::Replay { reply, .. } => {
                let _ = reply.send(Err(error.clone()));
            }
            Self::Discard { reply, .. } => {
                let _ = reply.send(Err(error.clone()));
            }
            Self::Erase { reply, .. } => {
                let _ = reply.send(Err(error.clone()));
            }
            Self::PutIntegration { reply, .. }
            | Self::PutNotice { reply, .. }
            | Self::DeleteNotice { reply, .. }
            | Self::DeleteIntegration { reply, .. } => {
                let _ = reply.send(Err(error.clone()));
            }
            Self::Close => {}
        }
    }
}
