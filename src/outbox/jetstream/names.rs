//! Names of streams and subjects. The table stands in the module above.

use sha2::{Digest, Sha256};

use super::Layout;
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{LaneKey, SHARDS},
    region::Region,
};

/// The two queues of a lane: live captures, then replayed ones.
pub(super) const QUEUES: [char; 2] = ['l', 'r'];

impl Layout {
    pub(super) fn bucket(&self) -> String {
        format!("{}-state", self.prefix)
    }

    pub(super) fn bucket_stream(&self) -> String {
        format!("KV_{}-state", self.prefix)
    }

    pub(super) fn stream(&self, partition: usize) -> String {
        format!("{}-captures-{partition}", self.prefix)
    }

    pub(super) fn partition(&self, id: &IntegrationId) -> usize {
        let hash = Sha256::digest(id.as_str());
        let number = u64::from_le_bytes(hash[..8].try_into().unwrap_or_default());
        usize::try_from(number % self.partitions as u64).unwrap_or(0)
    }

    pub(super) fn stream_of(&self, id: &IntegrationId) -> String {
        self.stream(self.partition(id))
    }

    fn of(&self, id: &IntegrationId, kind: char) -> String {
        format!("{}.{}.{kind}", self.prefix, self.partition(id))
    }

    /// Where the versions of a capture's record are.
    pub(super) fn record(&self, id: &IntegrationId, capture_id: &str) -> String {
        format!("{}.{id}.{}", self.of(id, 'c'), hashed(capture_id))
    }

    /// Where one of the queues of a lane is.
    pub(super) fn queue(&self, lane: &LaneKey, queue: usize) -> String {
        let queue = QUEUES.get(queue).unwrap_or(&QUEUES[0]);
        format!(
            "{}.{}.{queue}",
            self.of(&lane.integration_id, 'q'),
            lane_token(lane)
        )
    }

    /// Where it says who holds a lane.
    pub(super) fn lane(&self, lane: &LaneKey) -> String {
        format!(
            "{}.{}",
            self.of(&lane.integration_id, 'l'),
            lane_token(lane)
        )
    }

    /// Where a dead letter is.
    pub(super) fn dead(&self, id: &IntegrationId, capture_id: &str, event: EventType) -> String {
        let number = event.to_proto() as i32;
        format!("{}.{id}.{}.{number}", self.of(id, 'd'), hashed(capture_id))
    }

    /// All subjects of a kind in a partition, of one integration or of all.
    pub(super) fn all(&self, partition: usize, kind: char, id: Option<&IntegrationId>) -> String {
        let start = format!("{}.{partition}.{kind}", self.prefix);
        match id {
            Some(id) => format!("{start}.{id}.>"),
            None => format!("{start}.>"),
        }
    }

    /// Written to find out whether a stream can be written.
    pub(super) fn probe(&self, partition: usize) -> String {
        format!("{}.{partition}.p", self.prefix)
    }

    /// Where relays tell each other what happens.
    pub(super) fn news(&self) -> String {
        format!("{}.news", self.prefix)
    }

    /// Where relays ask each other for lanes.
    pub(super) fn wanted(&self) -> String {
        format!("{}.wanted", self.prefix)
    }
}

/// A capture id as a token of a subject.
pub(super) fn hashed(capture_id: &str) -> String {
    hex::encode(&Sha256::digest(capture_id)[..16])
}

/// A lane as three tokens of a subject.
pub(super) fn lane_token(lane: &LaneKey) -> String {
    format!(
        "{}.{}.{}",
        lane.integration_id,
        lane.region.name(),
        lane.shard
    )
}

/// The lane of three tokens.
pub(super) fn parse_lane(token: &str) -> Option<LaneKey> {
    let mut parts = token.split('.');
    let integration_id = IntegrationId::new(parts.next()?)?;
    let region = parts.next()?;
    let region = Region::ALL.into_iter().find(|one| one.name() == region)?;
    let shard = parts.next()?.parse().ok().filter(|shard| *shard < SHARDS)?;
    Some(LaneKey {
        integration_id,
        region,
        shard,
    })
}

/// The lane of a queue's subject, and which queue it is.
pub(super) fn parse_queue(subject: &str) -> Option<(LaneKey, usize)> {
    let (rest, queue) = subject.rsplit_once('.')?;
    let queue = QUEUES.iter().position(|one| queue == one.to_string())?;
    let mut parts = rest.rsplitn(4, '.');
    let (shard, region, id) = (parts.next()?, parts.next()?, parts.next()?);
    Some((parse_lane(&format!("{id}.{region}.{shard}"))?, queue))
}

/// The integration of a record's subject, `…c.<integration>.<id>`.
pub(super) fn integration_of(subject: &str, below: usize) -> Option<IntegrationId> {
    IntegrationId::new(subject.rsplit('.').nth(below)?)
}
