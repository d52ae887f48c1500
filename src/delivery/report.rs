//! What a settlement is counted as.

use std::collections::BTreeMap;

use crate::{
    metrics::Metrics, outbox::Settlement, proto::DeliveryReason, segment::Answer, status::State,
};

/// Counts the events of a durable settlement by their new states.
pub(super) fn settled(metrics: &Metrics, settlement: &Settlement) {
    if !metrics.are_read() {
        return;
    }
    let mut counts: BTreeMap<(&str, &str, &str), u64> = BTreeMap::new();
    for capture in &settlement.captures {
        for event in capture.changed.iter() {
            let state = capture.record.event(event).state;
            if let State::Delivered { at } = state {
                let took = at.since(capture.record.accept_time);
                metrics.delivered_after(settlement.lane.region, took);
            }
            let reason = word(state.reason());
            *counts
                .entry((event.name(), state.name(), reason))
                .or_default() += 1;
        }
    }
    let id = &settlement.lane.integration_id;
    for ((event, state, reason), count) in counts {
        metrics.events(id, event, state, reason, count);
    }
}

/// Why the events of an attempt were not delivered; all of them have one reason.
pub(super) fn reason(settlement: &Settlement) -> DeliveryReason {
    let changed = settlement.captures.iter().find_map(|capture| {
        let event = capture.changed.iter().next()?;
        Some(capture.record.event(event).state.reason())
    });
    changed.unwrap_or_default()
}

/// One line on an attempt: what was sent, what came of it, and what comes next.
pub(super) fn log(settlement: &Settlement, answer: &Answer, reason: DeliveryReason) {
    let (lane, latency) = (&settlement.lane, answer.latency);
    let changed = || {
        let captures = settlement.captures.iter();
        captures.flat_map(|capture| {
            let events = capture.changed.iter();
            events.map(|event| capture.record.event(event).state)
        })
    };
    let (events, error) = (changed().count(), answer.error());
    let given_up = changed().filter(|state| state.is_final()).count();
    match reason {
        DeliveryReason::Unspecified => tracing::debug!(%lane, events, ?latency, "delivered"),
        _ if given_up > 0 => {
            let reason = word(reason);
            tracing::warn!(%lane, events = given_up, error, reason, "events are dead letters now");
        }
        _ => tracing::warn!(%lane, events, error, reason = word(reason), "not delivered"),
    }
}

/// The word of a reason, as the schema has it without its prefix; empty where
/// there is none.
pub(super) fn word(reason: DeliveryReason) -> &'static str {
    if reason == DeliveryReason::Unspecified {
        return "";
    }
    let name = reason.as_str_name();
    name.strip_prefix("DELIVERY_REASON_").unwrap_or(name)
}
