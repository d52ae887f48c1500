//! Errors of the shared outbox, without anything of a URL or a row.

use deadpool_postgres::PoolError;
use tokio_postgres::error::SqlState;

use crate::{
    outbox::OutboxError,
    vault::{UnsealError, VaultError},
};

/// Why the shared outbox cannot be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// A URL is not valid. Its text is not shown: it may hold a password.
    #[error("[postgres] urls: URL {0} is not valid: {1}")]
    Url(usize, String),
    /// Certificates cannot be read.
    #[error("[postgres] {0}")]
    Tls(String),
    /// A database cannot be reached or refused a statement.
    #[error("database {database}: {source}")]
    Database {
        /// Its place in `[postgres] urls`, from 0.
        database: usize,
        /// What happened.
        source: OutboxError,
    },
    /// The schema is missing or too old.
    #[error(
        "database {0} has no schema of this version: run `segment-relay outbox init` (found \
         version {1}, needed {2})"
    )]
    Schema(usize, i32, i32),
    /// The schema is newer than this relay.
    #[error(
        "database {0} has schema version {1}, and this relay knows versions up to {2}: start a \
         newer relay"
    )]
    SchemaNewer(usize, i32, i32),
    /// A database does not fit the others or the settings.
    #[error("database {0}: {1}")]
    Misfit(usize, String),
    /// The key of blinded values cannot be unsealed.
    #[error("database {0}: the index key: {1}")]
    Unseal(usize, UnsealError),
    /// A key cannot be made.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The integration cannot be moved.
    #[error("{0}")]
    Move(String),
}

/// What a failed statement may have done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// It reads, or nothing is committed yet.
    None,
    /// It commits: without an answer it may have been applied.
    Commit,
}

impl Effect {
    /// The error of a statement that got no answer in time.
    pub(super) fn timed_out(self) -> OutboxError {
        self.without_answer("no answer in time".to_owned())
    }

    fn without_answer(self, text: String) -> OutboxError {
        match self {
            Self::None => OutboxError::Unavailable(text),
            Self::Commit => OutboxError::OutcomeUnknown(text),
        }
    }

    /// The error of a failed statement.
    pub(super) fn failed(self, error: &tokio_postgres::Error) -> OutboxError {
        let Some(database) = error.as_db_error() else {
            return self.without_answer(error.to_string());
        };
        // Details may quote rows; message and code do not.
        let text = format!("{} ({})", database.message(), database.code().code());
        match *database.code() {
            // The server went away while it committed.
            SqlState::ADMIN_SHUTDOWN | SqlState::CRASH_SHUTDOWN => self.without_answer(text),
            _ => OutboxError::Unavailable(text),
        }
    }
}

/// Why no connection could be had.
pub(super) fn no_connection(error: &PoolError) -> OutboxError {
    OutboxError::Unavailable(match error {
        PoolError::Backend(error) => match error.as_db_error() {
            Some(database) => format!("{} ({})", database.message(), database.code().code()),
            None => error.to_string(),
        },
        PoolError::Timeout(_) => "no connection was free in time".to_owned(),
        other => other.to_string(),
    })
}

/// The error of a database, by its place.
pub(super) fn in_database<T>(
    database: usize,
    done: Result<T, OutboxError>,
) -> Result<T, PostgresError> {
    done.map_err(|source| PostgresError::Database { database, source })
}

/// Stored bytes that cannot be read.
pub(super) fn damaged(what: &str) -> OutboxError {
    OutboxError::Unavailable(format!("a damaged {what}"))
}
