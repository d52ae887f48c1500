//! The gRPC ceiling: a tonic server with default settings that decodes the same
//! requests and does nothing.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::{Stream, StreamExt};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    server::{Grpc, NamedService, StreamingService, UnaryService},
    transport::{Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;
use tower_service::Service;

use crate::{
    call::{Answers, StreamAnswer},
    workload::reference::{CaptureBatchRequest, CaptureRequest, CaptureStreamRequest},
};

#[derive(Clone)]
struct Bare;

impl NamedService for Bare {
    const NAME: &'static str = "jebbit.segmentrelay.v1.SegmentRelay";
}

impl UnaryService<CaptureRequest> for Bare {
    type Response = Answers;
    type Future = Ready<Result<Response<Answers>, Status>>;

    fn call(&mut self, _request: Request<CaptureRequest>) -> Self::Future {
        ready(Ok(Response::new(Answers::default())))
    }
}

impl UnaryService<CaptureBatchRequest> for Bare {
    type Response = Answers;
    type Future = Ready<Result<Response<Answers>, Status>>;

    fn call(&mut self, _request: Request<CaptureBatchRequest>) -> Self::Future {
        ready(Ok(Response::new(Answers::default())))
    }
}

type AnswerStream = Pin<Box<dyn Stream<Item = Result<StreamAnswer, Status>> + Send>>;

impl StreamingService<CaptureStreamRequest> for Bare {
    type Response = StreamAnswer;
    type ResponseStream = AnswerStream;
    type Future = Ready<Result<Response<AnswerStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<CaptureStreamRequest>>) -> Self::Future {
        let answers = request.into_inner().map(|request| {
            Ok(StreamAnswer {
                correlation_id: request?.correlation_id,
                result: None,
            })
        });
        ready(Ok(Response::new(Box::pin(answers))))
    }
}

impl Service<http::Request<Body>> for Bare {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        match method {
            "Capture" => Box::pin(async {
                let codec = ProstCodec::<Answers, CaptureRequest>::default();
                Ok(Grpc::new(codec).unary(Bare, request).await)
            }),
            "CaptureBatch" => Box::pin(async {
                let codec = ProstCodec::<Answers, CaptureBatchRequest>::default();
                Ok(Grpc::new(codec).unary(Bare, request).await)
            }),
            "CaptureStream" => Box::pin(async {
                let codec = ProstCodec::<StreamAnswer, CaptureStreamRequest>::default();
                Ok(Grpc::new(codec).streaming(Bare, request).await)
            }),
            _ => Box::pin(async { Ok(Status::unimplemented("no such method").into_http()) }),
        }
    }
}

/// Serves until it is killed.
pub(crate) async fn serve() -> serde_json::Value {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = listener.local_addr().expect("an address");
    println!("bare tonic server on {address}");
    Server::builder()
        .add_service(Bare)
        // What `serve` would set: without it answers wait for the peer's delayed ACKs.
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await
        .expect("serves");
    serde_json::Value::Null
}
