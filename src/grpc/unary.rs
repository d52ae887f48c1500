//! One message in, one message out, for calls whose messages are not compressed: without
//! the buffers, boxes and copies that streams and compression need ("gRPC over HTTP/2").

use std::{
    future::{poll_fn, ready},
    pin::Pin,
};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use http_body::Body as HttpBody;
use http_body_util::{BodyExt, Full};
use prost::Message;
use tonic::{Status, body::Body, metadata::MetadataMap};

use super::body::Metered;

/// What stands before a message: whether it is compressed, and its length.
const HEAD_BYTES: usize = 5;

/// Whether the messages of a call come as they are. It takes others to say so.
pub(super) fn is_plain(headers: &HeaderMap) -> bool {
    let encoding = headers.get("grpc-encoding");
    encoding.is_none_or(|encoding| encoding == "identity")
}

/// The answer to a call with one message of at most `limit` bytes.
pub(super) async fn answered<Q, A, F>(
    request: Request<Metered>,
    limit: usize,
    handle: impl FnOnce(tonic::Request<Q>) -> F,
) -> Response<Body>
where
    Q: Message + Default,
    A: Message,
    F: Future<Output = Result<tonic::Response<A>, Status>>,
{
    let (parts, body) = request.into_parts();
    let message = match received(body, limit).await {
        Ok(message) => message,
        Err(status) => return status.into_http(),
    };
    let metadata = MetadataMap::from_headers(parts.headers);
    let request = tonic::Request::from_parts(metadata, parts.extensions, message);
    match handle(request).await {
        Ok(answer) => whole(answer),
        Err(status) => status.into_http(),
    }
}

/// The message of a request, once it has ended.
async fn received<Q: Message + Default>(mut body: Metered, limit: usize) -> Result<Q, Status> {
    let mut gathered = Gathered::default();
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        if let Ok(data) = frame?.into_data() {
            gathered.add(data, limit)?;
        }
    }
    Q::decode(gathered.message()?).map_err(|error| Status::internal(error.to_string()))
}

/// A message as it comes in. Most come in one frame, which is not copied.
#[derive(Debug, Default)]
struct Gathered {
    first: Bytes,
    /// All of it, where there is more than the first.
    all: BytesMut,
}

impl Gathered {
    fn add(&mut self, data: Bytes, limit: usize) -> Result<(), Status> {
        if self.bytes().is_empty() {
            self.first = data;
        } else {
            if self.all.is_empty() {
                self.all.extend_from_slice(&std::mem::take(&mut self.first));
            }
            self.all.extend_from_slice(&data);
        }
        let Some(length) = self.length()? else {
            return Ok(());
        };
        if length > limit {
            return Err(Status::out_of_range(format!(
                "the message is too large: {length} bytes, and at most {limit} are taken"
            )));
        }
        if self.bytes().len() > HEAD_BYTES + length {
            return Err(Status::internal("more than one message in a unary call"));
        }
        Ok(())
    }

    fn bytes(&self) -> &[u8] {
        if self.all.is_empty() {
            &self.first
        } else {
            &self.all
        }
    }

    /// Bytes of the message, once its head is there.
    fn length(&self) -> Result<Option<usize>, Status> {
        let Some((&[flag, length @ ..], _)) = self.bytes().split_first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        match flag {
            0 => Ok(Some(u32::from_be_bytes(length) as usize)),
            _ => Err(Status::internal(
                "a compressed message, and no grpc-encoding that says how",
            )),
        }
    }

    fn message(self) -> Result<Bytes, Status> {
        let have = self.bytes().len();
        match self.length()? {
            Some(length) if have == HEAD_BYTES + length => {}
            None if have == 0 => return Err(Status::internal("the request has no message")),
            _ => return Err(Status::internal("the request ends within its message")),
        }
        let bytes = if self.all.is_empty() {
            self.first
        } else {
            self.all.freeze()
        };
        Ok(bytes.slice(HEAD_BYTES..))
    }
}

fn whole<A: Message>(answer: tonic::Response<A>) -> Response<Body> {
    let (metadata, message, extensions) = answer.into_parts();
    let length = message.encoded_len();
    // Beyond it nothing could say how long it is.
    let Ok(head) = u32::try_from(length) else {
        return Status::resource_exhausted("the answer is too large").into_http();
    };
    let mut data = BytesMut::with_capacity(HEAD_BYTES + length);
    data.put_u8(0);
    data.put_u32(head);
    message.encode_raw(&mut data);
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    let body = Full::new(data.freeze()).with_trailers(ready(Some(Ok(trailers))));
    let mut response = Response::new(Body::new(body));
    *response.headers_mut() = metadata.into_headers();
    *response.extensions_mut() = extensions;
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, grpc);
    response
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    const LIMIT: usize = 100;

    fn framed(flag: u8, length: u8, message: &[u8]) -> Vec<u8> {
        [&[flag, 0, 0, 0, length], message].concat()
    }

    fn gathered(pieces: &[&[u8]]) -> Result<Bytes, Status> {
        let mut gathered = Gathered::default();
        for piece in pieces {
            gathered.add(Bytes::copy_from_slice(piece), LIMIT)?;
        }
        gathered.message()
    }

    #[test]
    fn a_message_is_the_same_however_its_bytes_are_cut() {
        let message: Vec<u8> = (0..100).collect();
        let bytes = framed(0, 100, &message);
        for size in 1..=bytes.len() {
            let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
            assert_eq!(
                gathered(&pieces).expect("whole"),
                message,
                "pieces of {size}"
            );
        }
        assert_eq!(gathered(&[&framed(0, 0, b"")]).expect("empty"), "");
    }

    #[test]
    fn what_is_no_single_plain_message_is_refused() {
        let whole = framed(0, 3, b"abc");
        let refused: [(&[&[u8]], Code, &str); 8] = [
            (&[], Code::Internal, "no message"),
            (&[b""], Code::Internal, "no message"),
            (&[b"\0\0"], Code::Internal, "ends within"),
            (&[&framed(0, 3, b"ab")], Code::Internal, "ends within"),
            (&[&framed(0, 3, b"abcd")], Code::Internal, "more than one"),
            (&[&whole, &whole], Code::Internal, "more than one"),
            (&[&framed(1, 3, b"abc")], Code::Internal, "compressed"),
            (&[&framed(0, 101, b"")], Code::OutOfRange, "101 bytes"),
        ];
        for (pieces, code, text) in refused {
            let status = gathered(pieces).expect_err(text);
            assert_eq!(status.code(), code, "{text}");
            assert!(status.message().contains(text), "{}", status.message());
        }
    }

    #[test]
    fn a_call_is_plain_that_names_no_encoding() {
        let plain = |encoding: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            if let Some(encoding) = encoding {
                headers.insert("grpc-encoding", HeaderValue::from_static(encoding));
            }
            is_plain(&headers)
        };
        assert!(plain(None) && plain(Some("identity")));
        assert!(!plain(Some("gzip")));
    }
}
