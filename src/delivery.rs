//! Delivery: lease -> batch -> send -> settle, lane by lane.
//!
//! Invariants:
//! - A lane has at most one request in flight, so the events of one user keep
//!   their order, also under retries.
//! - What is decided after an answer is durable before the lane goes on.
//! - Whoever takes events away from a lane holds it meanwhile ([`LaneHolds`]).
//! - Payloads are in memory only while their request is under way, so memory is
//!   bounded by the requests in flight, not by the backlog or by the lanes.
//! - Lanes share the permits for requests in flight, which go round the
//!   integrations, their integration's rate, and their endpoint's breaker,
//!   which a single integration can't open: nobody's trouble holds others up.

mod backoff;
mod batch_size;
mod bell;
mod breaker;
mod classify;
mod condition;
mod dispatcher;
mod evidence;
mod holds;
mod lane;
mod parts;
mod rate;
mod report;
#[cfg(test)]
mod simulation;
mod spans;
mod suspects;
mod turns;
mod vitals;
mod worker;

pub use backoff::Backoff;
pub use classify::{Disposition, Failure, FaultKind, classify};
pub use condition::Condition;
pub use dispatcher::Delivery;
pub use evidence::{Begun, Change, Evidence, Finding, Sources};
pub use holds::LaneHolds;
pub use lane::{Credentials, Ended, Lane, LaneOptions, Plan, Step};
pub use parts::DeliveryParts;
pub use rate::RateLimits;
pub use turns::Turns;
pub use vitals::{Vitals, VitalsBoard};
