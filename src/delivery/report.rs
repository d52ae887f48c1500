//! What a settlement is counted as.

use std::collections::BTreeMap;

use crate::{metrics::Metrics, outbox::Settlement, proto::DeliveryReason, status::State};

/// Counts the events of a durable settlement by their new states.
pub(super) fn settled(metrics: &Metrics, settlement: &Settlement) {
    let mut counts: BTreeMap<(&str, &str, &str), u64> = BTreeMap::new();
    for capture in &settlement.captures {
        for event in &capture.changed {
            let (state, reason) = match capture.record.event(*event).state {
                State::Queued => ("queued", ""),
                State::Retrying { reason, .. } => ("retrying", word(reason)),
                State::Skipped { reason } => ("skipped", word(reason)),
                State::DeadLettered { reason, .. } => ("dead_lettered", word(reason)),
                State::Delivered { at } => {
                    let took = at.since(capture.record.accept_time);
                    metrics.delivered_after(settlement.lane.region, took);
                    ("delivered", "")
                }
            };
            *counts.entry((event.name(), state, reason)).or_default() += 1;
        }
    }
    let id = &settlement.lane.integration_id;
    for ((event, state, reason), count) in counts {
        metrics.events(id, event, state, reason, count);
    }
}

/// The word of a reason, as the schema has it without its prefix.
fn word(reason: DeliveryReason) -> &'static str {
    let name = reason.as_str_name();
    name.strip_prefix("DELIVERY_REASON_").unwrap_or(name)
}
