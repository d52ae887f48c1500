//! Finds events that wait and that no lease finds: the database is damaged where the lease looks.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::SqliteOutbox;
use crate::outbox::{LaneKey, LeaseBudget, LeaseScope, LeasedCapture, OutboxError};

/// Least time between two searches in a lane: each of them flushes.
const INTERVAL: Duration = Duration::from_secs(60);

/// Lanes that were searched, and when.
#[derive(Debug, Default)]
pub(super) struct Hidden(Mutex<HashMap<LaneKey, Instant>>);

impl Hidden {
    fn is_due(&self, lane: &LaneKey) -> bool {
        let now = Instant::now();
        let mut searched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        searched.retain(|_, then| now.duration_since(*then) < INTERVAL);
        if searched.contains_key(lane) {
            return false;
        }
        searched.insert(lane.clone(), now);
        true
    }
}

impl SqliteOutbox {
    /// A lease of a whole lane was empty. A capture may have come since; then this finds it. Returns
    /// what it finds, and whether events wait that are not found.
    pub(super) async fn look_for_hidden(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
    ) -> Result<(Vec<LeasedCapture>, bool), OutboxError> {
        let waits = || self.shared.lock().tally.waits(lane);
        if !waits() || !self.hidden.is_due(lane) {
            return Ok((Vec::new(), false));
        }
        self.flush().await?;
        let waited = waits();
        let found = self.lease_once(lane, budget, LeaseScope::All).await?;
        let hidden = waited && found.is_empty() && waits();
        if hidden {
            tracing::error!(
                %lane,
                "events wait in this lane, and none is found: the database is damaged; stop the \
                 relay and run `segment-relay outbox check`"
            );
        }
        Ok((found, hidden))
    }
}
