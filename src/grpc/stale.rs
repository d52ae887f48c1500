//! Captures that were mapped with an integration which another relay has changed since: the
//! shared outbox refuses them, and they are mapped and submitted again. One that breaks the
//! rules of an integration may keep to those of its present revision.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use super::{
    RelayError, Services,
    accept::{Accepted, accepted},
};
use crate::{
    integration::{Integration, IntegrationId},
    outbox::NewCapture,
};

/// Times that a capture is mapped again.
const MAX_TRIES: usize = 5;

/// Whether the outbox refused a capture as mapped with another revision.
pub(super) fn is_stale(answer: &Accepted) -> bool {
    matches!(answer, Err(RelayError::IntegrationChanging))
}

/// Whether a capture breaks rules of its integration.
fn is_invalid(answer: &Accepted) -> bool {
    matches!(answer, Err(RelayError::Capture(_)))
}

impl Services {
    /// Whether a capture is to be mapped with its integration as it is stored now.
    pub(super) fn maps_again(&self, answer: &Accepted) -> bool {
        is_stale(answer) || (is_invalid(answer) && self.registry.is_shared())
    }

    /// Maps the captures again for which [`Services::maps_again`] is true, and submits them in
    /// their order, until none is stale. `owner` is the integration of the capture at a
    /// place, `map` maps it.
    pub(super) async fn submit_again(
        &self,
        mut answers: Vec<&mut Accepted>,
        owner: impl Fn(usize) -> Option<IntegrationId>,
        mut map: impl FnMut(usize, &Integration) -> Result<NewCapture, RelayError>,
    ) {
        for round in 0..MAX_TRIES {
            let stale = |place: &usize| match round {
                0 => self.maps_again(answers[*place]),
                _ => is_stale(answers[*place]),
            };
            let stale: Vec<usize> = (0..answers.len()).filter(stale).collect();
            let mut current = BTreeMap::new();
            let (mut places, mut captures) = (Vec::new(), Vec::new());
            for place in stale {
                let Some(id) = owner(place) else { continue };
                let integration = match current.entry(id) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(unknown) => {
                        let read = self.integration_now(unknown.key()).await;
                        unknown.insert(read)
                    }
                };
                let mapped = integration.clone();
                match mapped.and_then(|integration| map(place, &integration)) {
                    Ok(new) => {
                        places.push(place);
                        captures.push(new);
                    }
                    Err(error) => *answers[place] = Err(error),
                }
            }
            if captures.is_empty() {
                return;
            }
            match self.enqueue(captures).await {
                Ok(submitted) => {
                    for (place, submitted) in places.into_iter().zip(submitted) {
                        *answers[place] = accepted(submitted);
                    }
                }
                Err(error) => {
                    for place in places {
                        *answers[place] = Err(error.clone());
                    }
                }
            }
        }
    }

    async fn integration_now(&self, id: &IntegrationId) -> Result<Arc<Integration>, RelayError> {
        Ok(self.registry.find_stored_open(id.name()).await?)
    }
}
