//! Why the shared outbox can't be used.

use std::path::PathBuf;

use crate::{
    outbox::OutboxError,
    vault::{UnsealError, VaultError},
};

/// Why the shared outbox can't be used.
#[derive(Debug, thiserror::Error)]
pub enum JetStreamError {
    /// No server lets the relay in.
    #[error("[nats] servers {servers}: {why}")]
    Connect {
        /// The configured servers.
        servers: String,
        /// What went wrong, and what to change.
        why: String,
    },
    /// A file of `[nats]` can't be used.
    #[error("[nats] {setting} {path}: {rule}")]
    File {
        /// Which setting names it.
        setting: &'static str,
        /// The configured file.
        path: PathBuf,
        /// What is wrong with it.
        rule: String,
    },
    /// The server is too old.
    #[error(
        "[nats] servers: nats-server {0} is too old; segment-relay needs 2.12 or newer, on all servers of the cluster"
    )]
    TooOld(String),
    /// The relay may not ask, or nobody is there to answer.
    #[error(
        "[nats] servers: no answer to a question to JetStream; most servers of a cluster have to be up, and the \
         relay's user needs the rights to publish to $JS.API.>, $JS.FC.>, $KV.{0}-state.> and {0}.>, and to \
         subscribe to {0}.> and _INBOX.>"
    )]
    NoRights(String),
    /// The servers do not agree upon a leader, at the moment.
    #[error(
        "[nats] servers: JetStream is not available now ({0}); most servers of the cluster have to be up and to reach each other"
    )]
    NoLeader(String),
    /// The server has no JetStream.
    #[error(
        "[nats] servers: this NATS has no JetStream for the relay ({0}); start nats-server with -js, or enable it for the account"
    )]
    NoJetStream(String),
    /// Streams are missing.
    #[error("JetStream lacks {}; run `segment-relay nats init` with the same configuration", .0.join(", "))]
    Missing(Vec<String>),
    /// Streams are not as they have to be.
    #[error("JetStream is not as configured: {}; see `segment-relay nats init`", .0.join("; "))]
    Differs(Vec<String>),
    /// The servers refused something.
    #[error("JetStream: {0}")]
    Refused(String),
    /// The keys of what is stored can't be used.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// What is stored is sealed under a key that is not known.
    #[error(
        "the shared outbox is sealed under keys that are not those of [secrets]: {0}; all relays need the same keys"
    )]
    Keys(#[from] UnsealError),
    /// The servers failed.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
}
