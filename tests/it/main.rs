//! The real relay and the real sandbox, talking over loopback.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "tests stop at the first thing that is not as it should be"
)]

mod allocations;
mod attribution;
mod auth;
mod batch;
mod capture;
mod certificates;
mod chaos;
mod collector;
mod command;
mod connections;
mod crash;
mod cut_off;
mod damage;
mod dead_letters;
mod dead_letters_command;
mod delivery;
mod descriptors;
mod drain;
mod fairness;
mod faults;
mod flow;
mod harness;
mod integrations;
mod jwt;
mod limits;
mod log;
mod notify;
mod paused;
mod postgres;
mod postgres_command;
#[allow(dead_code, reason = "shared with the crate's own tests")]
mod postgres_server;
mod privacy;
mod probes;
mod process;
mod protocol;
mod receiver;
mod removed;
mod scan;
mod scopes;
mod secrets;
mod services;
mod stream;
mod swallowed;
mod tenants;
mod tls;
mod traces;
mod used_again;
mod wire;
#[path = "../../benches/workload/mod.rs"]
mod workload;
