//! Admission before the queue. While room is scarce, room is reserved for a capture before
//! the committer has it, and without that it is refused: so a refusal waits for no sync,
//! and takes nothing from what is accepted.

use std::{sync::Arc, time::Instant};

use super::{
    SqliteOutbox,
    entry::{key_of, stored_key},
    overlay::{Overlay, Shared},
    tally::Reserved,
};
use crate::{
    integration::IntegrationId,
    outbox::{Content, Limits, NewCapture, Outbox, Quota, Submitted},
};

/// Room for the captures of a call, until they are counted as waiting or it is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    shared: Arc<Shared>,
    room: Reserved,
}

impl Reservation {
    /// Gives the room back where what was accepted is counted as waiting, so that nothing
    /// is counted twice in between.
    pub(super) fn end(&mut self, overlay: &mut Overlay) {
        let room = std::mem::take(&mut self.room);
        overlay.reserved.give_back(&room);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.room.is_empty() {
            self.shared.lock().reserved.give_back(&self.room);
        }
    }
}

/// What becomes of a call before the committer has it, as far as memory tells.
#[derive(Debug)]
pub(super) enum Admission {
    /// The committer decides; with room for those that are new, where that is scarce.
    Passed(Option<Reservation>),
    /// None of its captures finds room, and only these may be known.
    Refused {
        answers: Vec<Submitted>,
        doubtful: Vec<usize>,
    },
}

impl Shared {
    /// The bound that leaves no room for two events of any size, where room is scarce.
    pub(super) fn full(&self, limits: &Limits, id: &IntegrationId) -> Option<Quota> {
        if !self.is_scarce() {
            return None;
        }
        let mut overlay = self.lock();
        let quota = overlay
            .tally
            .full_beside(&overlay.reserved, limits, id, 0)?;
        self.note_refusal(&mut overlay, Instant::now());
        Some(quota)
    }

    /// Whether a capture may be known; always while the filter is being filled.
    pub(super) fn may_know(&self, id: &IntegrationId, capture_id: &str) -> bool {
        let key = stored_key(key_of(id, capture_id));
        self.filter().is_none_or(|filter| filter.may_hold(key))
    }

    /// Decides on the captures of a call.
    pub(super) fn admit(self: &Arc<Self>, limits: &Limits, captures: &[NewCapture]) -> Admission {
        if !self.is_scarce() {
            return Admission::Passed(None);
        }
        // Without it a known capture might be refused.
        let Some(filter) = self.filter() else {
            return Admission::Passed(None);
        };
        let mut room = Reserved::default();
        let (mut answers, mut doubtful) = (Vec::with_capacity(captures.len()), Vec::new());
        let mut overlay = self.lock();
        for (place, capture) in captures.iter().enumerate() {
            let id = &capture.integration_id;
            let Content::Send { events, .. } = &capture.content else {
                continue;
            };
            let bytes = (events.identify.len() + events.track.len()) as u64;
            let may_be_known = filter.may_hold(stored_key(key_of(id, &capture.capture_id)));
            let tally = &overlay.tally;
            if let Some(quota) = tally.full_beside(&overlay.reserved, limits, id, bytes) {
                answers.push(Submitted::Full(quota));
                if may_be_known {
                    doubtful.push(place);
                }
            } else if !may_be_known {
                room.add(id, bytes);
                overlay.reserved.add(id, bytes);
            }
        }
        if !answers.is_empty() {
            self.note_refusal(&mut overlay, Instant::now());
        }
        drop(overlay);
        if !captures.is_empty() && answers.len() == captures.len() {
            return Admission::Refused { answers, doubtful };
        }
        let shared = Arc::clone(self);
        Admission::Passed(Some(Reservation { shared, room }))
    }
}

impl SqliteOutbox {
    /// Decides on the captures of a call. Room is reserved for those that the committer is
    /// to have, where that is scarce.
    ///
    /// # Errors
    /// The answers, where none of the captures finds room and none is known.
    pub(super) async fn admitted(
        &self,
        captures: &[NewCapture],
    ) -> Result<Option<Reservation>, Vec<Submitted>> {
        let (answers, doubtful) = match self.shared.admit(&self.limits, captures) {
            Admission::Passed(reservation) => return Ok(reservation),
            Admission::Refused { answers, doubtful } => (answers, doubtful),
        };
        // In a call with many captures the filter is nearly always wrong about one.
        for place in doubtful {
            let capture = &captures[place];
            let found = self.find(&capture.integration_id, &capture.capture_id);
            if !matches!(found.await, Ok(None)) {
                return Ok(None);
            }
        }
        Err(answers)
    }
}
