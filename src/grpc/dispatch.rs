//! Brings a call to its service. Calls with captures come directly to theirs: a router
//! would copy paths and box futures and bodies once more for each of them.

use std::{
    convert::Infallible,
    task::{Context, Poll},
};

use futures_util::future::Either;
use http::{Request, Response};
use tonic::{body::Body, codegen::BoxFuture, server::NamedService, service::Routes};
use tower_service::Service;

use super::relay::Relay;
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

impl Service<Request<Body>> for Dispatch {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future =
        Either<BoxFuture<Response<Body>, Infallible>, <Routes as Service<Request<Body>>>::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // The other one is always ready.
        Service::<Request<Body>>::poll_ready(&mut self.others, context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if is_for_relay(request.uri().path()) {
            Either::Left(self.relay.call(request))
        } else {
            Either::Right(self.others.call(request))
        }
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
