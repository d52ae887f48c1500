//! Keeps the board of what waits up to date, for the metrics.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use crate::{
    delivery::Sources,
    integration::IntegrationId,
    metrics::{BacklogBoard, BacklogOf, DiskSpace},
    outbox::{Outbox, OutboxError},
    registry::Registry,
    time::UnixMillis,
};

/// How often it looks: often enough for scrapes every 15 s.
const INTERVAL: Duration = Duration::from_secs(5);

/// Looks now and then, until `stop`; at a disk only where the outbox is on one of this machine.
pub(super) async fn follow(
    outbox: Arc<dyn Outbox>,
    registry: Arc<Registry>,
    sources: Arc<Sources>,
    directory: Option<PathBuf>,
    board: Arc<BacklogBoard>,
    stop: CancellationToken,
) {
    let writable = outbox.signals().writable();
    loop {
        let place = directory.clone();
        let disk = tokio::task::spawn_blocking(move || DiskSpace::of(&place?).ok()).await;
        match look(&*outbox, &registry, &sources).await {
            Ok(backlogs) => {
                board.note(backlogs, disk.ok().flatten(), *writable.borrow());
            }
            Err(OutboxError::Closed) => return,
            Err(error) => tracing::warn!(%error, "the backlog cannot be read for the metrics"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

async fn look(
    outbox: &dyn Outbox,
    registry: &Registry,
    sources: &Sources,
) -> Result<Vec<BacklogOf>, OutboxError> {
    let lanes = outbox.waiting_lanes().await?;
    let ids: BTreeSet<_> = lanes.into_iter().map(|lane| lane.integration_id).collect();
    let now = UnixMillis::now();
    // All incarnations of a name have one label.
    let mut backlogs: BTreeMap<IntegrationId, BacklogOf> = BTreeMap::new();
    for id in ids {
        let backlog = outbox.backlog(&id).await?;
        let age = |oldest| now.since(oldest);
        let one = BacklogOf {
            integration_id: id.clone(),
            paused: registry.get(&id).is_some_and(|it| it.paused),
            condition: sources.condition(&id).rank(),
            events: backlog.events,
            bytes: backlog.bytes,
            oldest_age: backlog.oldest.map_or(Duration::ZERO, age),
        };
        match backlogs.entry(id.of_incarnation(1)) {
            Entry::Vacant(free) => drop(free.insert(one)),
            Entry::Occupied(mut sum) => sum.get_mut().add(&one),
        }
    }
    Ok(backlogs.into_values().collect())
}
