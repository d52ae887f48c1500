//! Who hears of what is durable.

use std::sync::Arc;

use super::Committer;
use crate::{
    outbox::{Change, LaneKey},
    time::UnixMillis,
};

impl Committer {
    /// Tells others what is durable now.
    pub(super) fn tell(&self) {
        let staged = &self.staged;
        let mut lanes: Vec<LaneKey> = Vec::new();
        let new = staged.states.iter().filter(|next| next.is_new);
        for lane in new.filter_map(|next| next.entry.lane.as_ref()) {
            if !lanes.contains(lane) {
                lanes.push(lane.clone());
            }
        }
        self.signals.wake_lanes(lanes);
        let watched = self.signals.is_watched();
        let now = UnixMillis::now();
        for next in &staged.states {
            let record = &next.entry.record;
            if watched {
                let time = if next.is_new { record.accept_time } else { now };
                for event in next.announce.iter() {
                    self.signals.publish(&Change {
                        record: Arc::clone(record),
                        event,
                        time,
                    });
                }
            }
            if !next.is_new && record.is_final() {
                self.signals
                    .settled(&record.integration_id, &record.capture_id);
            }
        }
    }
}
