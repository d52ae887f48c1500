//! Looks now and then what waits in all lanes: for the bounds, for lanes whose relay has
//! gone, and for what others have stored.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{
    Shared,
    names::parse_queue,
    wire::{ToStore, unavailable},
};
use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, OutboxError},
};

/// How often.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long a probe is kept.
const PROBE: Duration = Duration::from_secs(60);

impl Shared {
    /// Captures that wait in each lane, as the streams' leaders know it.
    pub(super) async fn waiting(
        &self,
        id: Option<&IntegrationId>,
    ) -> Result<HashMap<LaneKey, [u64; 2]>, OutboxError> {
        let mut lanes: HashMap<LaneKey, [u64; 2]> = HashMap::new();
        let partitions = match id {
            Some(id) => self.layout.partition(id)..self.layout.partition(id) + 1,
            None => 0..self.layout.partitions,
        };
        for partition in partitions {
            let filter = self.layout.all(partition, 'q', id);
            for (subject, count) in self
                .wire
                .count(&self.layout.stream(partition), &filter)
                .await?
            {
                if let Some((lane, queue)) = parse_queue(&subject) {
                    lanes.entry(lane).or_default()[queue] = count;
                }
            }
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
    let sums = waiting
        .into_iter()
        .map(|(lane, queues)| (lane, queues.iter().sum()));
    shared.counts.set(sums.collect());
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
