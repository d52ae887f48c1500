//! What each command adds to the group: the next states of captures, and a record in the
//! journal for each capture and each settlement.

use std::sync::Arc;

use super::{
    Committer, Incoming,
    staged::{self, New, Next, PayloadPlace},
};
use crate::{
    event::{EventPair, EventType},
    outbox::{
        Content, EventSet, NewCapture, OutboxError, SettledCapture, Settlement, Submitted,
        sqlite::{
            entry::{Entry, Key},
            journal::record::{ACCEPTED, SETTLED, write_accepted, write_settled},
        },
    },
    proto::DeliveryReason,
    status::{CaptureRecord, State},
};

/// What is known of a capture that was accepted before.
struct Before {
    digest: [u8; 16],
    record: Arc<CaptureRecord>,
}

/// A capture that is settled, as it is now.
struct Current {
    entry: Arc<Entry>,
    /// Where its payloads stand, if this very group accepts it.
    payloads: Option<PayloadPlace>,
    /// What waits of it where only the database has it.
    before: [Option<u64>; 2],
}

impl Committer {
    /// Adds a capture to the group, unless it is known or there is no room.
    pub(super) fn submit(&mut self, incoming: Incoming) -> Result<Submitted, OutboxError> {
        let Incoming {
            key,
            mut capture,
            subject,
        } = incoming;
        if let Some(known) = self.known(key, &capture)?
            && !capture.replaces(&known.record, &known.digest)
        {
            return Ok(if known.digest == capture.digest {
                Submitted::Duplicate(known.record)
            } else {
                Submitted::Conflict
            });
        }
        let skipped = Content::Skip {
            reason: DeliveryReason::Unspecified,
        };
        let (state, sends) = match std::mem::replace(&mut capture.content, skipped) {
            Content::Skip { reason } => (State::Skipped { reason }, None),
            Content::Send { shard, events } => (State::Queued, Some((shard, events))),
        };
        if let Some((_, events)) = &sends {
            let bytes = (events.identify.len() + events.track.len()) as u64;
            let id = &capture.integration_id;
            if let Some(quota) = self.tally.full(&self.limits, id, bytes) {
                return Ok(Submitted::Full(quota));
            }
        }
        self.known.add(key);
        let sizes = |pair: &EventPair| EventType::ALL.map(|event| pair.get(event).len());
        let new = New {
            sequence: self.next_sequence,
            key,
            capture,
            subject,
            state,
            sends: sends.as_ref().map(|(shard, pair)| (*shard, sizes(pair))),
            since: self.journal.last() + 1,
        };
        self.next_sequence += 1;
        let (entry, pair) = (new.entry(), sends.map(|(_, pair)| pair));
        Ok(Submitted::Accepted(self.stage(entry, subject, pair)))
    }

    /// Adds a new capture to the group.
    fn stage(
        &mut self,
        entry: Entry,
        subject: Option<i64>,
        pair: Option<EventPair>,
    ) -> Arc<CaptureRecord> {
        if let Some(lane) = &entry.lane {
            let bytes = entry.waiting.into_iter().flatten().sum();
            self.tally.add(lane, EventSet::BOTH.len() as u64, bytes);
        }
        let parts = EventType::ALL.map(|event| pair.as_ref().map_or(&[][..], |it| it.get(event)));
        let sizes = parts.map(<[u8]>::len);
        self.body.clear();
        write_accepted(&entry, subject, sizes, &mut self.body);
        let end = self
            .journal
            .push(ACCEPTED, &[&self.body, parts[0], parts[1]]);
        let track = end - sizes[1];
        let payloads = pair.is_some().then(|| (track - sizes[0]..end, track));
        let record = Arc::clone(&entry.record);
        self.staged.put(Next {
            entry: Arc::new(entry),
            payloads,
            before: [None, None],
            announce: EventSet::BOTH,
            is_new: true,
        });
        record
    }

    /// A capture that was accepted before.
    fn known(&mut self, key: Key, capture: &NewCapture) -> Result<Option<Before>, OutboxError> {
        if !self.known.may_hold(key) {
            return Ok(None);
        }
        let known = |entry: &Arc<Entry>| Before {
            digest: entry.digest,
            record: Arc::clone(&entry.record),
        };
        if let Some(entry) = self.staged.find(key) {
            return Ok(Some(known(entry)));
        }
        if let Some(entry) = self.shared.lock().find(key) {
            return Ok(Some(known(entry)));
        }
        let found = self
            .lookup
            .find(key, &capture.integration_id, &capture.capture_id)?;
        Ok(found.map(|(digest, record)| Before {
            digest,
            record: Arc::new(record),
        }))
    }

    /// Adds an outcome to the group.
    pub(super) fn settle(&mut self, settlement: &Settlement) -> Result<(), OutboxError> {
        for settled in &settlement.captures {
            let Some(current) = self.current(settlement, settled)? else {
                continue;
            };
            let Some(entry) = staged::settled(&current.entry, settled) else {
                continue;
            };
            let (mut events, mut bytes) = (0, 0);
            for (was, is) in current.entry.waiting.iter().zip(entry.waiting) {
                if let (Some(size), None) = (was, is) {
                    (events, bytes) = (events + 1, bytes + size);
                }
            }
            self.tally.remove(&settlement.lane, events, bytes);
            self.staged.put(Next {
                entry: Arc::new(entry),
                payloads: current.payloads,
                before: current.before,
                announce: settled.changed,
                is_new: false,
            });
        }
        self.body.clear();
        write_settled(settlement, &mut self.body);
        self.journal.push(SETTLED, &[&self.body]);
        Ok(())
    }

    /// A capture as it is now.
    fn current(
        &mut self,
        settlement: &Settlement,
        settled: &SettledCapture,
    ) -> Result<Option<Current>, OutboxError> {
        if let Some(next) = self.staged.get(settled.sequence) {
            return Ok(Some(Current {
                entry: Arc::clone(&next.entry),
                payloads: next.payloads.clone(),
                before: [None, None],
            }));
        }
        if let Some(entry) = self.shared.lock().get(settled.sequence) {
            return Ok(Some(Current {
                entry: Arc::clone(entry),
                payloads: None,
                before: [None, None],
            }));
        }
        let since = self.journal.last() + 1;
        let stored = self.lookup.waiting(&settlement.lane, settled, since)?;
        Ok(stored.map(|entry| Current {
            before: entry.waiting,
            entry: Arc::new(entry),
            payloads: None,
        }))
    }
}
