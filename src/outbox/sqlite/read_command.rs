//! What the reader is asked.

use tokio::sync::oneshot;

use super::{
    read_queue::Rank,
    selection::{Piece, Walk, Want},
    subjects::{Scanned, SubjectScan},
};
use crate::{
    integration::IntegrationId,
    notice::Notice,
    outbox::{Backlog, LaneKey, LeaseBudget, LeaseScope, LeasedCapture, OutboxError},
    status::CaptureRecord,
};

type Reply<T> = oneshot::Sender<Result<T, OutboxError>>;

/// What the reader is asked.
#[derive(Debug)]
pub(super) enum ReadCommand {
    Lease {
        lane: LaneKey,
        budget: LeaseBudget,
        scope: LeaseScope<i64>,
        reply: Reply<Vec<LeasedCapture>>,
    },
    Find {
        integration_id: IntegrationId,
        capture_id: String,
        reply: Reply<Option<CaptureRecord>>,
    },
    Backlog {
        integration_id: IntegrationId,
        reply: Reply<Backlog>,
    },
    /// A piece of a walk through dead letters.
    DeadLetters {
        walk: Walk,
        want: Want,
        reply: Reply<Piece>,
    },
    LastIncarnation {
        name: IntegrationId,
        reply: Reply<u32>,
    },
    Integrations {
        reply: Reply<Vec<(String, Vec<u8>)>>,
    },
    ScanSubjects {
        scan: SubjectScan,
        reply: Reply<Scanned>,
    },
    Receipts {
        before: Option<i64>,
        limit: usize,
        reply: Reply<Vec<(String, Vec<u8>)>>,
    },
    Notices {
        limit: usize,
        reply: Reply<Vec<Notice>>,
    },
    Close,
}

impl ReadCommand {
    /// Who is to be answered first.
    pub(super) fn rank(&self) -> Rank {
        match self {
            Self::Lease { .. } => Rank::Lease,
            Self::Find { .. }
            | Self::Backlog { .. }
            | Self::LastIncarnation { .. }
            | Self::Integrations { .. }
            | Self::Notices { .. } => Rank::LookUp,
            Self::DeadLetters { .. }
            | Self::ScanSubjects { .. }
            | Self::Receipts { .. }
            | Self::Close => Rank::Scan,
        }
    }

    /// Whether the caller has gone: its answer is not needed.
    pub(super) fn is_abandoned(&self) -> bool {
        match self {
            Self::Lease { reply, .. } => reply.is_closed(),
            Self::Find { reply, .. } => reply.is_closed(),
            Self::Backlog { reply, .. } => reply.is_closed(),
            Self::DeadLetters { reply, .. } => reply.is_closed(),
            Self::LastIncarnation { reply, .. } => reply.is_closed(),
            Self::Integrations { reply } => reply.is_closed(),
            Self::ScanSubjects { reply, .. } => reply.is_closed(),
            Self::Receipts { reply, .. } => reply.is_closed(),
            Self::Notices { reply, .. } => reply.is_closed(),
            Self::Close => false,
        }
    }
}
