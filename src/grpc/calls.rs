//! A call's way through the relay: who calls, may they, is there room; then to its service
//! within its time; and counted until its answer has left.

use std::{convert::Infallible, pin::pin, sync::Arc, task::Poll, time::Duration};

use futures_util::{FutureExt, poll};
use http::{Request, Response};
use tokio::time::Instant;
use tonic::{Code, Status, body::Body, codegen::BoxFuture};
use tracing::{Instrument, Span};

use super::{
    Access, Dispatch, Incoming, Peer, RelayError,
    access::{Admission, Pass},
    body::{Answering, Meter, Metered},
    deadline, foreign,
    inflate::Encoding,
    protocol,
    rpcs::{OTHER, Rpc},
    spans,
    timer::CallTimer,
};
use crate::permission::Caller;

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
    /// In one box from its beginning: tokio moves what it spawns several times.
    /// And in one block: each future that hands a request on has room for one of its own.
    pub fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> BoxFuture<Response<Answering>, Infallible> {
        if let Some(refusal) = protocol::refusal(&request) {
            return Box::pin(std::future::ready(Ok(refusal.map(Answering::free))));
        }
        Box::pin(async move {
            let Begun {
                rpc,
                deadline,
                span,
                timer,
            } = self.begin(&request);
            let admitted = self.access.admit(rpc, &request, &self.peer, deadline);
            let Admission {
                pass,
                guards,
                meter,
            } = match within(deadline, admitted).instrument(span.clone()).await {
                Ok(admission) => admission,
                Err(error) => return Ok(failed(error, timer)),
            };
            let serving = self.serve(rpc, request, pass, meter);
            let served = within(deadline, serving).instrument(span).await;
            Ok(match served {
                Ok(answer) => {
                    let timer = timer.see(answer.headers());
                    answer.map(|body| Answering::new(body, guards, timer))
                }
                Err(error) => failed(error, timer),
            })
        })
    }

    fn begin(&self, request: &Request<Incoming>) -> Begun {
        let (headers, begun) = (request.headers(), Instant::now());
        let rpc = Rpc::of(request.uri().path());
        let span = spans::call(self.access.traces, rpc.method(), headers);
        let metrics = self.access.metrics.clone();
        Begun {
            rpc,
            deadline: begun + deadline::timeout(headers, self.longest),
            timer: CallTimer::new(metrics, rpc.method(), span.clone(), begun),
            span,
        }
    }

    /// Brings a call that was let in to its service.
    fn serve(
        &self,
        rpc: Rpc,
        mut request: Request<Incoming>,
        pass: Option<Pass>,
        meter: Option<Meter>,
    ) -> impl Future<Output = Result<Response<Body>, RelayError>> {
        let caller = pass.as_ref().map(|pass| Arc::clone(&pass.caller));
        if let Some(pass) = pass {
            request.extensions_mut().insert(pass);
        }
        let encoding = Encoding::of(request.headers());
        let unknown = (rpc.path == OTHER).then(|| request.uri().path().to_owned());
        if encoding == Encoding::Gzip {
            request.headers_mut().remove("grpc-encoding");
        }
        let limit = self.services.max_message();
        let request = request.map(|body| match encoding {
            Encoding::Gzip => Metered::inflated(body, meter, limit),
            Encoding::Plain | Encoding::Other => Metered::new(body, meter),
        });
        self.services.call(request).map(move |answered| {
            let answer = answered.unwrap_or_else(|never| match never {});
            self.note_foreign(rpc, caller.as_deref(), &answer);
            Ok(foreign::explained(answer, unknown.as_deref()))
        })
    }

    /// Notes a call that was refused for it named an integration of others.
    fn note_foreign(&self, rpc: Rpc, caller: Option<&Caller>, answer: &Response<Body>) {
        let status = answer.headers().get(Status::GRPC_STATUS);
        if status.is_some_and(|code| Code::from_bytes(code.as_bytes()) == Code::PermissionDenied) {
            let error = RelayError::OutOfScope;
            self.access
                .note_refusal(caller, &self.peer, rpc.path, &error);
        }
    }
}

/// A call as it begins.
struct Begun {
    rpc: Rpc,
    deadline: Instant,
    span: Span,
    timer: CallTimer,
}

/// Work that has to end before `deadline`. What ends at once needs no timer.
async fn within<T, F>(deadline: Instant, work: F) -> Result<T, RelayError>
where
    F: Future<Output = Result<T, RelayError>>,
{
    let mut work = pin!(work);
    if let Poll::Ready(done) = poll!(work.as_mut()) {
        return done;
    }
    let done = tokio::time::timeout_at(deadline, work).await;
    done.unwrap_or(Err(RelayError::DeadlineExceeded))
}

fn failed(error: RelayError, timer: CallTimer) -> Response<Answering> {
    timer.end(error.code());
    Status::from(error).into_http().map(Answering::free)
}
