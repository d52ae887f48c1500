//! What became of captures that were delivered at the first try: one message for those of
//! a chunk that were settled together, instead of a new version of each one's record.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use prost::Message;

use super::{
    Shared,
    deleter::for_each,
    lanes::Leased,
    message::{Outcomes, SharedOutcome, StoredRecord, decode},
    position::split,
    wire::{ToStore, unavailable},
};
use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError, record},
    status::{CaptureRecord, State},
    time::UnixMillis,
};

/// How much longer than the records, whose time begins when the servers store them.
const MARGIN: Duration = Duration::from_secs(600);
/// Messages of one chunk that are read at the most: each settlement of a part of it is one.
const MAX_MESSAGES: usize = 1_024;

/// Whether a capture's outcome may stand in a message with others: nothing of it was ever tried before,
/// both events are through, and its record, whose time began with its acceptance, is kept for at least
/// half of the time that an own one would be.
pub(super) fn may_share(
    leased: &Leased,
    next: &CaptureRecord,
    remember: Duration,
    now: UnixMillis,
) -> bool {
    let through = |state| matches!(state, State::Delivered { .. } | State::Skipped { .. });
    !leased.stored.own
        && leased.revision > 0
        && leased.record.queue_time == next.queue_time
        && through(next.identify.state)
        && through(next.track.state)
        && kept_for(leased, now) >= remember / 2
}

/// How long the servers keep its record from now on.
fn kept_for(leased: &Leased, now: UnixMillis) -> Duration {
    UnixMillis(leased.stored.kept_until).since(now)
}

/// Puts the outcomes of captures into one message for each chunk, which is kept longer than
/// their records.
pub(super) fn messages<'a>(
    shared: &Shared,
    lane: &LaneKey,
    captures: impl Iterator<Item = (&'a Leased, CaptureRecord)>,
    now: UnixMillis,
) -> Vec<ToStore> {
    type Own = (Duration, Vec<(usize, CaptureRecord)>);
    let mut chunks: BTreeMap<u64, Own> = BTreeMap::new();
    for (leased, record) in captures {
        let (sequence, index) = split(leased.position);
        let own = chunks.entry(sequence).or_default();
        own.0 = own.0.max(kept_for(leased, now));
        own.1.push((index, record));
    }
    let mut messages = Vec::with_capacity(chunks.len());
    for (sequence, (keep, mut captures)) in chunks {
        captures.sort_by_key(|(index, _)| *index);
        let first = captures.first().map_or(0, |(index, _)| *index);
        messages.push(ToStore {
            subject: shared.layout.outcomes(lane, sequence, first),
            payload: joined(&captures).encode_to_vec().into(),
            expected: None,
            keep: Some(keep + MARGIN),
        });
    }
    messages
}

/// Neighbours with the same outcome share it.
fn joined(captures: &[(usize, CaptureRecord)]) -> Outcomes {
    let mut outcomes: Vec<SharedOutcome> = Vec::new();
    let mut before: Option<&(usize, CaptureRecord)> = None;
    for one in captures {
        let (index, record) = one;
        let place = u32::try_from(*index).unwrap_or(u32::MAX);
        let goes_on = before.is_some_and(|(before, of)| {
            before + 1 == *index
                && (&of.identify, &of.track, &of.attempts)
                    == (&record.identify, &record.track, &record.attempts)
        });
        before = Some(one);
        match outcomes.last_mut() {
            Some(last) if goes_on => last.last = place,
            _ => outcomes.push(SharedOutcome {
                first: place,
                last: place,
                status: record::encode(record),
            }),
        }
    }
    Outcomes { outcomes }
}

/// What the outcomes of a chunk say of the capture at a place in it.
fn find(
    outcomes: &[Outcomes],
    index: usize,
    mut record: CaptureRecord,
) -> Result<CaptureRecord, OutboxError> {
    let place = u32::try_from(index).unwrap_or(u32::MAX);
    let found = outcomes
        .iter()
        .flat_map(|one| &one.outcomes)
        .find(|one| (one.first..=one.last).contains(&place));
    if let Some(found) = found {
        let shared = record::decode(
            record.integration_id.clone(),
            record.capture_id.clone(),
            &found.status,
        )
        .map_err(|error| super::message::damaged("outcome", &error))?;
        record.identify = shared.identify;
        record.track = shared.track;
        record.attempts = shared.attempts;
    }
    Ok(record)
}

/// A record as it was read: whose it is, the version's sequence, and what it says.
pub(super) type Version = (IntegrationId, u64, StoredRecord);

impl Shared {
    /// The status of captures of one partition, also where it does not stand in their records. The
    /// records have to be read before, so that nothing is missed in between.
    pub(super) async fn statuses(
        &self,
        versions: &[Version],
    ) -> Result<Vec<CaptureRecord>, OutboxError> {
        let mut chunks: BTreeMap<u64, LaneKey> = BTreeMap::new();
        let mut places = Vec::with_capacity(versions.len());
        let mut records = Vec::with_capacity(versions.len());
        for (id, revision, stored) in versions {
            let record = stored.open(id)?;
            let place = match (stored.own, stored.lane(&record)) {
                (false, Some(lane)) => stored.position(*revision).map(|it| (lane, split(it))),
                _ => None,
            };
            places.push(place.map(|(lane, place)| {
                chunks.entry(place.0).or_insert(lane);
                place
            }));
            records.push(record);
        }
        let mut reads = Vec::new();
        for (sequence, lane) in &chunks {
            reads.push(self.outcomes_of(lane, *sequence));
        }
        let outcomes = for_each(reads).await?;
        let outcomes: HashMap<u64, Vec<Outcomes>> = chunks.into_keys().zip(outcomes).collect();
        let with_places = records.into_iter().zip(places);
        with_places
            .map(|(record, place)| match place {
                None => Ok(record),
                Some((sequence, index)) => {
                    let outcomes = outcomes.get(&sequence).map_or(&[][..], Vec::as_slice);
                    find(outcomes, index, record)
                }
            })
            .collect()
    }

    /// The status of one capture.
    pub(super) async fn status(
        &self,
        id: &IntegrationId,
        revision: u64,
        stored: &StoredRecord,
    ) -> Result<CaptureRecord, OutboxError> {
        let version = (id.clone(), revision, stored.clone());
        let mut found = self.statuses(&[version]).await?;
        found.pop().ok_or_else(|| unavailable("no status"))
    }

    async fn outcomes_of(
        &self,
        lane: &LaneKey,
        sequence: u64,
    ) -> Result<Vec<Outcomes>, OutboxError> {
        let stream = self.layout.stream_of(&lane.integration_id);
        let subject = self.layout.all_outcomes(lane, sequence);
        let (mut from, mut found) = (sequence, Vec::new());
        while found.len() < MAX_MESSAGES {
            let Some(stored) = self.wire.next(&stream, &subject, from).await? else {
                break;
            };
            from = stored.sequence + 1;
            found.push(decode("outcome", stored.payload)?);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{region::Region, status::EventStatus};

    fn capture(at: Option<i64>) -> CaptureRecord {
        let event = EventStatus::new(match at {
            None => State::Queued,
            Some(at) => State::Delivered { at: UnixMillis(at) },
        });
        CaptureRecord {
            integration_id: IntegrationId::new("acme").expect("valid"),
            capture_id: "c".to_owned(),
            region: Region::Eu,
            mapping_version: 7,
            accept_time: UnixMillis(5),
            queue_time: UnixMillis(5),
            identify: event.clone(),
            track: event,
            attempts: Vec::new(),
            trace: None,
        }
    }

    #[test]
    fn neighbours_share_an_outcome_and_each_finds_its_own() {
        let at = [(3, 1), (4, 1), (5, 2), (7, 2)];
        let captures: Vec<_> = at
            .iter()
            .map(|(index, at)| (*index, capture(Some(*at))))
            .collect();
        let outcomes = joined(&captures);
        let ranges: Vec<_> = outcomes
            .outcomes
            .iter()
            .map(|one| (one.first, one.last))
            .collect();
        assert_eq!(ranges, [(3, 4), (5, 5), (7, 7)]);
        for (index, wanted) in captures {
            let found = find(std::slice::from_ref(&outcomes), index, capture(None));
            assert_eq!(found, Ok(wanted));
        }
        for index in [2, 6, 8] {
            let found = find(std::slice::from_ref(&outcomes), index, capture(None));
            assert_eq!(found, Ok(capture(None)));
        }
    }
}
