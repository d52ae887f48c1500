//! A capture's newest state, as it stands in the overlay and goes into the database.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{LaneKey, LeaseBudget, LeaseScope, LeasedCapture},
    status::{CaptureRecord, State},
    vault::unsealed_len,
};

/// A capture's newest state.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) sequence: i64,
    pub(super) key: Key,
    pub(super) record: Arc<CaptureRecord>,
    pub(super) digest: [u8; 16],
    /// Its lane, where there is something to send.
    pub(super) lane: Option<LaneKey>,
    /// Bytes of the events that wait.
    pub(super) waiting: [Option<u64>; 2],
    pub(super) origin: Origin,
    /// Number of the first record of the journal that made it differ from what the
    /// database has.
    pub(super) since: u64,
}

/// What the database has of a capture.
#[derive(Debug)]
pub(super) enum Origin {
    /// Nothing yet.
    New {
        /// Whose data it is, blinded.
        subject: Option<i64>,
        /// The payloads, while one of them waits or is a dead letter.
        payloads: Option<Payloads>,
    },
    /// An older state.
    Stored,
}

/// Both payloads, in the memory of the journal's group that brought them.
#[derive(Clone, Debug, Default)]
pub(super) struct Payloads {
    both: Bytes,
    identify_bytes: usize,
    /// Their lengths as they are sent, so that a lease does not have to look at them.
    sent_bytes: [usize; 2],
}

impl Payloads {
    /// Those that stand one behind the other.
    pub(super) fn new(both: Bytes, identify_bytes: usize) -> Self {
        let identify_bytes = identify_bytes.min(both.len());
        let (identify, track) = both.split_at(identify_bytes);
        let sent_bytes = [identify, track].map(unsealed_len);
        Self {
            both,
            identify_bytes,
            sent_bytes,
        }
    }

    /// The payload of one event.
    pub(super) fn get(&self, event: EventType) -> &[u8] {
        let (identify, track) = self.both.split_at(self.identify_bytes);
        match event {
            EventType::Identify => identify,
            EventType::Track => track,
        }
    }

    /// The same without a copy.
    fn share(&self, event: EventType) -> Bytes {
        match event {
            EventType::Identify => self.both.slice(..self.identify_bytes),
            EventType::Track => self.both.slice(self.identify_bytes..),
        }
    }
}

impl Entry {
    /// Whether one of its events was given up.
    pub(super) fn has_dead_letter(&self) -> bool {
        let dead = |event| matches!(self.record.event(event).state, State::DeadLettered { .. });
        EventType::ALL.into_iter().any(dead)
    }

    pub(super) fn fresh_events(&self) -> u64 {
        match self.origin {
            Origin::New { .. } => events(&self.waiting),
            Origin::Stored => 0,
        }
    }
}

pub(super) fn events(waiting: &[Option<u64>; 2]) -> u64 {
    waiting.iter().flatten().count() as u64
}

pub(super) fn bytes(waiting: &[Option<u64>; 2]) -> u64 {
    waiting.iter().flatten().sum()
}

/// Tells captures apart by integration and id: 128 bits of a hash.
pub(super) type Key = u128;

/// The key of a capture.
pub(super) fn key_of(integration: &IntegrationId, capture_id: &str) -> Key {
    let mut hash = Sha256::new();
    hash.update(integration.as_str().as_bytes());
    // An integration id holds no NUL, so no two pairs read the same.
    hash.update([0]);
    hash.update(capture_id.as_bytes());
    let mut key = [0; 16];
    key.copy_from_slice(&hash.finalize()[..16]);
    u128::from_le_bytes(key)
}

/// The part of a key by which the database finds a capture.
pub(super) fn stored_key(key: Key) -> i64 {
    let [a, b, c, d, e, f, g, h, ..] = key.to_le_bytes();
    i64::from_le_bytes([a, b, c, d, e, f, g, h])
}

impl Entry {
    /// Bytes of the events that a lease would take.
    pub(super) fn sizes(&self, budget: LeaseBudget) -> [Option<usize>; 2] {
        let [identify, track] = self.waiting;
        let split = budget.max_events == 1 && identify.is_some();
        let Origin::New {
            payloads: Some(payloads),
            ..
        } = &self.origin
        else {
            return [None, None];
        };
        let [identify_bytes, track_bytes] = payloads.sent_bytes;
        [
            identify.map(|_| identify_bytes),
            track.filter(|_| !split).map(|_| track_bytes),
        ]
    }

    /// Whether a scope admits a new capture.
    pub(super) fn is_in(&self, scope: &LeaseScope<i64>) -> bool {
        let subject = || {
            Ok::<_, Infallible>(match self.origin {
                Origin::New { subject, .. } => subject,
                Origin::Stored => None,
            })
        };
        match scope.admits(subject) {
            Ok(admits) => admits,
            Err(never) => match never {},
        }
    }

    /// A new capture as a lane takes it.
    pub(super) fn leased(&self, budget: LeaseBudget) -> LeasedCapture {
        let [identify, track] = self.sizes(budget).map(|size| size.is_some());
        let payload = |event| match &self.origin {
            Origin::New {
                payloads: Some(payloads),
                ..
            } => Some(payloads.share(event)),
            _ => None,
        };
        LeasedCapture {
            sequence: self.sequence,
            record: Arc::clone(&self.record),
            identify: identify.then(|| payload(EventType::Identify)).flatten(),
            track: track.then(|| payload(EventType::Track)).flatten(),
            damaged: false,
        }
    }
}
