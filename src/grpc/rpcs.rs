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

/// What a call costs others, and how that is bounded for each caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cost {
    /// Bounded otherwise: captures by their rates, watchers by their number.
    Metered,
    /// A look-up or a computation.
    LookUp,
    /// It lists, searches, or changes what is stored.
    Costly,
}

/// The methods of health checks.
const HEALTH: [&str; 2] = [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
];
/// Services whose rpcs cost more than a look-up.
const COSTLY: [&str; 3] = [
    ".IntegrationService",
    ".DeadLetterService",
    ".PrivacyService",
];
/// Stands for the paths of all other rpcs.
pub(super) const OTHER: &str = "_OTHER";

/// The rpc of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rpc {
    /// Its path, where it is one of the schema or a health check.
    pub(super) path: &'static str,
    pub(super) need: Need,
}

impl Rpc {
    /// The one that a path names.
    pub(super) fn of(path: &str) -> Self {
        if let Some((path, need)) = RPCS.iter().find(|(known, _)| *known == path) {
            return Self { path, need: *need };
        }
        let is_health = path.starts_with("/grpc.health.v1.Health/");
        Self {
            path: HEALTH
                .into_iter()
                .find(|known| *known == path)
                .unwrap_or(OTHER),
            need: if is_health { Nothing } else { Identity },
        }
    }

    /// Its full name, for labels: `_OTHER` where it is not known (semantic conventions
    /// for RPC, `rpc.method`).
    pub(super) fn method(self) -> &'static str {
        self.path.strip_prefix('/').unwrap_or(self.path)
    }

    /// What it costs others.
    pub(super) fn cost(self) -> Cost {
        let (service, method) = self.path.rsplit_once('/').unwrap_or(("", self.path));
        match (service, method) {
            (_, "Capture" | "CaptureBatch" | "CaptureStream" | "WatchDeliveries") => Cost::Metered,
            (_, "GetIntegration") => Cost::LookUp,
            (service, _) if COSTLY.iter().any(|one| service.ends_with(one)) => Cost::Costly,
            (_, OTHER) => Cost::Metered,
            _ => Cost::LookUp,
        }
    }

    /// Whether its requests are a stream.
    pub(super) fn streams_requests(self) -> bool {
        self.path.ends_with("/CaptureStream")
    }
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
