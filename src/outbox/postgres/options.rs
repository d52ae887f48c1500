//! Options of the shared outbox.

use std::{path::PathBuf, time::Duration};

use secrecy::SecretString;

use crate::{metrics::Metrics, outbox::Limits};

/// The databases of the shared outbox.
#[derive(Clone, Debug)]
pub struct PostgresConnection {
    /// One libpq URL per database, at most 64; each may name several hosts.
    pub urls: Vec<SecretString>,
    /// Overrides the URLs' user.
    pub user: Option<String>,
    /// Overrides the URLs' password.
    pub password: Option<SecretString>,
    /// CAs of the servers' certificates, PEM; the machine's by default.
    pub ca_file: Option<PathBuf>,
    /// Client certificate and its key, PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Connections per database.
    pub pool_size: usize,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest statement.
    pub statement_timeout: Duration,
    /// What a commit waits for.
    pub synchronous_commit: SynchronousCommit,
    /// Whether captures are refused while the server has no synchronous standby.
    pub require_synchronous_standby: bool,
}

/// `synchronous_commit` of PostgreSQL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SynchronousCommit {
    /// The WAL is flushed here and at the synchronous standbys.
    #[default]
    On,
    /// The standbys have applied it, too.
    RemoteApply,
    /// The standbys have written it, not flushed.
    RemoteWrite,
    /// The WAL is flushed here alone.
    Local,
}

impl SynchronousCommit {
    /// Its name in PostgreSQL.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::RemoteApply => "remote_apply",
            Self::RemoteWrite => "remote_write",
            Self::Local => "local",
        }
    }
}

/// How the shared outbox works.
#[derive(Clone, Debug)]
pub struct PostgresOptions {
    /// Bounds of the backlog, in each database.
    pub limits: Limits,
    /// How long the id and the status of a capture are remembered.
    pub remember: Duration,
    /// Whether payloads are stored encrypted. Write keys always are.
    pub encrypt_payloads: bool,
    /// Longest request to Segment; leases are longer.
    pub request_timeout: Duration,
    /// Captures of one transaction at the most.
    pub group_commit_max: usize,
    /// Counts and times commits.
    pub metrics: Metrics,
}
