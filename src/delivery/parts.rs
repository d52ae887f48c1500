//! What delivery works with.

use std::sync::Arc;

use super::{
    LaneHolds, LaneOptions, RateLimits, Sources, VitalsBoard, breaker::Breaker, turns::Turns,
};
use crate::{
    metrics::Metrics, notify::Notices, outbox::Outbox, region::PerRegion, registry::Registry,
    segment::SegmentClient, trace::Traces,
};

/// What delivery works with.
#[derive(Clone)]
pub struct DeliveryParts {
    /// Where events come from.
    pub outbox: Arc<dyn Outbox>,
    /// Where they go.
    pub segment: Arc<SegmentClient>,
    /// Whose they are.
    pub registry: Arc<Registry>,
    /// How it went.
    pub vitals: Arc<VitalsBoard>,
    /// What is known of their sources.
    pub sources: Arc<Sources>,
    /// Counts and times.
    pub metrics: Metrics,
    /// Whether somebody gets the spans.
    pub traces: Traces,
    /// Who is told when that changes.
    pub notices: Notices,
    /// Who works with which lane.
    pub holds: Arc<LaneHolds>,
    /// How fast each integration may send.
    pub rates: Arc<RateLimits>,
    /// Bounds of each lane.
    pub lanes: LaneOptions,
    /// Who may send, of all lanes.
    pub turns: Arc<Turns>,
}

/// What lanes share beside the parts.
pub(super) struct Shared {
    pub(super) breakers: PerRegion<Breaker>,
}
