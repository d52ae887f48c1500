//! An imitation of Segment's HTTP tracking API on loopback, for development,
//! tests and benchmarks. It shares no code with the relay, so that it judges the
//! relay's requests independently.
//!
//! What it imitates: `POST /v1/batch` with its limits; the answer 200 to nearly
//! everything, also to a wrong write key; the decision afterwards, event by event,
//! which are dropped ([`DropReason`]); the removal of repeated `messageId`s, which
//! like Segment's is not scoped to a source; and, where a [`Rule`] says so, every
//! way in which such a service fails.
//!
//! What it does not imitate: the endpoints for single events and other types than
//! identify and track; OAuth (a bearer token counts as no write key, so the body
//! has to have one); rate limits and outages of its own accord (see [`Rule`]); the
//! 24 hours after which Segment forgets a `messageId` (here a number of them is
//! remembered); the destinations behind Segment; the texts of Segment's errors.
//!
//! `check` (a request), `event` (one event) and `light` (one JSON value) judge
//! without any I/O, `state` keeps what came in, `fault` decides about misbehaviour,
//! `http`, `batch`, `answer` and `query` speak HTTP, `tally` counts where nothing is judged, `render` prints for terminals.

mod answer;
mod batch;
mod check;
mod entry;
mod event;
mod fault;
mod http;
mod light;
mod query;
mod render;
mod state;
mod tally;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, watch};

pub use entry::{DropReason, Dropped, Entry, Outcome, RequestInfo, Stats};
pub use fault::{DropConnection, Rule, RuleError};
pub use http::run;
pub use render::entry_text;

use check::Keys;
use fault::Faults;
use state::Store;

/// How many new entries a slow subscriber may be behind before it loses some.
const SUBSCRIPTION_ENTRIES: usize = 1_024;

/// Where a Segment workspace keeps its data. A write key belongs to one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Region {
    /// Oregon, `api.segment.io`.
    NonEu,
    /// Dublin, `events.eu1.segmentapis.com`.
    Eu,
}

impl Region {
    /// The region's name in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NonEu => "non_eu",
            Self::Eu => "eu",
        }
    }
}

/// What a sandbox knows and how much it keeps.
#[derive(Clone, Debug)]
pub struct SandboxOptions {
    /// The sources' write keys. Empty: every key is taken. Otherwise the events of
    /// every other key, and of a key in the wrong region, are dropped after the 200.
    pub write_keys: Vec<(Region, String)>,
    /// How many entries the debugger keeps; the oldest are forgotten.
    pub keep_entries: usize,
    /// How many bytes of request bodies the kept entries may hold on to.
    pub keep_bytes: usize,
    /// How many accepted `messageId`s are remembered; the oldest are forgotten.
    pub remember_message_ids: usize,
    /// How many connections each listener serves at the same time; further ones wait.
    pub max_connections: usize,
    /// Events are counted and not looked at, for load tests: none is checked, kept or
    /// known again, and rules see no write keys and no events.
    pub count_only: bool,
    /// Seed for the `share` of rules that have no seed of their own.
    pub seed: u64,
}

impl Default for SandboxOptions {
    fn default() -> Self {
        Self {
            write_keys: Vec::new(),
            keep_entries: 1_000,
            keep_bytes: 64 * 1024 * 1024,
            remember_message_ids: 1_000_000,
            max_connections: 1_024,
            count_only: false,
            seed: 0,
        }
    }
}

/// [`Sandbox::wait_for`] ran out of time.
#[derive(Debug, thiserror::Error)]
#[error("timed out waiting for the sandbox; it has seen {stats:?}")]
pub struct WaitTimedOut {
    /// The counters at the end of the wait.
    pub stats: Box<Stats>,
}

/// The state of the imitation, shared by its listeners and by the tests that look
/// into it.
#[derive(Debug)]
pub struct Sandbox {
    keys: Keys,
    faults: Faults,
    store: Store,
    max_connections: usize,
    count_only: bool,
}

impl Sandbox {
    /// An empty sandbox; [`run`] puts it on the network.
    #[must_use]
    pub fn new(options: SandboxOptions) -> Self {
        Self {
            store: Store::new(&options, SUBSCRIPTION_ENTRIES),
            faults: Faults::new(options.seed),
            max_connections: options.max_connections.max(1),
            count_only: options.count_only,
            keys: Keys::new(options.write_keys),
        }
    }

    /// Replaces the rules of misbehaviour; an empty list restores good behaviour.
    ///
    /// # Errors
    /// The first rule that makes no sense; the former rules then stay.
    pub fn set_rules(&self, rules: Vec<Rule>) -> Result<(), RuleError> {
        self.faults.set(rules)
    }

    /// The rules of misbehaviour, in the order in which they are tried.
    #[must_use]
    pub fn rules(&self) -> Vec<Rule> {
        self.faults.rules_and_acted().0
    }

    /// The kept entries, oldest first.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        self.store.entries()
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.store.stats()
    }

    /// Forgets entries, counters, `messageId`s and rules. Entries and requests keep
    /// counting from where they were, so that `after` stays meaningful; open
    /// connections and requests in flight stay counted.
    pub fn reset(&self) {
        self.faults.clear();
        self.store.reset();
    }

    /// New entries from now on. A receiver that falls more than 1,024 entries
    /// behind loses the oldest and is told how many.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Entry> {
        self.store.subscribe()
    }

    /// Waits until `enough` holds for the counters and returns them. It is asked
    /// again after each change, without polling.
    ///
    /// # Errors
    /// [`WaitTimedOut`] with the counters if it does not hold within `timeout`.
    pub async fn wait_for<F>(&self, enough: F, timeout: Duration) -> Result<Stats, WaitTimedOut>
    where
        F: Fn(&Stats) -> bool,
    {
        let mut changes: watch::Receiver<u64> = self.store.changes();
        let satisfied = async {
            loop {
                changes.mark_unchanged();
                let stats = self.stats();
                if enough(&stats) {
                    return stats;
                }
                // The sender lives in `self`, so this fails never; waiting for the
                // time-out is right all the same.
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(timeout, satisfied)
            .await
            .map_err(|_elapsed| WaitTimedOut {
                stats: Box::new(self.stats()),
            })
    }
}
