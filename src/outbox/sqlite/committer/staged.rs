//! What a group of commands makes of captures, before it is durable: nobody else
//! sees it.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use foldhash::HashMap;

use crate::{
    event::EventType,
    outbox::{
        EventSet, LaneKey, NewCapture, SettledCapture,
        sqlite::entry::{Entry, Key, Origin, Payloads},
    },
    status::{CaptureRecord, EventStatus, State},
};

/// Next states of captures, in the order in which they came about.
#[derive(Default)]
pub(super) struct Staged {
    pub(super) states: Vec<Next>,
    /// Places of the newest states, but of those that are new captures and unchanged since.
    changed: HashMap<i64, usize>,
    /// Sequences and places of new captures, in their order.
    new: Vec<(i64, usize)>,
}

/// Where both payloads of a capture stand in its group, and where the second begins.
pub(super) type PayloadPlace = (Range<usize>, usize);

/// One next state.
pub(super) struct Next {
    pub(super) entry: Arc<Entry>,
    /// Where the payloads of a new one stand in the group.
    pub(super) payloads: Option<PayloadPlace>,
    /// What waited of it in the database.
    pub(super) before: [Option<u64>; 2],
    /// The events that changed.
    pub(super) announce: EventSet,
    pub(super) is_new: bool,
}

impl Staged {
    pub(super) fn get(&self, sequence: i64) -> Option<&Next> {
        let place = self.changed.get(&sequence).copied();
        self.states
            .get(place.or_else(|| self.place_of_new(sequence))?)
    }

    /// Most that is asked for was accepted before this group.
    fn place_of_new(&self, sequence: i64) -> Option<usize> {
        self.new.first().filter(|first| first.0 <= sequence)?;
        let found = self.new.binary_search_by_key(&sequence, |new| new.0);
        found.ok().map(|at| self.new[at].1)
    }

    /// Goes through all of them: asked only where a key may be known.
    pub(super) fn find(&self, key: Key) -> Option<&Arc<Entry>> {
        let mut newest_first = self.states.iter().rev();
        let found = newest_first.find(|next| next.entry.key == key);
        found.map(|next| &next.entry)
    }

    pub(super) fn put(&mut self, next: Next) {
        let place = (next.entry.sequence, self.states.len());
        if next.is_new {
            self.new.push(place);
        } else {
            self.changed.insert(place.0, place.1);
        }
        self.states.push(next);
    }

    /// Gives new captures their payloads, which stand in the group as it was written.
    pub(super) fn place_payloads(&mut self, group: &Bytes) {
        for next in &mut self.states {
            let Some((range, track)) = next.payloads.take() else {
                continue;
            };
            // Nobody else has it before it is durable.
            if let Some(entry) = Arc::get_mut(&mut next.entry)
                && let Origin::New { payloads, .. } = &mut entry.origin
                && payloads.is_some()
            {
                let identify_bytes = track - range.start;
                *payloads = Some(Payloads::new(group.slice(range), identify_bytes));
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.states.clear();
        self.changed.clear();
        self.new.clear();
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
    let record = merged(current, settled);
    let mut waiting = current.waiting;
    for (event, waits) in EventType::ALL.into_iter().zip(&mut waiting) {
        if settled.changed.contains(event) && record.event(event).state.is_final() {
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
        key: current.key,
        record,
        digest: current.digest,
        lane: current.lane.clone(),
        waiting,
        origin,
        since: current.since,
    })
}

/// What an attempt made of a capture, merged with what is known: its other event may have
/// been replayed while the attempt was under way.
fn merged(current: &Entry, settled: &SettledCapture) -> Arc<CaptureRecord> {
    let queue_time = current.record.queue_time;
    if settled.changed == EventSet::BOTH && settled.record.queue_time == queue_time {
        return Arc::clone(&settled.record);
    }
    let mut record = CaptureRecord::clone(&settled.record);
    record.queue_time = queue_time;
    for event in EventType::ALL {
        if !settled.changed.contains(event) {
            let known = current.record.event(event);
            record.event_mut(event).clone_from(known);
        }
    }
    Arc::new(record)
}

/// What is to become of a capture that is accepted now.
pub(super) struct New {
    pub(super) sequence: i64,
    pub(super) key: Key,
    pub(super) capture: NewCapture,
    pub(super) subject: Option<i64>,
    pub(super) state: State,
    /// Where there is something to send: the lane's shard, and the sizes of the events.
    pub(super) sends: Option<(u16, [usize; 2])>,
    /// Number of its record in the journal.
    pub(super) since: u64,
}

impl New {
    /// Its first state. The payloads are placed later.
    pub(super) fn entry(self) -> Entry {
        let capture = self.capture;
        let lane = self.sends.map(|(shard, _)| LaneKey {
            integration_id: capture.integration_id.clone(),
            region: capture.region,
            shard,
        });
        Entry {
            sequence: self.sequence,
            key: self.key,
            record: Arc::new(CaptureRecord {
                integration_id: capture.integration_id,
                capture_id: capture.capture_id,
                region: capture.region,
                mapping_version: capture.mapping_version,
                accept_time: capture.accept_time,
                queue_time: capture.accept_time,
                identify: EventStatus::new(self.state),
                track: EventStatus::new(self.state),
                attempts: Vec::new(),
                trace: capture.trace,
            }),
            digest: capture.digest,
            lane,
            waiting: match self.sends {
                Some((_, sizes)) => sizes.map(|bytes| Some(bytes as u64)),
                None => [None, None],
            },
            origin: Origin::New {
                subject: self.subject,
                payloads: self.sends.map(|_| Payloads::default()),
            },
            since: self.since,
        }
    }
}
