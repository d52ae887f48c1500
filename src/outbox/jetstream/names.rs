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

    fn queue(&self, lane: &LaneKey, queue: usize) -> String {
        let queue = QUEUES.get(queue).unwrap_or(&QUEUES[0]);
        format!(
            "{}.{}.{queue}",
            self.of(&lane.integration_id, 'q'),
            lane_token(lane)
        )
    }

    /// Where a message with so many captures of a queue is.
    pub(super) fn chunk(&self, lane: &LaneKey, queue: usize, captures: usize) -> String {
        format!("{}.{captures}", self.queue(lane, queue))
    }

    /// All messages of a queue as they were accepted.
    pub(super) fn chunks(&self, lane: &LaneKey, queue: usize) -> String {
        format!("{}.*", self.queue(lane, queue))
    }

    /// Where a message is that takes the place of the one with this sequence.
    pub(super) fn replaced(
        &self,
        lane: &LaneKey,
        queue: usize,
        sequence: u64,
        captures: usize,
    ) -> String {
        format!("{}.{sequence}.{captures}", self.queue(lane, queue))
    }

    /// The messages that take the place of one with this sequence, in either queue.
    pub(super) fn replaced_at(&self, lane: &LaneKey, sequence: u64) -> String {
        let of = self.of(&lane.integration_id, 'q');
        format!("{of}.{}.*.{sequence}.*", lane_token(lane))
    }

    /// All messages of a queue that take the place of others.
    pub(super) fn all_replaced(&self, lane: &LaneKey, queue: usize) -> String {
        format!("{}.*.*", self.queue(lane, queue))
    }

    /// Where it says what became of captures of a chunk, from this place in it on.
    pub(super) fn outcomes(&self, lane: &LaneKey, sequence: u64, first: usize) -> String {
        let of = self.of(&lane.integration_id, 's');
        format!("{of}.{}.{sequence}.{first}", lane_token(lane))
    }

    /// All that became of captures of a chunk.
    pub(super) fn all_outcomes(&self, lane: &LaneKey, sequence: u64) -> String {
        let of = self.of(&lane.integration_id, 's');
        format!("{of}.{}.{sequence}.*", lane_token(lane))
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

/// The lane of its record's subject.
pub(super) fn parse_lane_record(subject: &str) -> Option<LaneKey> {
    let mut parts = subject.rsplitn(4, '.');
    let (shard, region, id) = (parts.next()?, parts.next()?, parts.next()?);
    parse_lane(&format!("{id}.{region}.{shard}"))
}

/// What a message of a queue's subject tells of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct QueueSubject {
    pub(super) lane: LaneKey,
    pub(super) queue: usize,
    /// The sequence of the message whose place it takes.
    pub(super) replaces: Option<u64>,
    /// How many captures it has.
    pub(super) captures: u64,
}

/// Takes a queue's subject below `…q.` apart.
pub(super) fn parse_queue(subject: &str, kind: &str) -> Option<QueueSubject> {
    let mut parts = subject.strip_prefix(kind)?.split('.');
    let lane = [parts.next()?, parts.next()?, parts.next()?].join(".");
    let letter = parts.next()?;
    let queue = QUEUES.iter().position(|one| letter == one.to_string())?;
    let first = parts.next()?.parse().ok()?;
    let (replaces, captures) = match parts.next() {
        None => (None, first),
        Some(captures) => (Some(first), captures.parse().ok()?),
    };
    let subject = QueueSubject {
        lane: parse_lane(&lane)?,
        queue,
        replaces,
        captures,
    };
    parts.next().is_none().then_some(subject)
}

/// The integration of a record's subject, `…c.<integration>.<id>`.
pub(super) fn integration_of(subject: &str, below: usize) -> Option<IntegrationId> {
    IntegrationId::new(subject.rsplit('.').nth(below)?)
}
