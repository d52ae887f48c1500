//! Brings a call to its service. Calls with captures come directly to theirs: a router
//! would copy paths and box futures and bodies once more for each of them.

use std::{convert::Infallible, future::poll_fn, sync::Arc};

use http::{Request, Response};
use tonic::{body::Body, codegen::BoxFuture, server::NamedService, service::Routes};
use tower_service::Service;

use super::{body::Metered, relay::Relay, unary};
use crate::proto::server::segment_relay_server::{SegmentRelay, SegmentRelayServer};

/// All services behind one.
#[derive(Clone)]
pub struct Dispatch {
    relay: Arc<Relay>,
    /// Bytes of a message with captures, at the most.
    max_message: usize,
    others: Routes,
}

impl Dispatch {
    pub(super) fn new(relay: Relay, max_message: usize, others: Routes) -> Self {
        Self {
            relay: Arc::new(relay),
            max_message,
            others,
        }
    }

    /// Bytes of a message, at the most.
    pub(super) fn max_message(&self) -> usize {
        self.max_message
    }

    /// The answer of the service that a call is for. Services are cheap to clone.
    pub(super) fn call(&self, request: Request<Metered>) -> BoxFuture<Response<Body>, Infallible> {
        let Some(method) = relay_method(request.uri().path()) else {
            return self.call_other(request);
        };
        let (relay, max) = (Arc::clone(&self.relay), self.max_message);
        match method {
            "Capture" if unary::is_plain(request.headers()) => Box::pin(async move {
                Ok(unary::answered(request, max, |capture| relay.capture(capture)).await)
            }),
            "CaptureBatch" if unary::is_plain(request.headers()) => Box::pin(async move {
                Ok(unary::answered(request, max, |batch| relay.capture_batch(batch)).await)
            }),
            _ => {
                let server = SegmentRelayServer::from_arc(relay);
                // Always ready.
                server.max_decoding_message_size(max).call(request)
            }
        }
    }

    fn call_other(&self, request: Request<Metered>) -> BoxFuture<Response<Body>, Infallible> {
        let mut others = self.others.clone();
        Box::pin(async move {
            poll_fn(|context| Service::<Request<Metered>>::poll_ready(&mut others, context))
                .await?;
            others.call(request).await
        })
    }
}

/// The method of `SegmentRelay` that a path names.
fn relay_method(path: &str) -> Option<&str> {
    let rest = path
        .strip_prefix('/')?
        .strip_prefix(<SegmentRelayServer<Relay> as NamedService>::NAME)?;
    rest.strip_prefix('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_the_service_are_its_own() {
        let service = crate::grpc::RELAY_SERVICE;
        for method in ["Capture", "NoSuchMethod"] {
            let path = format!("/{service}/{method}");
            assert_eq!(relay_method(&path), Some(method));
        }
        for other in [
            format!("/{service}"),
            format!("/{service}Other/Capture"),
            format!("{service}/Capture"),
            "/jebbit.segmentrelay.v1.PrivacyService/EraseSubject".to_owned(),
            String::new(),
        ] {
            assert_eq!(relay_method(&other), None, "{other}");
        }
    }
}
