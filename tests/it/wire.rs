//! A client that speaks gRPC by hand over HTTP/2: each message is one frame, and it may do
//! what client libraries do not.

use std::{future::poll_fn, net::SocketAddr, task::Poll};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{
    Ping, PingPong, SendStream,
    client::{Builder, ResponseFuture, SendRequest},
};
use http::{HeaderMap, Request, StatusCode, request};
use prost::Message;
use tokio::{net::TcpStream, task::JoinHandle};
use tonic::Status;

use crate::harness::PATIENCE;

/// One connection.
pub(crate) struct Wire {
    sender: SendRequest<Bytes>,
    pings: PingPong,
    /// Ends with the connection.
    pub(crate) ended: JoinHandle<Result<(), h2::Error>>,
}

/// The answer to a call.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) messages: Vec<Bytes>,
    pub(crate) trailers: HeaderMap,
}

impl Answer {
    /// The status, wherever it stands.
    pub(crate) fn grpc(&self) -> Status {
        let found = Status::from_header_map(&self.trailers);
        let found = found.or_else(|| Status::from_header_map(&self.headers));
        found.expect("a status")
    }

    /// The number in `grpc-status`, wherever it stands.
    pub(crate) fn code(&self) -> Option<i32> {
        let status = self.trailers.get("grpc-status");
        let status = status.or_else(|| self.headers.get("grpc-status"))?;
        status.to_str().ok()?.parse().ok()
    }
}

/// A request as client libraries begin it.
pub(crate) fn call(path: &str) -> request::Builder {
    Request::post(format!("http://relay{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
}

/// A message as gRPC frames it.
pub(crate) fn framed(message: &impl Message) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.encoded_len().try_into().expect("short"));
    message.encode(&mut frame).expect("there is room");
    frame.freeze()
}

impl Wire {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let tcp = TcpStream::connect(address).await.expect("connects");
        tcp.set_nodelay(true).expect("set");
        // Results that are not read take the window of their own call alone.
        let begun = Builder::new()
            .initial_connection_window_size(64 * 1024 * 1024)
            .handshake(tcp)
            .await;
        let (sender, mut connection) = begun.expect("HTTP/2");
        let pings = connection.ping_pong().expect("the only one");
        let ended = tokio::spawn(connection);
        Self {
            sender,
            pings,
            ended,
        }
    }

    /// Begins a call.
    pub(crate) async fn open(
        &self,
        request: request::Builder,
        ends: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let mut sender = self.sender.clone().ready().await?;
        sender.send_request(request.body(()).expect("a request"), ends)
    }

    /// A call with a body of one frame.
    pub(crate) async fn unary(
        &self,
        request: request::Builder,
        message: Bytes,
    ) -> Result<Answer, h2::Error> {
        let (answer, mut stream) = self.open(request, false).await?;
        stream.send_data(message, true)?;
        within(read(answer)).await
    }

    /// Sends `most` frames, or until the relay takes no more for a hundred round trips.
    /// Returns how many.
    pub(crate) async fn fill(
        &mut self,
        stream: &mut SendStream<Bytes>,
        most: usize,
        mut frame: impl FnMut(usize) -> Bytes,
    ) -> Result<usize, h2::Error> {
        let (mut sent, mut trips) = (0, 0);
        let mut is_under_way = false;
        let mut next = frame(0);
        while sent < most && trips < 100 {
            stream.reserve_capacity(next.len());
            let took = poll_fn(|context| {
                if stream.capacity() >= next.len() {
                    return Poll::Ready(Ok(true));
                }
                match stream.poll_capacity(context) {
                    Poll::Ready(Some(Ok(have))) if have >= next.len() => {
                        return Poll::Ready(Ok(true));
                    }
                    Poll::Ready(Some(Ok(_))) => context.waker().wake_by_ref(),
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                    Poll::Ready(None) => return Poll::Ready(Err(h2::Reason::STREAM_CLOSED.into())),
                    Poll::Pending => {}
                }
                if !std::mem::replace(&mut is_under_way, true) {
                    self.pings.send_ping(Ping::opaque())?;
                }
                self.pings.poll_pong(context).map_ok(|_| {
                    is_under_way = false;
                    false
                })
            });
            if within(took).await? {
                stream.send_data(next, false)?;
                (sent, trips) = (sent + 1, 0);
                next = frame(sent);
            } else {
                trips += 1;
            }
        }
        Ok(sent)
    }
}

/// Reads an answer to its end.
pub(crate) async fn read(answer: ResponseFuture) -> Result<Answer, h2::Error> {
    let (head, mut body) = answer.await?.into_parts();
    let mut bytes = BytesMut::new();
    let mut messages = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        bytes.extend_from_slice(&data);
        while let Some(message) = whole(&mut bytes) {
            messages.push(message);
        }
    }
    Ok(Answer {
        status: head.status,
        headers: head.headers,
        messages,
        trailers: body.trailers().await?.unwrap_or_default(),
    })
}

fn whole(bytes: &mut BytesMut) -> Option<Bytes> {
    let head: [u8; 5] = bytes.get(..5)?.try_into().ok()?;
    let [_, length @ ..] = head;
    let length = u32::from_be_bytes(length) as usize;
    if bytes.len() < 5 + length {
        return None;
    }
    let mut message = bytes.split_to(5 + length);
    message.advance(5);
    Some(message.freeze())
}

pub(crate) async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("in time")
}
