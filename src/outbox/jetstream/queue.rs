//! Reads what waits. Where an erasure has changed a message, another one stands in its place: it
//! has the same captures at the same places, those that were erased without their payloads.

use std::collections::BTreeSet;

use super::{
    Shared,
    chunk::unpack,
    deleter::for_each,
    message::{StoredRecord, Waiting},
    names::parse_queue,
    position::split,
    wire::Stored,
};
use crate::outbox::{LaneKey, OutboxError};

/// Messages of one read at the most.
const READ: usize = 500;
/// Messages of those that stand in the place of others: each takes a question of its own.
const REPLACED: usize = 16;

/// The sequences of the messages that others have taken the place of, of both queues.
pub(super) type Replaced = [BTreeSet<u64>; 2];

/// A message of a queue.
pub(super) struct ReadChunk {
    /// Its sequence, or that of the message whose place it takes.
    pub(super) sequence: u64,
    /// Its own sequence.
    pub(super) stored_at: u64,
    pub(super) captures: Vec<Waiting>,
    /// Bytes of the message, which may be compressed.
    pub(super) bytes: usize,
}

impl ReadChunk {
    fn of(stored: Stored, sequence: u64) -> Result<Self, OutboxError> {
        Ok(Self {
            sequence,
            stored_at: stored.sequence,
            bytes: stored.payload.len(),
            captures: unpack(stored.payload)?,
        })
    }
}

impl Shared {
    /// The messages that have taken the place of others, as the stream's leader knows it.
    pub(super) async fn replaced(&self, lane: &LaneKey) -> Result<Replaced, OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let mut found = Replaced::default();
        for (queue, own) in found.iter_mut().enumerate() {
            let subjects = self.layout.all_replaced(lane, queue);
            for (subject, _) in self.wire.count(&stream, &subjects).await? {
                own.extend(self.parse_queue(lane, &subject).and_then(|it| it.replaces));
            }
        }
        Ok(found)
    }

    pub(super) fn parse_queue(
        &self,
        lane: &LaneKey,
        subject: &str,
    ) -> Option<super::names::QueueSubject> {
        let partition = self.layout.partition(&lane.integration_id);
        let all = self.layout.all(partition, 'q', None);
        parse_queue(subject, all.trim_end_matches('>'))
    }

    /// The next messages of a queue from a sequence on, of about so many bytes; from any replica, so
    /// the newest may be missing. At least one if there is one.
    pub(super) async fn read_queue(
        &self,
        lane: &LaneKey,
        queue: usize,
        replaced: &Replaced,
        (from, max_bytes): (u64, usize),
    ) -> Result<Vec<ReadChunk>, OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let subjects = self.layout.chunks(lane, queue);
        let mut from = from;
        loop {
            let bound = (READ, max_bytes);
            let mut read = self.wire.read(&stream, &subjects, from, bound).await?;
            let next_other = replaced[queue].range(from..).next().copied();
            if let (true, Some(other)) = (read.is_empty(), next_other) {
                // A replica that is behind may lack what comes before that.
                let next = self.wire.next(&stream, &subjects, from).await?;
                read.extend(next.filter(|next| next.sequence < other));
            }
            let end = match (read.last(), next_other) {
                (Some(last), _) => last.sequence,
                (None, Some(other)) => other,
                (None, None) => return Ok(Vec::new()),
            };
            let mut others: Vec<u64> = replaced[queue].range(from..=end).copied().collect();
            let mut last = end;
            if others.len() > REPLACED {
                // The rest is read the next time.
                others.truncate(REPLACED);
                last = others.last().copied().unwrap_or(end);
                read.retain(|one| one.sequence <= last);
            }
            let mut chunks = Vec::with_capacity(read.len());
            for stored in read {
                let sequence = stored.sequence;
                if !replaced[queue].contains(&sequence) {
                    chunks.push((sequence, stored));
                }
            }
            for sequence in others {
                if let Some(stored) = self.replaced_at(lane, sequence).await? {
                    chunks.push((sequence, stored));
                }
            }
            chunks.sort_by_key(|(sequence, _)| *sequence);
            let mut found = Vec::with_capacity(chunks.len());
            for (sequence, stored) in chunks {
                // Not passed over: it would be removed with what is settled behind it.
                found.push(ReadChunk::of(stored, sequence)?);
            }
            if !found.is_empty() {
                return Ok(found);
            }
            from = last + 1;
        }
    }

    /// Removes the messages whose place others have taken, and those among them that were replaced again: whoever
    /// erased something may have died before.
    pub(super) async fn finish_replacing(
        &self,
        lane: &LaneKey,
        sequences: impl Iterator<Item = u64>,
    ) -> Result<(), OutboxError> {
        let mut removals = Vec::new();
        for sequence in sequences {
            removals.push(self.remove_replaced(lane, sequence));
        }
        for_each(removals).await.map(drop)
    }

    async fn remove_replaced(&self, lane: &LaneKey, sequence: u64) -> Result<(), OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let subject = self.layout.replaced_at(lane, sequence);
        let Some((newest, _)) = self.wire.last(&stream, &subject).await? else {
            return Ok(());
        };
        self.wire.delete(&stream, sequence, true).await?;
        while let Some(older) = self.wire.next(&stream, &subject, sequence).await?
            && older.sequence < newest.sequence
        {
            self.wire.delete(&stream, older.sequence, true).await?;
        }
        Ok(())
    }

    /// The message that took the place of another one, as the stream's leader has it.
    async fn replaced_at(
        &self,
        lane: &LaneKey,
        sequence: u64,
    ) -> Result<Option<Stored>, OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let subject = self.layout.replaced_at(lane, sequence);
        let found = self.wire.last(&stream, &subject).await?;
        Ok(found.map(|(stored, _)| stored))
    }

    /// The message of a lane at a sequence, as the stream's leader has it, and its queue.
    pub(super) async fn chunk_at(
        &self,
        lane: &LaneKey,
        sequence: u64,
    ) -> Result<Option<(usize, ReadChunk)>, OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let of_lane = |stored: &Stored| {
            let parsed = self.parse_queue(lane, &stored.subject)?;
            (parsed.lane == *lane).then_some(parsed.queue)
        };
        // The one in its place first: only there nothing is that was erased.
        let stored = match self.replaced_at(lane, sequence).await? {
            Some(stored) => Some(stored),
            None => self.wire.at(&stream, sequence).await?,
        };
        let Some(stored) = stored else {
            return Ok(None);
        };
        match of_lane(&stored) {
            Some(queue) => Ok(Some((queue, ReadChunk::of(stored, sequence)?))),
            None => Ok(None),
        }
    }

    /// Where a capture waits, and with what.
    pub(super) async fn queued(
        &self,
        lane: &LaneKey,
        revision: u64,
        stored: &StoredRecord,
    ) -> Result<Option<(u64, Waiting)>, OutboxError> {
        let Some(position) = stored.position(revision) else {
            return Ok(None);
        };
        let found = self.queued_at(lane, position, &stored.capture_id).await?;
        Ok(found.map(|waiting| (position, waiting)))
    }

    /// A capture at a position, with the payloads that are there.
    pub(super) async fn queued_at(
        &self,
        lane: &LaneKey,
        position: u64,
        capture_id: &str,
    ) -> Result<Option<Waiting>, OutboxError> {
        let (sequence, index) = split(position);
        let Some((_, mut chunk)) = self.chunk_at(lane, sequence).await? else {
            return Ok(None);
        };
        if index >= chunk.captures.len() {
            return Ok(None);
        }
        let waiting = chunk.captures.swap_remove(index);
        let record = waiting.record.as_ref();
        let is_it = record.is_some_and(|one| one.capture_id == capture_id);
        Ok(is_it.then_some(waiting))
    }
}
