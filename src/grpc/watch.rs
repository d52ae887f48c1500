//! WatchDeliveries: the live feed.

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{RelayError, Services, convert, usage::CallerPermit};
use crate::{
    integration::IntegrationId,
    outbox::{Change, Watched},
    permission::{Caller, Scope},
    proto::{DeliveryState, EventType, WatchDeliveriesRequest, WatchDeliveriesResponse},
    time::UnixMillis,
};

/// Updates that wait to be sent to one watcher; behind them the feed's own
/// length counts, and then updates are missed.
const UPDATES: usize = 64;

/// Which changes a watcher wants.
pub(super) struct Filter {
    integration_id: Option<IntegrationId>,
    scope: Scope,
    states: Vec<DeliveryState>,
    types: Vec<EventType>,
}

impl Filter {
    pub(super) async fn new(
        services: &Services,
        caller: &Caller,
        request: &WatchDeliveriesRequest,
    ) -> Result<Self, RelayError> {
        let integration_id = match request.integration_id.as_str() {
            "" => None,
            id => Some(services.integration(caller, id).await?.id().clone()),
        };
        let known = |field: &str, index: usize| {
            let rule = "not a known value, and not UNSPECIFIED";
            RelayError::invalid(&format!("{field}[{index}]"), "UNKNOWN_VALUE", rule)
        };
        let mut states = Vec::new();
        for (index, state) in request.states.iter().enumerate() {
            match DeliveryState::try_from(*state) {
                Ok(DeliveryState::Unspecified) | Err(_) => return Err(known("states", index)),
                Ok(state) => states.push(state),
            }
        }
        let mut types = Vec::new();
        for (index, event) in request.types.iter().enumerate() {
            match EventType::try_from(*event) {
                Ok(EventType::Unspecified) | Err(_) => return Err(known("types", index)),
                Ok(event) => types.push(event),
            }
        }
        Ok(Self {
            integration_id,
            scope: caller.scope.clone(),
            states,
            types,
        })
    }

    fn wants(&self, change: &Change) -> bool {
        let record = &change.record;
        let state = record.event(change.event).state.to_proto();
        self.integration_id
            .as_ref()
            .is_none_or(|id| *id == record.integration_id)
            && self.scope.holds(&record.integration_id)
            && (self.states.is_empty() || self.states.contains(&state))
            && (self.types.is_empty() || self.types.contains(&change.event.to_proto()))
    }
}

/// Serves a watcher in a task of its own, which holds the permits.
pub(super) fn serve(
    services: &Services,
    filter: Filter,
    permits: (CallerPermit, OwnedSemaphorePermit),
) -> ReceiverStream<Result<WatchDeliveriesResponse, Status>> {
    let (updates, receiver) = mpsc::channel(UPDATES);
    let wants = move |change: &Change| filter.wants(change);
    let mut feed = services.outbox.signals().watch(wants);
    let gate = std::sync::Arc::clone(&services.gate);
    services.gate.streams.spawn(async move {
        loop {
            let next = tokio::select! {
                () = updates.closed() => break,
                () = gate.draining() => {
                    // An error says that the watcher has gone, or reads nothing.
                    let _ = updates.try_send(Err(RelayError::Draining.into()));
                    break;
                }
                next = feed.next() => next,
            };
            let update = match next {
                Watched::Change(change) => update(&change),
                Watched::Missed(missed) => notice(missed),
            };
            tokio::select! {
                sent = updates.send(Ok(update)) => if sent.is_err() { break },
                () = gate.draining() => break,
            }
        }
        drop(permits);
    });
    ReceiverStream::new(receiver)
}

fn update(change: &Change) -> WatchDeliveriesResponse {
    WatchDeliveriesResponse {
        integration_id: change.record.integration_id.name().to_owned(),
        capture_id: change.record.capture_id.clone(),
        event: Some(convert::event_delivery(&change.record, change.event)),
        update_time: Some(change.time.to_proto()),
        missed_count: 0,
    }
}

fn notice(missed: u64) -> WatchDeliveriesResponse {
    WatchDeliveriesResponse {
        update_time: Some(UnixMillis::now().to_proto()),
        missed_count: missed,
        ..WatchDeliveriesResponse::default()
    }
}
