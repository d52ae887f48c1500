//! The gRPC services: decode, hand to the one who does it, encode.

mod accept;
mod access;
mod body;
mod calls;
mod carry;
mod convert;
mod dead_letters;
mod deadline;
mod dispatch;
mod error;
mod foreign;
mod gate;
mod incoming;
mod inflate;
mod integrations;
mod peer;
mod pieces;
mod privacy;
mod protocol;
mod reflection;
mod relay;
mod rpcs;
mod spans;
mod stale;
mod stream;
mod timer;
mod unary;
mod usage;
mod watch;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use prost::Message;
use tonic::service::Routes;

use crate::{
    audit::Audit,
    config,
    delivery::{LaneHolds, Sources, Turns, VitalsBoard},
    metrics::Metrics,
    notify::Notices,
    outbox::Outbox,
    proto::server::{
        dead_letter_service_server::DeadLetterServiceServer,
        integration_service_server::IntegrationServiceServer,
        privacy_service_server::PrivacyServiceServer,
    },
    registry::Registry,
    segment::SegmentClient,
    trace::Traces,
};

pub use access::Access;
pub use body::Answering;
pub use calls::Calls;
pub use dispatch::Dispatch;
pub use error::RelayError;
pub use gate::Gate;
pub use incoming::Incoming;
pub use peer::{Activity, Peer};
pub use reflection::with_reflection;
pub use rpcs::{Need, RPCS};
pub use usage::{Throttle, Usage};

/// Name of the main service, as health checks ask for it.
pub const RELAY_SERVICE: &str = "jebbit.segmentrelay.v1.SegmentRelay";

/// Entries of one page: when not asked for, and at the most.
const PAGE_SIZE: (usize, usize) = (100, 1_000);

/// A page ends at about this size, in bytes.
const PAGE_BYTES: usize = 1024 * 1024;

/// The entries of a page: as many as asked for, within its size, and at least one. Says whether
/// some are left for the next one.
fn page_of<T: Message>(entries: impl IntoIterator<Item = T>, size: usize) -> (Vec<T>, usize, bool) {
    let (mut page, mut bytes) = (Vec::new(), 0);
    for entry in entries {
        let more = entry.encoded_len();
        if page.len() == size || (!page.is_empty() && bytes + more > PAGE_BYTES) {
            return (page, bytes, true);
        }
        bytes += more;
        page.push(entry);
    }
    (page, bytes, false)
}

/// How many entries a page has.
fn page_size(asked: i32) -> Result<usize, RelayError> {
    match usize::try_from(asked) {
        Ok(0) => Ok(PAGE_SIZE.0),
        Ok(size) => Ok(size.min(PAGE_SIZE.1)),
        Err(_) => {
            let rule = "0 for the default, or 1 to 1,000";
            Err(RelayError::invalid("page_size", "OUT_OF_RANGE", rule))
        }
    }
}

/// What the services work with.
#[derive(Clone)]
pub struct Services {
    /// Where captures go.
    pub outbox: Arc<dyn Outbox>,
    /// The integrations.
    pub registry: Arc<Registry>,
    /// For tests of an integration, past the queue.
    pub segment: Arc<SegmentClient>,
    /// How delivery goes.
    pub vitals: Arc<VitalsBoard>,
    /// Whether sources work.
    pub sources: Arc<Sources>,
    /// Who works with which lane.
    pub holds: Arc<LaneHolds>,
    /// Who may send to Segment.
    pub turns: Arc<Turns>,
    /// Who is told of changes.
    pub notices: Notices,
    /// Lets calls in.
    pub gate: Arc<Gate>,
    /// What callers and integrations use.
    pub usage: Arc<Usage>,
    /// Takes notes of changes.
    pub audit: Audit,
    /// Counts and times.
    pub metrics: Metrics,
    /// Whether somebody gets the spans.
    pub traces: Traces,
    /// Bounds.
    pub limits: Arc<config::Server>,
}

impl Services {
    /// All services: those of the contract, and others beside them.
    #[must_use]
    pub fn dispatch(&self, others: Routes) -> Dispatch {
        let max = self.limits.max_message_bytes;
        Dispatch::new(relay::Relay(self.clone()), max, others)
    }

    /// The services of the contract that take no captures.
    #[must_use]
    pub fn routes(&self) -> Routes {
        let max = self.limits.max_message_bytes;
        let mut routes = tonic::service::RoutesBuilder::default();
        routes
            .add_service(
                IntegrationServiceServer::new(integrations::Integrations(self.clone()))
                    .max_decoding_message_size(max),
            )
            .add_service(
                DeadLetterServiceServer::new(dead_letters::DeadLetters(self.clone()))
                    .max_decoding_message_size(max),
            )
            .add_service(
                PrivacyServiceServer::new(privacy::Privacy(self.clone()))
                    .max_decoding_message_size(max),
            );
        routes.routes()
    }
}
