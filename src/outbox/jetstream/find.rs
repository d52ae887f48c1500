//! Finds captures: one by its id, and a person's by reading all records.

use std::collections::HashSet;

use super::{
    Shared,
    dead_letters::number,
    message::{StoredRecord, decode},
    names::integration_of,
    wire::unavailable,
};
use crate::{
    integration::IntegrationId,
    outbox::{FoundSubject, OutboxError, SubjectQuery},
    status::CaptureRecord,
};

/// Records of one read.
const PAGE: (usize, usize) = (5_000, 8 * 1024 * 1024);
/// Captures of one person that a search finds at the most.
const MAX_FOUND: usize = 100_000;

impl Shared {
    pub(super) async fn search(&self, query: &SubjectQuery) -> Result<FoundSubject, OutboxError> {
        let wanted: HashSet<i64> = query
            .user_ids
            .iter()
            .map(|id| self.sealing.subject(id))
            .collect();
        let mut found = FoundSubject::default();
        for partition in 0..self.layout.partitions {
            let only = query.integration_id.as_ref();
            if only.is_some_and(|id| self.layout.partition(id) != partition) {
                continue;
            }
            let filter = self.layout.all(partition, 'c', only);
            let stream = self.layout.stream(partition);
            let (mut from, mut known) = (0, HashSet::new());
            loop {
                let page = self.wire.read(&stream, &filter, from, PAGE).await?;
                let Some(last) = page.last() else { break };
                from = last.sequence + 1;
                for one in page {
                    let record: StoredRecord = decode("record", one.payload)?;
                    if !wanted.contains(&record.subject) || record.subject == 0 {
                        continue;
                    }
                    let Some(id) = integration_of(&one.subject, 1) else {
                        continue;
                    };
                    // The first version is there for longest; the last one says where it waits.
                    let opened = record.open(&id)?;
                    if !record.own || !opened.is_final() {
                        found.lanes.extend(record.lane(&opened));
                    }
                    if known.insert(one.subject) && found.captures.len() < MAX_FOUND {
                        found.captures.push(number(partition, one.sequence));
                    }
                }
            }
        }
        found.lanes.sort_unstable();
        found.lanes.dedup();
        let waiting = self.waiting(query.integration_id.as_ref()).await?;
        found.lanes.retain(|lane| waiting.contains_key(lane));
        Ok(found)
    }

    /// The last version of a record, as the leader has it.
    pub(super) async fn find_record(
        &self,
        id: &IntegrationId,
        capture_id: &str,
    ) -> Result<Option<CaptureRecord>, OutboxError> {
        let subject = self.layout.record(id, capture_id);
        let found = self.wire.last(&self.layout.stream_of(id), &subject).await?;
        let Some((stored, _)) = found else {
            return Ok(None);
        };
        let (revision, payload) = (stored.sequence, stored.payload);
        let stored: StoredRecord = decode("record", payload)?;
        if stored.capture_id != capture_id {
            return Err(unavailable("a record of another capture"));
        }
        self.status(id, revision, &stored).await.map(Some)
    }
}
