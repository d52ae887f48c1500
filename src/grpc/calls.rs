//! A call's way through the relay: who calls, may they, is there room; then to its service
//! within its time; and counted until its answer has left.

use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::body::Incoming;
use tokio::time::Instant;
use tonic::{Code, Status, body::Body, codegen::BoxFuture};
use tracing::Instrument;

use super::{
    Access, Dispatch, Peer, RelayError,
    body::{Answering, CallGuards, Metered},
    deadline,
    rpcs::Rpc,
    spans,
    timer::CallTimer,
};

/// Answers the calls of one connection.
pub struct Calls {
    access: Arc<Access>,
    services: Dispatch,
    /// How long a call may take that is not a stream.
    longest: Duration,
    peer: Peer,
}

impl Calls {
    /// Those of a peer, each of which may take `longest` until its answer begins.
    #[must_use]
    pub fn new(access: Arc<Access>, services: Dispatch, longest: Duration, peer: Peer) -> Self {
        Self {
            access,
            services,
            longest,
            peer,
        }
    }

    /// Answers one call. What fails is a status in the answer.
    ///
    /// In one box from its beginning: hyper and tokio move what they spawn several times.
    pub fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> BoxFuture<Response<Answering>, Infallible> {
        Box::pin(async move { Ok(self.answered(request).await) })
    }

    async fn answered(&self, request: Request<Incoming>) -> Response<Answering> {
        let begun = Instant::now();
        let rpc = Rpc::of(request.uri().path());
        let deadline = begun + deadline::timeout(request.headers(), self.longest);
        let span = spans::call(self.access.traces, rpc.method(), request.headers());
        let timer = CallTimer::new(
            self.access.metrics.clone(),
            rpc.method(),
            span.clone(),
            begun,
        );
        // Pinned where it is: what is put around it moves nothing.
        let serving = pin!(self.serve(rpc, request, deadline));
        let served = tokio::time::timeout_at(deadline, serving).instrument(span);
        let served = served.await;
        match served.unwrap_or(Err(RelayError::DeadlineExceeded)) {
            Ok((answer, guards)) => {
                let timer = timer.see(answer.headers());
                answer.map(|body| Answering::new(body, guards, timer))
            }
            Err(error) => {
                timer.end(error.code());
                Status::from(error).into_http().map(Answering::free)
            }
        }
    }

    /// Lets a call in and brings it to its service.
    async fn serve(
        &self,
        rpc: Rpc,
        mut request: Request<Incoming>,
        deadline: Instant,
    ) -> Result<(Response<Body>, CallGuards), RelayError> {
        let admission = self
            .access
            .admit(rpc, &request, &self.peer, deadline)
            .await?;
        let caller = admission.pass.as_ref().map(|pass| Arc::clone(&pass.caller));
        if let Some(pass) = admission.pass {
            request.extensions_mut().insert(pass);
        }
        let request = request.map(|body| Metered::new(body, admission.meter));
        let answered = self.services.call(request).await;
        let answer = answered.unwrap_or_else(|never| match never {});
        let status = answer.headers().get(Status::GRPC_STATUS);
        if status.is_some_and(|code| Code::from_bytes(code.as_bytes()) == Code::PermissionDenied) {
            // It named an integration of others.
            let error = RelayError::OutOfScope;
            self.access
                .note_refusal(caller.as_deref(), &self.peer, rpc.path, &error);
        }
        Ok((answer, admission.guards))
    }
}
