//! The outbox: where a capture becomes the relay's responsibility.
//!
//! Invariants that every implementation keeps:
//! - A capture is answered only once it and both its events are durable.
//! - A capture id is taken once for an integration, also by callers at the same
//!   time; the same content again is a duplicate, other content a conflict. A
//!   capture that was skipped leaves its id free ([`Outbox::submit`]).
//! - A lane's events come back in the order in which they were accepted, until
//!   they are settled in a final state.
//! - A refused submission leaves nothing behind.
//! - Whoever waits on [`Signals`] is woken after the change is durable.

mod claim;
#[cfg(test)]
pub(crate) mod conformance;
mod dead_letters;
mod event_set;
mod feed;
mod lease;
#[cfg(test)]
pub(crate) mod model;
mod moved;
mod postgres;
mod record;
mod sealing;
#[cfg(test)]
pub(crate) mod shared_double;
mod signals;
mod sqlite;
mod subject;

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use async_trait::async_trait;
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};

use crate::{
    event::EventPair,
    integration::IntegrationId,
    notice::Notice,
    proto::{self, DeliveryReason},
    region::Region,
    status::CaptureRecord,
    time::UnixMillis,
    trace::TraceLink,
};

pub use claim::Claim;
pub use dead_letters::{DeadLetter, DeadLetterCount, DeadLetterFilter, Selection, Taken};
pub use event_set::EventSet;
pub use feed::{Watched, Watcher};
pub use lease::{LeaseBudget, LeaseScope, LeasedCapture, SettledCapture, Settlement};
pub use moved::{MoveError, Moved};
pub use postgres::{
    InitReport, PostgresConnection, PostgresError, PostgresOptions, PostgresOutbox, SchemaChange,
    SynchronousCommit, init, move_integration, move_to_postgres,
};
#[doc(hidden)]
pub use record::{check_stored_record, sample_records};
pub use signals::{Change, Signals};
pub use sqlite::{
    CheckError, CheckReport, Damage, ExportError, JournalError, KeyError, OpenError, SqliteOptions,
    SqliteOutbox, accept_damage, check,
};
pub use subject::{Erasure, FoundSubject, SubjectQuery};

/// Lanes of one integration and region. Fixed, since an event has to stay in
/// the lane of its user for as long as it waits. Four requests at once of 2,500
/// events carry far more than Segment takes from one workspace.
pub const SHARDS: u16 = 4;

/// A boxed future, so that the trait can be used as `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The sequence of deliveries to which all events of a user belong. At most one
/// request of a lane is in flight.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneKey {
    /// Whose lane it is.
    pub integration_id: IntegrationId,
    /// Whose endpoint gets its events.
    pub region: Region,
    /// 0 to [`SHARDS`] - 1, chosen by the user id.
    pub shard: u16,
}

impl fmt::Display for LaneKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.integration_id, self.region, self.shard)
    }
}

/// The shard of a user: by the first two hex digits of the id, which is a hash.
#[must_use]
pub fn shard_of(user_id: &str) -> u16 {
    let digits = user_id.get(..2).unwrap_or("0");
    u16::from_str_radix(digits, 16).unwrap_or(0) % SHARDS
}

/// A capture to store.
#[derive(Debug)]
pub struct NewCapture {
    /// Whose capture it is.
    pub integration_id: IntegrationId,
    /// The idempotency key.
    pub capture_id: String,
    /// Fingerprint of the capture as the caller sent it.
    pub digest: [u8; 16],
    /// Whose endpoint gets the events.
    pub region: Region,
    /// Version of the mappings that formed the events.
    pub mapping_version: u64,
    /// [`Revision::number`](crate::integration::Revision::number) of the integration that
    /// formed the events. A shared outbox refuses another one than it has stored.
    pub revision: u64,
    /// When it arrived.
    pub accept_time: UnixMillis,
    /// Whose data it is: lower-case hex SHA-256 of the address, if there is one.
    pub user_id: Option<String>,
    /// What is to be sent.
    pub content: Content,
    /// The call that brings it, where it is traced.
    pub trace: Option<TraceLink>,
    /// Its room among all requests, which is free again once it is stored.
    pub room: Option<OwnedSemaphorePermit>,
}

impl NewCapture {
    /// Whether it is stored in place of a capture with its id: see [`Outbox::submit`].
    fn replaces(&self, stored: &CaptureRecord, digest: &[u8; 16]) -> bool {
        let sends = matches!(self.content, Content::Send { .. });
        !stored.binds_id() && (sends || self.digest != *digest)
    }
}

/// What a capture gives to send.
#[derive(Debug)]
pub enum Content {
    /// Both events.
    Send {
        /// The lane's shard.
        shard: u16,
        /// The events, as they will be sent.
        events: EventPair,
    },
    /// Nothing.
    Skip {
        /// Why.
        reason: DeliveryReason,
    },
}

/// What became of a submitted capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It is durable.
    Accepted(Arc<CaptureRecord>),
    /// It had been accepted before, and is not stored anew; this is its current state.
    Duplicate(Arc<CaptureRecord>),
    /// Its id had been used for other content that was not skipped.
    Conflict,
    /// There is no room.
    Full(Quota),
    /// Its events were formed with an integration that another relay has changed since.
    Stale,
}

/// The bound that left no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    /// Events that wait in the whole relay.
    Events,
    /// Bytes that wait in the whole relay.
    Bytes,
    /// Events of this integration that wait.
    IntegrationEvents,
    /// Bytes of this integration that wait.
    IntegrationBytes,
}

/// Bounds of what may wait.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Events in the whole relay.
    pub max_events: u64,
    /// Bytes of JSON in the whole relay.
    pub max_bytes: u64,
    /// Events of one integration.
    pub max_integration_events: u64,
    /// Bytes of JSON of one integration.
    pub max_integration_bytes: u64,
}

/// What waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Lanes with waiting events.
    pub lanes: u32,
    /// Events that wait.
    pub events: u64,
    /// Their bytes of JSON.
    pub bytes: u64,
    /// When the oldest of them was accepted.
    pub oldest: Option<UnixMillis>,
}

/// Why the outbox could not do it. What was asked has left nothing behind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutboxError {
    /// The disk or the database failed. It may work again later.
    #[error("the outbox cannot be written or read now: {0}")]
    Unavailable(String),
    /// The answer to a write was lost: it may have been applied.
    #[error("the outbox did not answer in time; the write may have been applied: {0}")]
    OutcomeUnknown(String),
    /// Another relay has changed the integration since this one read it.
    #[error("the integration {0} was changed by another relay in the meantime")]
    Changed(IntegrationId),
    /// The outbox is closed.
    #[error("the outbox is closed")]
    Closed,
}

/// The answer to a submission, once it is durable.
#[derive(Debug)]
pub struct Receipt(oneshot::Receiver<Result<Vec<Submitted>, OutboxError>>);

impl Receipt {
    /// Waits until the captures are durable; one answer each, in their order.
    ///
    /// # Errors
    /// [`OutboxError`]: none of them is stored.
    pub async fn wait(self) -> Result<Vec<Submitted>, OutboxError> {
        self.0.await.unwrap_or(Err(OutboxError::Closed))
    }
}

/// An integration as it is stored: its specification with the write keys.
pub type StoredIntegration = proto::Integration;

/// The id of a stored integration; `None` where its name is damaged.
pub(crate) fn stored_id(spec: &StoredIntegration) -> Option<IntegrationId> {
    let name = IntegrationId::new(&spec.integration_id)?;
    Some(name.of_incarnation(spec.incarnation))
}

/// Durable storage between those who accept captures and those who deliver them.
#[async_trait]
pub trait Outbox: Send + Sync + 'static {
    /// Hands captures over in order; waits for a place in the bounded queue of
    /// the writer. The receipt answers when they are durable.
    ///
    /// A known id is answered by the stored capture:
    ///
    /// | stored               | submitted      | same content | other content |
    /// | -------------------- | -------------- | ------------ | ------------- |
    /// | skipped, not erased  | to be sent     | Accepted     | Accepted      |
    /// | skipped, not erased  | to be skipped  | Duplicate    | Accepted      |
    /// | any other            | any            | Duplicate    | Conflict      |
    ///
    /// An accepted capture takes the place of the stored one, with a new place in the order
    /// of acceptance. Where there is no room for it, the stored one stays.
    async fn submit(&self, captures: Vec<NewCapture>) -> Result<Receipt, OutboxError>;

    /// The bound that leaves no room for any new capture with events, as far as memory
    /// tells. Callers ask first: events that can't be stored need not be built.
    fn full(&self, _integration_id: &IntegrationId) -> Option<Quota> {
        None
    }

    /// Whether a capture may have been accepted before: false where memory rules it out.
    fn may_know(&self, _integration_id: &IntegrationId, _capture_id: &str) -> bool {
        true
    }

    /// The first waiting events of a lane within a scope and a budget, in order. Empty
    /// where nothing waits. The lane has no other lease until it settles.
    async fn lease(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
        scope: LeaseScope,
    ) -> Result<Vec<LeasedCapture>, OutboxError>;

    /// Whether the lease of a lane lasts for a request that begins now.
    fn may_send(&self, _lane: &LaneKey) -> bool {
        true
    }

    /// Makes the outcome of an attempt durable. Captures that are no longer
    /// waiting are left as they are.
    async fn settle(&self, settlement: Arc<Settlement>) -> Result<(), OutboxError>;

    /// The current record of a capture.
    async fn find(
        &self,
        integration_id: &IntegrationId,
        capture_id: &str,
    ) -> Result<Option<CaptureRecord>, OutboxError>;

    /// The lanes in which events wait.
    async fn waiting_lanes(&self) -> Result<Vec<LaneKey>, OutboxError>;

    /// What waits for one integration.
    async fn backlog(&self, integration_id: &IntegrationId) -> Result<Backlog, OutboxError>;

    /// Dead letters after an id, oldest first.
    async fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, OutboxError>;

    /// What a selection of dead letters weighs, and how many of them were
    /// accepted before a time.
    async fn count_dead_letters(
        &self,
        selection: Selection,
        older_than: UnixMillis,
    ) -> Result<DeadLetterCount, OutboxError>;

    /// Queues a bounded number of the selected dead letters again, behind what
    /// waits; returns how many of which integrations. None are left when it returns 0 but those
    /// of deleted integrations, which are passed over.
    async fn replay(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> Result<Result<Taken, Quota>, OutboxError>;

    /// Removes a bounded number of the selected dead letters with their payloads;
    /// returns how many of which integrations. None are left when it returns 0.
    async fn discard(&self, selection: Selection) -> Result<Taken, OutboxError>;

    /// Where a person's data is: all that was accepted before this call, at most
    /// 100,000 captures.
    async fn find_subject(&self, subject: SubjectQuery) -> Result<FoundSubject, OutboxError>;

    /// Removes events, dead letters and history of captures, and notes how many in
    /// the receipt, which it returns. No lane of theirs may have a lease.
    async fn erase(&self, erasure: Erasure) -> Result<proto::ErasureReceipt, OutboxError>;

    /// Receipts before an id, newest first.
    async fn erasure_receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<proto::ErasureReceipt>, OutboxError>;

    /// All stored integrations.
    async fn integrations(&self) -> Result<Vec<StoredIntegration>, OutboxError>;

    /// The stored integration of a name, in any incarnation. Reads the store, so that changes
    /// of other relays are seen.
    async fn integration(
        &self,
        id: &IntegrationId,
    ) -> Result<Option<StoredIntegration>, OutboxError> {
        let id = id.clone();

        let all = self.integrations().await?;
        Ok(all.into_iter().find(|one| one.integration_id == id.name()))
    }

    /// The incarnation of the last integration of a name, also of a deleted one; 0 where there
    /// was none.
    async fn last_incarnation(&self, name: &IntegrationId) -> Result<u32, OutboxError>;

    /// Stores an integration in place of the one with the etag `replaces`; `None`: there was
    /// none of its id, in its incarnation.
    ///
    /// # Errors
    /// [`OutboxError::Changed`] where another relay may write and what is stored differs.
    async fn put_integration(
        &self,
        integration: StoredIntegration,
        replaces: Option<String>,
    ) -> Result<(), OutboxError>;

    /// Removes the integration with the etag `replaces`; that it was there is remembered.
    ///
    /// # Errors
    /// As [`Outbox::put_integration`].
    async fn delete_integration(
        &self,
        id: &IntegrationId,
        replaces: String,
    ) -> Result<(), OutboxError>;

    /// Compares a relay's configuration file with the last one that was stored, and stores
    /// it where it is not older: `version` is the operator's number, `digest` a fingerprint
    /// of all its integrations with their write keys, which the outbox blinds.
    ///
    /// In one transaction: no version is stored, or a lower one, or the same one with the
    /// same digest: both are stored, `Apply`. The same version with another digest:
    /// `Conflict`. A higher version: `Older`. The last two change nothing.
    ///
    /// After an `Apply`, and until it claims again, this relay stores and removes
    /// integrations with `read_only` set. An outbox may refuse such a change with
    /// [`OutboxError::Changed`] once another relay has claimed a higher version.
    async fn claim_configuration(
        &self,
        _version: u64,
        _digest: [u8; 16],
    ) -> Result<Claim, OutboxError> {
        Ok(Claim::Apply)
    }

    /// Counts up when somebody else may have changed an integration; `None` where
    /// nobody else can.
    fn integration_changes(&self) -> Option<watch::Receiver<u64>> {
        None
    }

    /// Stores a notice; of too many the oldest go.
    async fn put_notice(&self, notice: Notice) -> Result<(), OutboxError>;

    /// The oldest notices.
    async fn notices(&self, limit: usize) -> Result<Vec<Notice>, OutboxError>;

    /// Removes a notice.
    async fn delete_notice(&self, id: &str) -> Result<(), OutboxError>;

    /// Tells of new work and of changes.
    fn signals(&self) -> &Signals;

    /// Ends all work and closes the files. Later calls fail with `Closed`.
    async fn close(&self);
}
