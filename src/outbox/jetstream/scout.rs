//! Looks now and then what waits in all lanes: for the bounds, for lanes whose relay has
//! gone, and for what others have stored.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{
    Shared,
    message::{LaneRecord, decode},
    names::{parse_lane_record, parse_queue},
    wire::{ToStore, unavailable},
};
use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError},
};

/// How often.
const INTERVAL: Duration = Duration::from_millis(500);
/// Lanes' records that are asked for at once.
const READ: usize = 500;
/// How long a probe is kept.
const PROBE: Duration = Duration::from_secs(60);

impl Shared {
    /// Captures that wait in each lane that has messages: those of the messages, as the streams' leaders know
    /// it, without those that the lanes' records say are settled, as some replica knows it.
    pub(super) async fn waiting(
        &self,
        id: Option<&IntegrationId>,
    ) -> Result<HashMap<LaneKey, u64>, OutboxError> {
        let mut lanes: HashMap<LaneKey, u64> = HashMap::new();
        let partitions = match id {
            Some(id) => self.layout.partition(id)..self.layout.partition(id) + 1,
            None => 0..self.layout.partitions,
        };
        for partition in partitions {
            let stream = self.layout.stream(partition);
            let all = self.layout.all(partition, 'q', None);
            let filter = self.layout.all(partition, 'q', id);
            let mut own: HashMap<LaneKey, u64> = HashMap::new();
            for (subject, messages) in self.wire.count(&stream, &filter).await? {
                if let Some(queue) = parse_queue(&subject, all.trim_end_matches('>')) {
                    *own.entry(queue.lane).or_default() += queue.captures * messages;
                }
            }
            let subjects: Vec<String> = own.keys().map(|lane| self.layout.lane(lane)).collect();
            for some in subjects.chunks(READ) {
                for stored in self.wire.last_of_each(&stream, some).await? {
                    let Some(lane) = parse_lane_record(&stored.subject) else {
                        continue;
                    };
                    let record: LaneRecord = decode("lane", stored.payload)?;
                    if let Some(count) = own.get_mut(&lane) {
                        *count = count.saturating_sub(record.settled());
                    }
                }
            }
            lanes.extend(own);
        }
        Ok(lanes)
    }

    /// Writes into each stream, to find out whether that works again.
    async fn probe(&self) -> Result<(), OutboxError> {
        for partition in 0..self.layout.partitions {
            let probe = ToStore {
                subject: self.layout.probe(partition),
                payload: bytes::Bytes::new(),
                expected: None,
                keep: Some(PROBE),
            };
            self.wire.store(vec![probe]).await?;
        }
        self.sessions
            .own(Duration::ZERO)
            .map(drop)
            .ok_or_else(|| unavailable("no session"))
    }
}

/// Looks once.
pub(super) async fn look(shared: &Shared) -> Result<Vec<LaneKey>, OutboxError> {
    shared.counts.begin();
    let waiting = shared.waiting(None).await?;
    let lanes: Vec<LaneKey> = waiting.keys().cloned().collect();
    shared.counts.set(waiting);
    Ok(lanes)
}

/// Looks until the outbox closes.
pub(super) async fn run(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = shared.closing.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        if !shared.signals.is_writable() {
            match shared.probe().await {
                Ok(()) => shared.signals.set_writable(true),
                Err(error) => tracing::warn!(%error, "JetStream cannot be written; trying again"),
            }
        }
        match look(&shared).await {
            Ok(lanes) => {
                let own = lanes
                    .into_iter()
                    .filter(|lane| shared.sessions.prefers_own(lane));
                shared.signals.wake_lanes(own);
            }
            Err(error) => tracing::warn!(%error, "what waits cannot be read; trying again"),
        }
        shared.hand_over_misplaced().await;
    }
}
