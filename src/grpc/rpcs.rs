//! What each rpc needs. A test walks the schema and fails where one is missing.

use tonic::Code;

use crate::permission::Permission;

/// What an rpc asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: whoever reaches the port.
    Nothing,
    /// To be known.
    Identity,
    /// A permission.
    Permission(Permission),
}

use Need::{Identity, Nothing};
use Permission::{Capture, DeadLetters, Integrations, Privacy, Read};

const fn needs(permission: Permission) -> Need {
    Need::Permission(permission)
}

/// Every rpc of the schema by its path. Reflection and what else lies beside them
/// needs an identity, health nothing.
pub const RPCS: [(&str, Need); 17] = [
    (
        "/jebbit.segmentrelay.v1.SegmentRelay/Capture",
        needs(Capture),
    ),
    (
        "/jebbit.segmentrelay.v1.SegmentRelay/CaptureBatch",
        needs(Capture),
    ),
    (
        "/jebbit.segmentrelay.v1.SegmentRelay/CaptureStream",
        needs(Capture),
    ),
    (
        "/jebbit.segmentrelay.v1.SegmentRelay/PreviewCapture",
        needs(Capture),
    ),
    (
        "/jebbit.segmentrelay.v1.SegmentRelay/GetCapture",
        needs(Read),
    ),
    (
        "/jebbit.segmentrelay.v1.SegmentRelay/WatchDeliveries",
        needs(Read),
    ),
    (
        "/jebbit.segmentrelay.v1.IntegrationService/CreateIntegration",
        needs(Integrations),
    ),
    (
        "/jebbit.segmentrelay.v1.IntegrationService/GetIntegration",
        needs(Read),
    ),
    (
        "/jebbit.segmentrelay.v1.IntegrationService/ListIntegrations",
        needs(Read),
    ),
    (
        "/jebbit.segmentrelay.v1.IntegrationService/UpdateIntegration",
        needs(Integrations),
    ),
    (
        "/jebbit.segmentrelay.v1.IntegrationService/DeleteIntegration",
        needs(Integrations),
    ),
    (
        "/jebbit.segmentrelay.v1.IntegrationService/TestIntegration",
        needs(Integrations),
    ),
    (
        "/jebbit.segmentrelay.v1.DeadLetterService/ListDeadLetters",
        needs(Read),
    ),
    (
        "/jebbit.segmentrelay.v1.DeadLetterService/ReplayDeadLetters",
        needs(DeadLetters),
    ),
    (
        "/jebbit.segmentrelay.v1.DeadLetterService/DiscardDeadLetters",
        needs(DeadLetters),
    ),
    (
        "/jebbit.segmentrelay.v1.PrivacyService/EraseSubject",
        needs(Privacy),
    ),
    (
        "/jebbit.segmentrelay.v1.PrivacyService/ListErasureReceipts",
        needs(Privacy),
    ),
];

/// The rpc of a path, for labels: the full names of those of the schema and of
/// health checks, and `_OTHER` (semantic conventions for RPC, `rpc.method`).
pub(super) fn method(path: &str) -> &'static str {
    let known = RPCS.iter().map(|(known, _)| *known);
    known
        .chain([
            "/grpc.health.v1.Health/Check",
            "/grpc.health.v1.Health/Watch",
        ])
        .find(|known| *known == path)
        .map_or("_OTHER", |known| &known[1..])
}

/// Whether the requests of a path are a stream.
pub(super) fn streams_requests(path: &str) -> bool {
    path.ends_with("/CaptureStream")
}

/// What the rpc of a path needs.
pub(super) fn need(path: &str) -> Need {
    if path.starts_with("/grpc.health.v1.Health/") {
        return Nothing;
    }
    RPCS.iter()
        .find(|(known, _)| *known == path)
        .map_or(Identity, |(_, need)| *need)
}

/// The codes in the order of their numbers (gRPC, "Status codes").
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// The name of a code.
pub(super) fn code_name(code: Code) -> &'static str {
    CODES.get(code as usize).copied().unwrap_or("UNKNOWN")
}
