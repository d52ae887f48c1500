//! Times a call, from its headers to the status in its answer's trailers.

use http::HeaderMap;
use tokio::time::Instant;
use tonic::{Code, Status};
use tracing::Span;

use super::{rpcs::code_name, spans};
use crate::metrics::Metrics;

/// A call under way. One that ends without a status was cancelled.
pub(super) struct CallTimer {
    metrics: Metrics,
    method: &'static str,
    span: Span,
    begun: Instant,
    ended: bool,
}

impl CallTimer {
    pub(super) fn new(metrics: Metrics, method: &'static str, span: Span, begun: Instant) -> Self {
        Self {
            metrics,
            method,
            span,
            begun,
            ended: false,
        }
    }

    /// Ends it where headers or trailers have a status; otherwise gives it back.
    pub(super) fn see(self, headers: &HeaderMap) -> Option<Self> {
        let Some(status) = headers.get(Status::GRPC_STATUS) else {
            return Some(self);
        };
        self.end(Code::from_bytes(status.as_bytes()));
        None
    }

    pub(super) fn end(mut self, code: Code) {
        self.note(code);
    }

    fn note(&mut self, code: Code) {
        self.ended = true;
        self.metrics
            .rpc(self.method, code_name(code), self.begun.elapsed());
        spans::answered(&self.span, code);
    }
}

impl Drop for CallTimer {
    fn drop(&mut self) {
        if !self.ended {
            self.note(Code::Cancelled);
        }
    }
}
