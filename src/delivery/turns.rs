//! Fair turns: who may send when fewer requests may be in flight than lanes have
//! work.
//!
//! Lanes of one integration queue among themselves, and only the first of them
//! stands in the common queue. So the permits go round the integrations, however
//! many lanes each has.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Mutex as Queue, OwnedSemaphorePermit, Semaphore};

use crate::integration::IntegrationId;

/// The permits for requests in flight, of deliveries and of tests of integrations.
#[derive(Debug)]
pub struct Turns {
    permits: Arc<Semaphore>,
    /// Its holder stands in the common queue for the integration.
    heads: Mutex<HashMap<IntegrationId, Arc<Queue<()>>>>,
}

impl Turns {
    /// So many requests may be in flight.
    #[must_use]
    pub fn new(permits: usize) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(permits)),
            heads: Mutex::default(),
        }
    }

    /// Waits for this integration's turn; it may send as long as the permit lives.
    /// `None` never happens: the permits are not closed.
    pub async fn take(&self, id: &IntegrationId) -> Option<OwnedSemaphorePermit> {
        let head = Arc::clone(self.lock().entry(id.clone()).or_default());
        let _first = head.lock().await;
        Arc::clone(&self.permits).acquire_owned().await.ok()
    }

    /// Forgets an integration that is no more.
    pub fn forget(&self, id: &IntegrationId) {
        self.lock().remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IntegrationId, Arc<Queue<()>>>> {
        // Nothing under this lock can panic half-way.
        self.heads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};

    use super::*;

    #[tokio::test]
    async fn permits_go_round_the_integrations_however_many_lanes_each_has() {
        let turns = Turns::new(1);
        let id = |name| IntegrationId::new(name).expect("valid");
        let (busy, quiet) = (id("busy"), id("quiet"));
        let mut waiting = FuturesUnordered::new();
        for (name, id) in [("busy", &busy); 6]
            .into_iter()
            .chain([("quiet", &quiet); 2])
        {
            let turn = turns.take(id);
            waiting.push(async move { (name, turn.await.expect("open")) }.boxed());
        }
        let mut order = Vec::new();
        while let Some((name, permit)) = waiting.next().await {
            order.push(name);
            // All others find their place in the queue before the permit is free.
            assert!(waiting.next().now_or_never().flatten().is_none());
            drop(permit);
        }
        assert_eq!(
            order,
            [
                "busy", "busy", "quiet", "busy", "quiet", "busy", "busy", "busy"
            ]
        );
    }
}
