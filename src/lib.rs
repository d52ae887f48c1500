//! segment-relay: takes captures over gRPC, stores an identify and a track event
//! for each durably, and delivers them to Twilio Segment.
//!
//! One capture's path, in a straight line; the two halves meet only at the outbox:
//!
//! ```text
//! grpc -> capture -> intake: mapping -> event -> outbox || delivery -> segment
//! ```
//!
//! | step | module |
//! | --- | --- |
//! | answer | [`grpc`] |
//! | decode | [`capture`] |
//! | validate against the [`integration`], build the events | [`intake`], [`mapping`], [`event`] |
//! | store, answer after the fsync | [`outbox`] |
//! | lease, batch, send, settle | [`delivery`] |
//! | one HTTP request | [`segment`] |
//!
//! [`server`] puts them together from the [`config`]; before every call stands
//! [`auth`], and beside the path lie [`audit`] and [`notify`]. [`cli`] is the command,
//! with the thin [`client`]s, the [`sandbox`] and the [`demo`]. Below them all lie
//! [`notice`], [`panics`], [`permission`], [`status`], [`region`], [`secret`], [`text`], [`time`], [`trace`], [`vault`] and
//! [`violation`].

pub mod audit;
pub mod auth;
pub mod capture;
pub mod cli;
pub mod client;
pub mod config;
pub mod delivery;
pub mod demo;
pub mod event;
pub mod grpc;
pub mod intake;
pub mod integration;
pub mod mapping;
pub mod metrics;
pub mod notice;
pub mod notify;
pub mod outbox;
pub mod panics;
pub mod permission;
pub mod proto;
pub mod region;
pub mod registry;
pub mod sandbox;
pub mod secret;
pub mod segment;
pub mod server;
pub mod status;
pub mod telemetry;
pub mod text;
pub mod time;
pub mod trace;
pub mod vault;
pub mod violation;
