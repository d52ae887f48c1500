//! One call, with a request that is bytes already: the generator shares the machine with what it measures.

use std::marker::PhantomData;

use bytes::{BufMut, Bytes};
use http::uri::PathAndQuery;
use prost::Message;
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, EncodeBuf, Encoder},
    transport::Channel,
};
use tonic_prost::ProstDecoder;

/// Larger than any answer to the batches that are sent.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// What counts of `CaptureResponse` and of `CaptureBatchResponse`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Answers {
    #[prost(message, repeated, tag = "1")]
    pub(crate) results: Vec<Answer>,
}

/// What counts of a `CaptureResult`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Answer {
    #[prost(bool, tag = "2")]
    pub(crate) duplicate: bool,
    #[prost(message, optional, tag = "4")]
    pub(crate) error: Option<Refusal>,
}

/// What counts of a `CaptureError`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Refusal {
    #[prost(int32, tag = "1")]
    pub(crate) code: i32,
}

/// What counts of a `CaptureStreamResponse`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct StreamAnswer {
    #[prost(string, tag = "1")]
    pub(crate) correlation_id: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) result: Option<Answer>,
}

/// Bytes out, a message in.
pub(crate) struct RawCodec<D>(PhantomData<D>);

impl<D> Default for RawCodec<D> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

pub(crate) struct RawEncoder;

impl Encoder for RawEncoder {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl<D: Message + Default + Send + 'static> Codec for RawCodec<D> {
    type Encode = Bytes;
    type Decode = D;
    type Encoder = RawEncoder;
    type Decoder = ProstDecoder<D>;

    fn encoder(&mut self) -> RawEncoder {
        RawEncoder
    }

    fn decoder(&mut self) -> ProstDecoder<D> {
        ProstDecoder::default()
    }
}

/// The path of a method of `SegmentRelay`.
pub(crate) fn path(method: &str) -> PathAndQuery {
    let path = format!("/jebbit.segmentrelay.v1.SegmentRelay/{method}");
    path.parse().expect("a path")
}

/// A client of a channel.
pub(crate) fn client(channel: &Channel) -> Grpc<Channel> {
    Grpc::new(channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
}

/// Sends a request that has one answer.
pub(crate) async fn unary(
    client: &mut Grpc<Channel>,
    path: PathAndQuery,
    request: Bytes,
) -> Result<Answers, Status> {
    let ready = client.ready().await;
    ready.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = RawCodec::<Answers>::default();
    let answer = client.unary(Request::new(request), path, codec).await?;
    Ok(answer.into_inner())
}
