//! Dead letters go back into the queue, or away.

use std::collections::{HashMap, HashSet};

use prost::Message;

use super::{
    Shared,
    chunk::{Packer, ToPack},
    dead_letters::Found,
    deleter::for_each,
    message::Waiting,
    wire::{StoreError, ToStore, unavailable},
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError, Quota, Selection},
    status::CaptureRecord,
    time::UnixMillis,
};

/// Tries to store after others were faster.
const TRIES: u32 = 10;

impl Shared {
    pub(super) async fn replay_dead(
        &self,
        selection: &Selection,
        now: UnixMillis,
    ) -> Result<Result<u64, Quota>, OutboxError> {
        for _ in 0..TRIES {
            let found = self.first_dead(selection).await?;
            let mut captures: Vec<Vec<Found>> = Vec::new();
            let mut places: HashMap<(IntegrationId, String), usize> = HashMap::new();
            for one in found {
                let key = (one.id.clone(), one.dead.capture_id.clone());
                let place = *places.entry(key).or_insert(captures.len());
                match captures.get_mut(place) {
                    Some(own) => own.push(one),
                    None => captures.push(vec![one]),
                }
            }
            match self.requeue(&captures, now).await {
                Ok(replayed) => return Ok(replayed),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(unavailable("dead letters change all the time"))
    }

    /// Queues captures again, all of one partition in one batch.
    async fn requeue(
        &self,
        captures: &[Vec<Found>],
        now: UnixMillis,
    ) -> Result<Result<u64, Quota>, StoreError> {
        let Some(partition) = captures
            .first()
            .and_then(|own| own.first())
            .map(|one| one.partition)
        else {
            return Ok(Ok(0));
        };
        let mut batch = Packer::new(&self.layout);
        let (mut gone, mut lanes, mut changes) = (Vec::new(), HashSet::new(), Vec::new());
        let mut more: HashMap<IntegrationId, u64> = HashMap::new();
        let (mut replayed, mut all) = (0, 0);
        let own_partition = captures
            .iter()
            .filter(|own| own.iter().all(|one| one.partition == partition));
        for own in own_partition {
            let Some(first) = own.first() else { continue };
            let bytes: usize = own
                .iter()
                .map(|one| one.listed().payload_bytes as usize)
                .sum();
            let beside = more.entry(first.id.clone()).or_default();
            if let Some(quota) = self.counts.full(&first.id, bytes, (*beside, all)) {
                if replayed == 0 {
                    return Ok(Err(quota));
                }
                break;
            }
            (*beside, all) = (*beside + 1, all + 1);
            let requeued = requeued(self, own, now, &mut changes).await;
            let requeued = requeued.map_err(|error| StoreError::Refused(error.to_string()))?;
            requeued.into_iter().for_each(|one| batch.add(one));
            replayed += own.len() as u64;
            gone.extend(own.iter().map(|one| one.sequence));
            gone.push(first.revision);
            lanes.insert(first.lane());
        }
        self.wire.store(batch.finish()).await?;
        let stream = self.layout.stream(partition);
        let mut removed = Vec::new();
        for sequence in gone {
            removed.push(self.wire.delete(&stream, sequence, false));
        }
        if let Err(error) = for_each(removed).await {
            // They are no dead letters any more: their records say so.
            tracing::warn!(%error, "replayed dead letters were not removed");
        }
        let lanes: Vec<LaneKey> = lanes.into_iter().collect();
        self.announce(changes, now).await;
        self.tell_lanes(&lanes).await;
        Ok(Ok(replayed))
    }

    /// Removes the first of the selected dead letters.
    pub(super) async fn discard_dead(&self, selection: &Selection) -> Result<u64, OutboxError> {
        let found = self.first_dead(selection).await?;
        let mut last_of: HashMap<(IntegrationId, String), &Found> = HashMap::new();
        for one in &found {
            last_of.insert((one.id.clone(), one.dead.capture_id.clone()), one);
        }
        for one in &found {
            self.wire
                .delete(&self.layout.stream(one.partition), one.sequence, true)
                .await?;
        }
        // What is remembered of them is forgotten in time now, where no other letter is left.
        for one in last_of.into_values() {
            let stream = self.layout.stream(one.partition);
            let mut letters = 0;
            for event in EventType::ALL {
                let subject = self.layout.dead(&one.id, &one.dead.capture_id, event);
                letters += usize::from(self.wire.last(&stream, &subject).await?.is_some());
            }
            if letters > 0 || !one.record.is_final() {
                continue;
            }
            let stored = self.wire.store(vec![ToStore {
                subject: self.layout.record(&one.id, &one.dead.capture_id),
                payload: one.stored.encode_to_vec().into(),
                expected: Some(one.revision),
                keep: Some(self.options.remember),
            }]);
            match stored.await {
                Ok(_) => self.deleter.remove(&stream, one.revision),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(found.len() as u64)
    }
}

/// A capture whose dead letters are queued again.
async fn requeued(
    shared: &Shared,
    own: &[Found],
    now: UnixMillis,
    changes: &mut Vec<(CaptureRecord, Vec<EventType>)>,
) -> Result<Option<ToPack>, OutboxError> {
    let Some(first) = own.first() else {
        return Ok(None);
    };
    let mut record = first.record.clone();
    let mut stored = first.stored.clone();
    // Where the capture's other event waits, its message may still have both payloads.
    let queued = match record.is_final() {
        true => None,
        false => {
            shared
                .queued(&first.lane(), first.revision, &stored)
                .await?
        }
    };
    record.queue_time = now;
    let mut waiting = Waiting::default();
    let mut events = Vec::new();
    for one in own {
        record.event_mut(one.event).replay();
        let is_there = queued
            .as_ref()
            .is_some_and(|(_, queued)| queued.payload(one.event).is_some());
        if !is_there {
            *waiting.payload_mut(one.event) = one.dead.payload.clone();
        }
        events.push(one.event);
    }
    let again = waiting != Waiting::default();
    stored.set(&record);
    match &queued {
        Some((position, _)) if !again => stored.queue_at(*position),
        _ => stored.move_away(first.revision),
    }
    let capture = ToPack {
        id: first.id.clone(),
        stored,
        expected: first.revision,
        keep: Some(shared.options.remember),
        waiting: again.then(|| (first.lane(), 1, waiting)),
    };
    changes.push((record, events));
    Ok(Some(capture))
}
