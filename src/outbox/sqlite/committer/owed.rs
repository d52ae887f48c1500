//! What callers of a group are owed.

use super::Reply;
use crate::outbox::{
    OutboxError, Submitted,
    sqlite::{admission::Reservation, overlay::Overlay},
};

/// What is owed to a caller once the group is durable.
pub(super) enum Owed {
    Submitted {
        submitted: Vec<Submitted>,
        reservation: Option<Reservation>,
        reply: Reply<Vec<Submitted>>,
    },
    Settled(Reply<()>),
}

impl Owed {
    /// How many of its captures found no room.
    pub(super) fn refusals(&self) -> usize {
        let Self::Submitted { submitted, .. } = self else {
            return 0;
        };
        let full = |one: &&Submitted| matches!(one, Submitted::Full(_));
        submitted.iter().filter(full).count()
    }

    /// Whether none of its captures found room.
    pub(super) fn is_refused(&self) -> bool {
        match self {
            Self::Submitted { submitted, .. } => {
                !submitted.is_empty() && self.refusals() == submitted.len()
            }
            Self::Settled(_) => false,
        }
    }

    /// Its captures are counted as waiting from now on.
    pub(super) fn end_reservation(&mut self, overlay: &mut Overlay) {
        if let Self::Submitted {
            reservation: Some(reservation),
            ..
        } = self
        {
            reservation.end(overlay);
        }
    }

    /// Whoever asked may have gone; then nobody needs the answer.
    pub(super) fn answer(self, result: &Result<(), OutboxError>) {
        match self {
            Self::Submitted {
                submitted,
                reservation,
                reply,
            } => {
                // First: whoever has the answer finds the room as it is.
                drop(reservation);
                let _ = reply.send(result.clone().map(|()| submitted));
            }
            Self::Settled(reply) => {
                let _ = reply.send(result.clone());
            }
        }
    }
}
