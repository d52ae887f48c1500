//! Dead letters: read and chosen.

use std::collections::{HashMap, HashSet};

use super::{
    Shared,
    deleter::for_each,
    message::{Dead, StoredRecord, decode},
    names::integration_of,
    wire::Stored,
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{DeadLetter, DeadLetterCount, DeadLetterFilter, LaneKey, OutboxError, Selection},
    status::{CaptureRecord, State},
    time::UnixMillis,
};

/// Dead letters that one call takes at the most.
const CHUNK: usize = 400;
/// Dead letters of one read.
const PAGE: (usize, usize) = (400, 8 * 1024 * 1024);
/// Bits of an id for the partition.
const PARTITION_BITS: u32 = 4;

/// A dead letter as it was read.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) partition: usize,
    pub(super) sequence: u64,
    pub(super) id: IntegrationId,
    pub(super) dead: Dead,
    pub(super) event: EventType,
    pub(super) revision: u64,
    pub(super) stored: StoredRecord,
    pub(super) record: CaptureRecord,
}

impl Found {
    fn number(&self) -> i64 {
        number(self.partition, self.sequence)
    }

    pub(super) fn listed(&self) -> DeadLetter {
        let payload = self.dead.payload.as_ref();
        DeadLetter {
            id: self.number(),
            record: self.record.clone(),
            event: self.event,
            time: UnixMillis(self.dead.millis),
            payload_bytes: payload.map_or(0, |one| one.bytes.len() as u64),
        }
    }

    fn fits(&self, filter: &DeadLetterFilter) -> bool {
        let State::DeadLettered { reason, .. } = self.record.event(self.event).state else {
            return false;
        };
        let time = UnixMillis(self.dead.millis);
        filter
            .integrations
            .as_ref()
            .is_none_or(|ids| ids.contains(&self.id))
            && filter.reason.is_none_or(|wanted| wanted == reason)
            && filter.start.is_none_or(|start| time >= start)
            && filter.end.is_none_or(|end| time < end)
    }

    pub(super) fn lane(&self) -> LaneKey {
        LaneKey {
            integration_id: self.id.clone(),
            region: self.record.region,
            shard: u16::try_from(self.dead.shard).unwrap_or(0),
        }
    }
}

/// A place in a partition as one number that grows with both.
pub(super) fn number(partition: usize, sequence: u64) -> i64 {
    i64::try_from((sequence << PARTITION_BITS) | partition as u64).unwrap_or(i64::MAX)
}

/// The same back.
pub(super) fn place(number: i64) -> (usize, u64) {
    let number = u64::try_from(number).unwrap_or(0);
    let partition = number & ((1 << PARTITION_BITS) - 1);
    (
        usize::try_from(partition).unwrap_or(0),
        number >> PARTITION_BITS,
    )
}

impl Shared {
    /// A page of one partition's dead letters, and where the next one begins.
    async fn dead_page(
        &self,
        partition: usize,
        id: Option<&IntegrationId>,
        from: u64,
    ) -> Result<(Vec<Found>, Option<u64>), OutboxError> {
        let filter = self.layout.all(partition, 'd', id);
        let read = self
            .wire
            .read(&self.layout.stream(partition), &filter, from, PAGE)
            .await?;
        let next = read.last().map(|last| last.sequence + 1);
        Ok((self.dead_of(partition, read).await?, next))
    }

    /// Those of the messages that are dead letters still.
    async fn dead_of(
        &self,
        partition: usize,
        read: Vec<Stored>,
    ) -> Result<Vec<Found>, OutboxError> {
        let mut letters = Vec::with_capacity(read.len());
        for stored in read {
            let Some(id) = integration_of(&stored.subject, 2) else {
                continue;
            };
            letters.push((
                id,
                stored.sequence,
                decode::<Dead>("dead letter", stored.payload)?,
            ));
        }
        let subjects: HashSet<String> = letters
            .iter()
            .map(|(id, _, dead)| self.layout.record(id, &dead.capture_id))
            .collect();
        let subjects: Vec<String> = subjects.into_iter().collect();
        if subjects.is_empty() {
            return Ok(Vec::new());
        }
        let records = self
            .wire
            .last_of_each(&self.layout.stream(partition), &subjects)
            .await?;
        let records: HashMap<String, Stored> = records
            .into_iter()
            .map(|one| (one.subject.clone(), one))
            .collect();
        let mut found = Vec::with_capacity(letters.len());
        for (id, sequence, dead) in letters {
            let Some(record) = records.get(&self.layout.record(&id, &dead.capture_id)) else {
                continue;
            };
            let stored: StoredRecord = decode("record", record.payload.clone())?;
            let Some(event) = EventType::ALL
                .into_iter()
                .find(|one| one.to_proto() as i32 == dead.event)
            else {
                continue;
            };
            let opened = stored.open(&id)?;
            // One that was queued again, or given up again later, is left over here.
            let is_it = matches!(opened.event(event).state,
                State::DeadLettered { at, .. } if at.0 == dead.millis);
            if is_it {
                found.push(Found {
                    partition,
                    sequence,
                    id,
                    dead,
                    event,
                    revision: record.sequence,
                    stored,
                    record: opened,
                });
            }
        }
        Ok(found)
    }

    fn partitions_of(&self, integrations: Option<&[IntegrationId]>) -> Vec<usize> {
        match integrations {
            None => (0..self.layout.partitions).collect(),
            Some(ids) => {
                let set: HashSet<usize> = ids.iter().map(|id| self.layout.partition(id)).collect();
                set.into_iter().collect()
            }
        }
    }

    pub(super) async fn list_dead(
        &self,
        filter: &DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, OutboxError> {
        let found = self.select_dead(filter, after, limit).await?;
        Ok(found.iter().map(Found::listed).collect())
    }

    async fn select_dead(
        &self,
        filter: &DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> Result<Vec<Found>, OutboxError> {
        let only = match filter.integrations.as_deref() {
            Some([one]) => Some(one),
            _ => None,
        };
        let mut all = Vec::new();
        for partition in self.partitions_of(filter.integrations.as_deref()) {
            // The first sequence whose number is greater.
            let (after_partition, after_sequence) = place(after);
            let mut from = after_sequence + u64::from(partition <= after_partition);
            let mut own = Vec::new();
            while own.len() < limit {
                let (page, next) = self.dead_page(partition, only, from).await?;
                own.extend(page.into_iter().filter(|one| one.fits(filter)));
                let Some(next) = next else { break };
                from = next;
            }
            all.extend(own);
        }
        all.sort_by_key(Found::number);
        all.truncate(limit);
        Ok(all)
    }

    async fn dead_at(&self, id: i64) -> Result<Option<(usize, Stored)>, OutboxError> {
        let (partition, sequence) = place(id);
        if partition >= self.layout.partitions || sequence == 0 {
            return Ok(None);
        }
        let stored = self
            .wire
            .at(&self.layout.stream(partition), sequence)
            .await?;
        let below = self.layout.all(partition, 'd', None);
        let is_dead = |one: &Stored| one.subject.starts_with(below.trim_end_matches('>'));
        Ok(stored.filter(is_dead).map(|stored| (partition, stored)))
    }

    async fn dead_by_number(
        &self,
        ids: &[i64],
        integrations: Option<&[IntegrationId]>,
    ) -> Result<Vec<Found>, OutboxError> {
        let mut reads = Vec::new();
        for id in ids {
            reads.push(self.dead_at(*id));
        }
        let mut by_partition: HashMap<usize, Vec<Stored>> = HashMap::new();
        for (partition, stored) in for_each(reads).await?.into_iter().flatten() {
            by_partition.entry(partition).or_default().push(stored);
        }
        let mut found = Vec::new();
        for (partition, read) in by_partition {
            found.extend(self.dead_of(partition, read).await?);
        }
        found.retain(|one| integrations.is_none_or(|ids| ids.contains(&one.id)));
        found.sort_by_key(Found::number);
        Ok(found)
    }

    pub(super) async fn count_dead(
        &self,
        selection: &Selection,
        older_than: UnixMillis,
    ) -> Result<DeadLetterCount, OutboxError> {
        let mut sum = DeadLetterCount::default();
        let mut add = |found: &[Found]| {
            for one in found {
                sum.events += 1;
                sum.bytes += one.listed().payload_bytes;
                sum.older += u64::from(one.record.accept_time < older_than);
            }
        };
        match selection {
            Selection::Ids { ids, integrations } => {
                for some in ids.chunks(CHUNK) {
                    add(&self.dead_by_number(some, integrations.as_deref()).await?);
                }
            }
            Selection::Filter(filter) => {
                let mut after = 0;
                loop {
                    let page = self.select_dead(filter, after, CHUNK).await?;
                    let Some(last) = page.last() else { break };
                    after = last.number();
                    add(&page);
                }
            }
        }
        Ok(sum)
    }

    /// The first selected ones. Ids beyond what one call takes are left for the next.
    pub(super) async fn first_dead(
        &self,
        selection: &Selection,
    ) -> Result<Vec<Found>, OutboxError> {
        match selection {
            Selection::Filter(filter) => self.select_dead(filter, 0, CHUNK).await,
            Selection::Ids { ids, integrations } => {
                for some in ids.chunks(CHUNK) {
                    let found = self.dead_by_number(some, integrations.as_deref()).await?;
                    if !found.is_empty() {
                        return Ok(found);
                    }
                }
                Ok(Vec::new())
            }
        }
    }
}
