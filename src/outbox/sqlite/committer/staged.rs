//! What a group of commands makes of captures, before it is durable: nobody else
//! sees it.

use std::{collections::HashMap, sync::Arc};

use crate::{
    event::EventType,
    outbox::{
        Content, NewCapture, SettledCapture,
        sqlite::overlay::{Entry, Key, Origin},
    },
    status::{CaptureRecord, EventStatus, State},
};

/// Next states of captures, in the order in which they came about.
#[derive(Default)]
pub(super) struct Staged {
    pub(super) states: Vec<Next>,
    places: HashMap<i64, usize>,
    keys: HashMap<Key, i64>,
}

/// One next state.
pub(super) struct Next {
    pub(super) key: Key,
    pub(super) entry: Arc<Entry>,
    /// What waited of it in the database.
    pub(super) before: [Option<u64>; 2],
    /// The events that changed.
    pub(super) announce: Vec<EventType>,
    pub(super) is_new: bool,
}

impl Staged {
    pub(super) fn get(&self, sequence: i64) -> Option<&Arc<Entry>> {
        let place = self.places.get(&sequence)?;
        self.states.get(*place).map(|next| &next.entry)
    }

    pub(super) fn find(&self, key: Key) -> Option<&Arc<Entry>> {
        self.get(*self.keys.get(&key)?)
    }

    pub(super) fn put(&mut self, next: Next) {
        let sequence = next.entry.sequence;
        self.keys.insert(next.key, sequence);
        self.places.insert(sequence, self.states.len());
        self.states.push(next);
    }
}

/// A capture's state after a settlement; `None` where it no longer waits.
pub(in crate::outbox::sqlite) fn settled(
    current: &Entry,
    settled: &SettledCapture,
) -> Option<Entry> {
    if current.waiting == [None, None] {
        return None;
    }
    // Merged with what is known: the capture's other event may have been replayed
    // while this attempt was under way.
    let mut record = settled.record.clone();
    record.queue_time = current.record.queue_time;
    let mut waiting = current.waiting;
    for (event, waits) in EventType::ALL.into_iter().zip(&mut waiting) {
        if !settled.changed.contains(&event) {
            record
                .event_mut(event)
                .clone_from(current.record.event(event));
        } else if record.event(event).state.is_final() {
            *waits = None;
        }
    }
    let dead = |event| matches!(record.event(event).state, State::DeadLettered { .. });
    let needed = waiting != [None, None] || EventType::ALL.into_iter().any(dead);
    let origin = match &current.origin {
        Origin::Stored => Origin::Stored,
        Origin::New { subject, payloads } => Origin::New {
            subject: *subject,
            payloads: payloads.clone().filter(|_| needed),
        },
    };
    Some(Entry {
        sequence: current.sequence,
        record,
        digest: current.digest,
        shard: current.shard,
        waiting,
        origin,
        since: current.since,
    })
}

/// A capture that is accepted now.
pub(super) fn accepted(
    sequence: i64,
    since: u64,
    capture: NewCapture,
    subject: Option<i64>,
) -> Entry {
    let (state, shard, payloads) = match capture.content {
        Content::Skip { reason } => (State::Skipped { reason }, None, None),
        Content::Send { shard, events } => (State::Queued, Some(shard), Some(events)),
    };
    let bytes = |event| payloads.as_ref().map(|pair| pair.get(event).len() as u64);
    Entry {
        sequence,
        waiting: EventType::ALL.map(bytes),
        record: CaptureRecord {
            integration_id: capture.integration_id,
            capture_id: capture.capture_id,
            region: capture.region,
            mapping_version: capture.mapping_version,
            accept_time: capture.accept_time,
            queue_time: capture.accept_time,
            identify: EventStatus::new(state),
            track: EventStatus::new(state),
            attempts: Vec::new(),
            trace: capture.trace,
        },
        digest: capture.digest,
        shard,
        origin: Origin::New {
            subject,
            payloads: payloads.map(Arc::new),
        },
        since,
    }
}
