//! Keeps the board of what waits up to date, for the metrics.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
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
    directory: Option<PathBuf>,
    board: Arc<BacklogBoard>,
    stop: CancellationToken,
) {
    let writable = outbox.signals().writable();
    loop {
        let place = directory.clone();
        let disk = tokio::task::spawn_blocking(move || DiskSpace::of(&place?).ok()).await;
        match look(&*outbox, &registry).await {
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

async fn look(outbox: &dyn Outbox, registry: &Registry) -> Result<Vec<BacklogOf>, OutboxError> {
    let lanes = outbox.waiting_lanes().await?;
    let ids: BTreeSet<_> = lanes.into_iter().map(|lane| lane.integration_id).collect();
    let now = UnixMillis::now();
    let mut backlogs = Vec::with_capacity(ids.len());
    for integration_id in ids {
        let backlog = outbox.backlog(&integration_id).await?;
        let paused = registry.get(&integration_id).is_some_and(|it| it.paused);
        backlogs.push(BacklogOf {
            integration_id,
            paused,
            events: backlog.events,
            bytes: backlog.bytes,
            oldest_age: backlog
                .oldest
                .map_or(Duration::ZERO, |oldest| now.since(oldest)),
        });
    }
    Ok(backlogs)
}
