//! segment-relay
pub mod proto;
