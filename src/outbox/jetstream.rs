//! The shared outbox: NATS JetStream, for several relays behind a load balancer.
//!
//! # What is stored where
//! Captures are spread over `partitions` streams by their integration, so that all that has
//! to change together lies in one stream. `<p>` is the prefix, `<n>` the partition, `<lane>` an
//! integration, a region and a shard, `<id>` the SHA-256 of a capture id, 32 hex digits of it.
//!
//! | subject | a message is |
//! | --- | --- |
//! | `<p>.<n>.c.<integration>.<id>` | one version of a capture's record; the last one counts |
//! | `<p>.<n>.q.<lane>.l.<count>` | so many live captures that wait, with their payloads; in order of acceptance |
//! | `<p>.<n>.q.<lane>.r.<count>` | replayed captures that wait: behind the live ones |
//! | `<p>.<n>.q.<lane>.<queue>.<sequence>.<count>` | what takes the place of the message of that sequence, after an erasure |
//! | `<p>.<n>.s.<lane>.<sequence>.<first>` | what became of captures of that message, delivered at the first try |
//! | `<p>.<n>.d.<integration>.<id>.<event>` | one dead letter with its payload |
//! | `<p>.<n>.l.<lane>` | who holds the lane, and up to where it is settled |
//!
//! The bucket `<p>-state` holds integrations and receipts (sealed), notices, the relays'
//! sessions and the sealed key of what is blinded.
//!
//! A capture waits at a position: the sequence of a message, and a place in it ([`chunk`]). Its status is
//! what its record says, or the outcome of its message where the record is the first version ([`outcomes`]).
//!
//! # How it keeps the promises of the outbox
//! - **Accepted** means: the atomic batch with the capture's record and its payloads is acknowledged
//!   by the stream's quorum. Captures that arrive meanwhile share the next batch.
//! - **Once**: the batch expects that the record's subject is empty. If it is not, the batch as
//!   a whole is refused, the records are read, and the rest is sent again. A random mark in the record tells a
//!   relay whether a batch without an answer was its own. `Nats-Msg-Id` is not used: it forgets
//!   after minutes, and the server keeps its ids in memory.
//! - **One holder**: each relay has a session, a key that it writes anew every half second. A lane
//!   record names the session that holds the lane, and is only ever replaced by comparing its
//!   revision. Each settlement replaces it in the same atomic batch, so whoever lost the lane
//!   settles nothing. A session that stood still for the length of a lease is ended by
//!   others, again by its revision; only then its lanes are taken.
//! - **One request**: a lease is longer than a request to Segment may take, and nothing is leased
//!   unless the session is good for a whole request. So a relay that was paused or cut off has
//!   no request under way when another one takes its lanes.
//! - **Spread**: of the sessions that live, each integration prefers one for its lanes (rendezvous
//!   hashing), so that its rate and its condition are kept in one place. Others give a lane up
//!   between two requests.
//!
//! What differs from the embedded outbox: bounds of what waits are kept by counts that are
//! up to half a second old, so several relays may pass them by what they take in that time; a
//! submission of more than [`intake::BATCH_CAPTURES`] captures is several batches, of which the first may be stored
//! when a later one fails; and a record is remembered from its last change on, at least for half the time.

mod calls;
mod chunk;
mod connect;
mod counts;
mod dead_letters;
mod deleter;
mod erase;
mod error;
mod find;
mod import;
mod intake;
mod lanes;
mod layout;
mod lease;
mod message;
mod names;
mod news;
mod open;
mod outcomes;
mod position;
mod queue;
mod removal;
mod remove;
mod replay;
mod scout;
mod sessions;
mod settle;
mod state;
#[cfg(test)]
mod tests;
mod wire;

use std::{sync::Arc, time::Duration};

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Limits, OutboxError, Signals, sealing::Sealing};
use crate::metrics::Metrics;

pub use connect::{NatsAuth, NatsConnection, NatsTls};
pub use error::JetStreamError;
pub(in crate::outbox) use import::Import;
pub use layout::{Difference, Layout, LayoutReport};
pub use open::NatsHandle;

/// Longest wait for an answer of the servers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How much longer than a request to Segment a lease lasts.
const LEASE_MARGIN: Duration = Duration::from_secs(3);
/// What has to be left of that margin when events are leased.
const SEND_MARGIN: Duration = Duration::from_millis(500);

/// How the shared outbox works.
#[derive(Clone, Debug)]
pub struct JetStreamOptions {
    /// Bounds of what may wait, in all relays together.
    pub limits: Limits,
    /// How long the id and the status of a capture are remembered.
    pub remember: Duration,
    /// Whether payloads are stored encrypted. Write keys always are.
    pub encrypt_payloads: bool,
    /// Longest request to Segment, to which leases are fitted.
    pub request_timeout: Duration,
    /// Counts and times commits.
    pub metrics: Metrics,
}

/// The shared outbox. See the module's description.
#[derive(Clone)]
pub struct JetStreamOutbox(Arc<Shared>);

/// What the parts of the outbox share.
struct Shared {
    wire: wire::Wire,
    layout: Layout,
    options: JetStreamOptions,
    sealing: Arc<Sealing>,
    signals: Signals,
    sessions: sessions::Sessions,
    counts: counts::Counts,
    lanes: lanes::Lanes,
    intakes: Vec<intake::IntakeSender>,
    deleter: deleter::Deleter,
    state: state::StateStore,
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl Shared {
    /// How long a session is good without being renewed.
    fn lease(&self) -> Duration {
        self.options.request_timeout + LEASE_MARGIN
    }

    /// How long a request that is sent now may be under way.
    fn guard(&self) -> Duration {
        self.options.request_timeout + SEND_MARGIN
    }

    fn check_open(&self) -> Result<(), OutboxError> {
        if self.closing.is_cancelled() {
            return Err(OutboxError::Closed);
        }
        Ok(())
    }
}
