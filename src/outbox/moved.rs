//! What a move of an embedded outbox into the shared one has done.

use super::{OutboxError, PostgresError, sqlite::ExportError};

/// Why an outbox can't be moved. What was moved before stays moved.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The embedded outbox can't be read.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The shared outbox can't be used.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    /// The shared outbox can't be written.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
}

/// What was moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Integrations that were stored. Existing ones are left as they are.
    pub integrations: u64,
    /// Captures, with their waiting events.
    pub captures: u64,
    /// Captures that the shared outbox had accepted itself.
    pub known: u64,
    /// Captures whose id it had accepted with other content: they stay in the embedded outbox.
    pub conflicts: Vec<String>,
    /// Receipts of erasures.
    pub receipts: u64,
    /// Notices that were not sent yet.
    pub notices: u64,
}
