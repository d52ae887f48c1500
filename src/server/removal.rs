//! Removes the integrations that have gone from the configuration file, once nothing waits.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::{
    grpc::Services,
    outbox::OutboxError,
    registry::{RegistryError, Told},
    time::UnixMillis,
};

const INTERVAL: Duration = Duration::from_secs(5);

/// Looks now and then, until `stop`.
pub(super) async fn follow(services: Services, stop: CancellationToken) {
    let told = Told {
        audit: &services.audit,
        notices: &services.notices,
    };
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let removed = services.registry.remove_drained(&told, UnixMillis::now());
        match removed.await {
            Ok(removed) => {
                for id in &removed {
                    services.vitals.forget(id);
                    services.sources.forget(id);
                }
            }
            Err(RegistryError::Outbox(OutboxError::Closed)) => return,
            Err(error) => {
                tracing::warn!(%error, "integrations that left the file cannot be removed");
            }
        }
    }
}
