//! The one layer that every call passes first: who calls, may they, and is there
//! room. What it counts is counted until the answer has left.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{HeaderMap, Request, Response};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body};
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

use super::{
    Gate, Peer, RelayError, Throttle, Usage,
    body::{Answering, CallGuards, Metered},
    rpcs::{Need, method, need, streams_requests},
    spans,
    timer::CallTimer,
};
use crate::{
    audit::Audit,
    auth::Authenticator,
    metrics::Metrics,
    permission::{Caller, Permission},
    trace::Traces,
};

/// Calls at once on a connection of those that anybody may make: there are few
/// services to watch the health of.
const MAX_OPEN_CALLS: usize = 16;

/// Puts [`AccessService`] before all services.
#[derive(Clone)]
pub struct AccessLayer {
    access: Arc<Access>,
}

struct Access {
    authenticator: Arc<Authenticator>,
    gate: Arc<Gate>,
    usage: Arc<Usage>,
    audit: Audit,
    metrics: Metrics,
    traces: Traces,
}

impl AccessLayer {
    /// A layer with these parts.
    #[must_use]
    pub fn new(
        authenticator: Arc<Authenticator>,
        gate: Arc<Gate>,
        usage: Arc<Usage>,
        audit: Audit,
        metrics: Metrics,
        traces: Traces,
    ) -> Self {
        let access = Access {
            authenticator,
            gate,
            usage,
            audit,
            metrics,
            traces,
        };
        Self {
            access: Arc::new(access),
        }
    }
}

impl AccessLayer {
    /// Keeps the keys of the tokens' issuer fresh until `stop`.
    pub async fn refresh_keys(&self, stop: CancellationToken) {
        self.access.authenticator.refresh_keys(stop).await;
    }
}

impl<S> Layer<S> for AccessLayer {
    type Service = AccessService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        AccessService {
            access: Arc::clone(&self.access),
            inner,
        }
    }
}

/// Lets calls through that may pass.
#[derive(Clone)]
pub struct AccessService<S> {
    access: Arc<Access>,
    inner: S,
}

impl<S> Service<Request<Body>> for AccessService<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The one that is ready goes, its clone stays.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        let access = Arc::clone(&self.access);
        let method = method(request.uri().path());
        let span = spans::call(access.traces, method, request.headers());
        let timer = CallTimer::new(access.metrics.clone(), method, span.clone());
        let call = async move {
            let guards = match access.admit(&mut request).await {
                Ok(guards) => guards,
                Err(error) => {
                    timer.end(error.code());
                    return Ok(Status::from(error).into_http());
                }
            };
            let asked = Asked::of(&request);
            let answer = inner.call(request).await?;
            access.note_refusal(&asked, answer.headers());
            let timer = timer.see(answer.headers());
            Ok(answer.map(|body| Body::new(Answering::new(body, guards, timer))))
        };
        Box::pin(call.instrument(span))
    }
}

/// What is needed of a request once its answer is there.
struct Asked {
    uri: http::Uri,
    caller: Option<Arc<Caller>>,
    address: Option<SocketAddr>,
}

impl Asked {
    fn of(request: &Request<Body>) -> Self {
        let peer = request.extensions().get::<Peer>();
        Self {
            uri: request.uri().clone(),
            caller: request.extensions().get::<Arc<Caller>>().cloned(),
            address: peer.and_then(|peer| peer.address),
        }
    }
}

impl Access {
    /// Notes a call that a service refused: it named an integration of others.
    fn note_refusal(&self, asked: &Asked, answer: &HeaderMap) {
        let status = answer.get(Status::GRPC_STATUS);
        let code = status.map(|status| Code::from_bytes(status.as_bytes()));
        if code == Some(Code::PermissionDenied) {
            let caller = asked.caller.as_ref().map(|caller| caller.name.as_str());
            let (rpc, reason) = (asked.uri.path(), RelayError::OutOfScope.reason());
            self.audit.refused(caller, asked.address, rpc, reason);
        }
    }

    /// Lets a call in, before any of its body is read.
    async fn admit(&self, request: &mut Request<Body>) -> Result<CallGuards, RelayError> {
        let peer = request.extensions().get::<Peer>().cloned();
        let activity = peer.as_ref().map(|peer| peer.activity.begin());
        let need = need(request.uri().path());
        if need == Need::Nothing {
            let most = MAX_OPEN_CALLS;
            let open = peer.as_ref().map(|peer| peer.activity.begin_open(most));
            if matches!(open, Some(None)) {
                return Err(Throttle::OPEN_CALLS.into());
            }
            return Ok(CallGuards::open(activity, open.flatten()));
        }
        let caller = self
            .known(request.headers(), request.uri().path(), peer.as_ref(), need)
            .await?;
        let permit = self.usage.enter(&caller)?;
        if need == Need::Permission(Permission::Capture) {
            let place = self.gate.enter()?;
            request.extensions_mut().insert(place);
        }
        request.extensions_mut().insert(caller);
        let guards = CallGuards::new(activity, permit);
        let (usage, bytes) = (Arc::clone(&self.usage), Arc::clone(guards.bytes()));
        let streams = streams_requests(request.uri().path());
        let body = std::mem::replace(request.body_mut(), Body::empty());
        *request.body_mut() = Body::new(Metered::new(body, usage, bytes, streams));
        Ok(guards)
    }

    async fn known(
        &self,
        headers: &HeaderMap,
        rpc: &str,
        peer: Option<&Peer>,
        need: Need,
    ) -> Result<Arc<Caller>, RelayError> {
        let names = peer.map_or(&[][..], |peer| &peer.certificate_names);
        let known = self.authenticator.authenticate(headers, names).await;
        let address = peer.and_then(|peer| peer.address);
        let caller = known.map_err(|error| {
            self.audit.refused(None, address, rpc, error.reason());
            RelayError::Unauthenticated(error)
        })?;
        match need {
            Need::Permission(permission) if !caller.may(permission) => {
                let error = RelayError::PermissionMissing(permission);
                self.audit
                    .refused(Some(&caller.name), address, rpc, error.reason());
                Err(error)
            }
            _ => Ok(caller),
        }
    }
}
