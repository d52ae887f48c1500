//! A person's data: where it is, and its erasure.

use super::LaneKey;
use crate::{integration::IntegrationId, proto};

/// Whose data is looked for.
#[derive(Clone, Debug)]
pub struct SubjectQuery {
    /// The person's user ids: an address has one for each way to normalise it.
    pub user_ids: Vec<String>,
    /// Only in integrations of this name, deleted ones included.
    pub integration_id: Option<IntegrationId>,
}

/// Where a person's data is.
#[derive(Clone, Debug, Default)]
pub struct FoundSubject {
    /// The captures, by their place in the order of acceptance.
    pub captures: Vec<i64>,
    /// The lanes in which some of their events wait.
    pub lanes: Vec<LaneKey>,
}

/// A piece of an erasure.
#[derive(Clone, Debug)]
pub struct Erasure {
    /// Whose data it is.
    pub subject: SubjectQuery,
    /// Some of what was found, at most 1,000.
    pub captures: Vec<i64>,
    /// The receipt so far. Without an id it is a new one.
    pub receipt: proto::ErasureReceipt,
}
