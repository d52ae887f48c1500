//! Reads what there is of a person's captures.

use std::collections::HashSet;

use super::super::{
    Shared,
    deleter::for_each,
    message::{StoredRecord, decode},
    names::integration_of,
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError, SubjectQuery},
    status::CaptureRecord,
};

/// A capture that is to be erased.
pub(super) struct Erased {
    pub(super) id: IntegrationId,
    pub(super) subject: String,
    pub(super) revision: u64,
    pub(super) stored: StoredRecord,
    pub(super) record: CaptureRecord,
    /// Events that wait.
    pub(super) waits: u64,
    /// Positions of messages that are there, the one where it waits first; and whether they have payloads of it.
    pub(super) places: Vec<(u64, bool)>,
    pub(super) dead: u64,
}

impl Shared {
    pub(super) async fn to_erase(
        &self,
        subjects: &[(usize, String)],
        wanted: &HashSet<i64>,
        query: &SubjectQuery,
    ) -> Result<Vec<Erased>, OutboxError> {
        let mut reads = Vec::new();
        for (partition, subject) in subjects {
            reads.push(self.read_to_erase(*partition, subject, wanted, query));
        }
        Ok(for_each(reads).await?.into_iter().flatten().collect())
    }

    async fn read_to_erase(
        &self,
        partition: usize,
        subject: &str,
        wanted: &HashSet<i64>,
        query: &SubjectQuery,
    ) -> Result<Option<Erased>, OutboxError> {
        let stream = self.layout.stream(partition);
        let Some((found, _)) = self.wire.last(&stream, subject).await? else {
            return Ok(None);
        };
        let only = query.integration_id.as_ref();
        let (revision, subject) = (found.sequence, found.subject);
        let stored: StoredRecord = decode("record", found.payload)?;
        let Some(id) = integration_of(&subject, 1).filter(|id| only.is_none_or(|only| only == id))
        else {
            return Ok(None);
        };
        if stored.subject == 0 {
            // All but this was done before: else older versions would be found again.
            self.wire.purge_before(&stream, &subject, revision).await?;
        }
        if !wanted.contains(&stored.subject) || stored.subject == 0 {
            return Ok(None);
        }
        let record = self.status(&id, revision, &stored).await?;
        let (mut places, mut waits) = (Vec::new(), 0);
        if let Some(lane) = stored.lane(&record) {
            for (number, position) in stored.positions(revision).enumerate() {
                let Some(one) = self.queued_at(&lane, position, &stored.capture_id).await? else {
                    continue;
                };
                let has = |event: &&EventType| one.payload(**event).is_some();
                let waiting =
                    |event: &&EventType| has(event) && !record.event(**event).state.is_final();
                if number == 0 {
                    waits = EventType::ALL.iter().filter(waiting).count() as u64;
                }
                let any = one.identify.is_some() || one.track.is_some();
                places.push((position, any));
            }
        }
        let mut dead = 0;
        for event in EventType::ALL {
            let letter = self.layout.dead(&id, &stored.capture_id, event);
            dead += u64::from(self.wire.last(&stream, &letter).await?.is_some());
        }
        Ok(Some(Erased {
            id,
            subject,
            revision,
            stored,
            record,
            waits,
            places,
            dead,
        }))
    }
}

impl Erased {
    /// The lane in whose messages it is.
    pub(super) fn lane(&self) -> Option<LaneKey> {
        let is_somewhere = !self.places.is_empty();
        is_somewhere
            .then(|| self.stored.lane(&self.record))
            .flatten()
    }
}
