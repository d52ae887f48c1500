//! Changes are carried to their end, also when whoever asked for them goes.

use tracing::Instrument;

use super::{RelayError, Services, gate::Place};
use crate::outbox::OutboxError;

impl Services {
    /// Makes a change in a task of its own, which holds the call's place. A call that is
    /// cancelled half-way must not leave memory and disk apart, nor a change that
    /// the audit log does not know.
    ///
    /// # Errors
    /// That of the change.
    pub(super) async fn carry_out<T: Send + 'static>(
        &self,
        place: Place,
        change: impl Future<Output = Result<T, RelayError>> + Send + 'static,
    ) -> Result<T, RelayError> {
        let task = async move {
            let _place = place;
            change.await
        };
        // The drain waits for it, as for streams.
        let task = self.gate.streams.spawn(task.in_current_span());
        task.await.unwrap_or_else(|_| {
            let broke = "a change broke off".to_owned();
            Err(OutboxError::OutcomeUnknown(broke).into())
        })
    }
}
