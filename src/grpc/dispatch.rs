//! Brings a call to its service. Calls with captures come directly to theirs: a router
//! would copy paths and box futures and bodies once more for each of them.

use std::{convert::Infallible, future::poll_fn};

use http::{Request, Response};
use tonic::{body::Body, codegen::BoxFuture, server::NamedService, service::Routes};
use tower_service::Service;

use super::{body::Metered, relay::Relay};
use crate::proto::server::segment_relay_server::SegmentRelayServer;

/// All services behind one.
#[derive(Clone)]
pub struct Dispatch {
    relay: SegmentRelayServer<Relay>,
    others: Routes,
}

impl Dispatch {
    pub(super) fn new(relay: SegmentRelayServer<Relay>, others: Routes) -> Self {
        Self { relay, others }
    }
}

impl Dispatch {
    /// The answer of the service that a call is for. Services are cheap to clone.
    pub(super) fn call(&self, request: Request<Metered>) -> BoxFuture<Response<Body>, Infallible> {
        if is_for_relay(request.uri().path()) {
            // Always ready.
            return self.relay.clone().call(request);
        }
        let mut others = self.others.clone();
        Box::pin(async move {
            poll_fn(|context| Service::<Request<Metered>>::poll_ready(&mut others, context))
                .await?;
            others.call(request).await
        })
    }
}

/// Whether a path is one of `SegmentRelay`'s.
fn is_for_relay(path: &str) -> bool {
    let rest = path
        .strip_prefix('/')
        .and_then(|path| path.strip_prefix(<SegmentRelayServer<Relay> as NamedService>::NAME));
    rest.is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_the_service_are_its_own() {
        let service = crate::grpc::RELAY_SERVICE;
        assert!(is_for_relay(&format!("/{service}/Capture")));
        assert!(is_for_relay(&format!("/{service}/NoSuchMethod")));
        for other in [
            format!("/{service}"),
            format!("/{service}Other/Capture"),
            format!("{service}/Capture"),
            "/jebbit.segmentrelay.v1.PrivacyService/EraseSubject".to_owned(),
            String::new(),
        ] {
            assert!(!is_for_relay(&other), "{other}");
        }
    }
}
