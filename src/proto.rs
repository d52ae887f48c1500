//! The gRPC contract, generated from `proto/` by `build.rs`.

#![allow(missing_docs, unreachable_pub, clippy::all)]

tonic::include_proto!("jebbit.segmentrelay.v1");

/// The services that this relay serves: the requests that take captures are those of [`raw`].
pub mod server {
    include!(concat!(
        env!("OUT_DIR"),
        "/server/jebbit.segmentrelay.v1.rs"
    ));
}

/// The descriptors of the package and of all that it imports, encoded as a
/// `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub(crate) mod codec;
pub mod raw;
mod redacted;
