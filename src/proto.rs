//! The gRPC contract, generated from `proto/` by `build.rs`.

#![allow(missing_docs, unreachable_pub, clippy::all)]

tonic::include_proto!("jebbit.segmentrelay.v1");

/// The descriptors of the package and of all that it imports, encoded as a
/// `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

mod redacted;
