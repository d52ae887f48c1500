//! What a load is made of, and what its senders share.

use std::net::SocketAddr;

use clap::{Args, ValueEnum};
use http::uri::PathAndQuery;
use tonic::transport::Channel;

use crate::{
    record::Record,
    template::{Numbers, Template},
};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    Unary,
    Batch,
    Stream,
}

#[derive(Args)]
pub(crate) struct RunArgs {
    #[arg(long)]
    pub(crate) address: SocketAddr,
    #[arg(long, value_enum)]
    pub(crate) mode: Mode,
    /// Calls (streams) at once
    #[arg(long, default_value_t = 64)]
    pub(crate) in_flight: usize,
    /// Captures without an answer on each stream
    #[arg(long, default_value_t = 256)]
    pub(crate) window: usize,
    /// Captures in a batch
    #[arg(long, default_value_t = 100)]
    pub(crate) batch: usize,
    #[arg(long, default_value_t = 4)]
    pub(crate) connections: usize,
    #[arg(long, default_value_t = 5.0)]
    pub(crate) seconds: f64,
    #[arg(long, default_value_t = 1.0)]
    pub(crate) warm_up: f64,
    /// Integrations bench-0, bench-1, … that share the captures
    #[arg(long, default_value_t = 4)]
    pub(crate) integrations: usize,
    /// Open loop: captures offered in a second. Then `in_flight` is the most that wait for an answer
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    /// Ends early after so many accepted captures
    #[arg(long)]
    pub(crate) captures: Option<u64>,
}

/// What all senders share.
pub(crate) struct Shared {
    pub(crate) channels: Vec<Channel>,
    pub(crate) templates: Vec<Template>,
    pub(crate) numbers: Numbers,
    pub(crate) record: Record,
    pub(crate) path: PathAndQuery,
}

impl Shared {
    pub(crate) fn channel(&self, place: usize) -> &Channel {
        &self.channels[place % self.channels.len()]
    }

    pub(crate) fn template(&self, place: usize) -> &Template {
        &self.templates[place % self.templates.len()]
    }
}
