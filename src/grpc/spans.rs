//! The spans of calls, by OpenTelemetry's semantic conventions for RPC.

use http::HeaderMap;
use opentelemetry::{
    propagation::TextMapPropagator,
    trace::{SpanContext, TraceContextExt},
};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::Code;
use tracing::{Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::rpcs::code_name;
use crate::trace::{CHOSEN, TARGET, TraceLink, Traces};

/// Header of a caller's trace context (W3C Trace Context, section 3.2).
const TRACEPARENT: &str = "traceparent";

/// The span of a call, until its answer has left.
pub(super) fn call(traces: Traces, method: &'static str, headers: &HeaderMap) -> Span {
    let has_caller = headers.contains_key(TRACEPARENT);
    if !traces.are_on() && !has_caller {
        return Span::none();
    }
    let span = tracing::info_span!(
        target: TARGET,
        parent: None,
        "call",
        otel.name = method,
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system.name = "grpc",
        rpc.method = method,
        rpc.response.status_code = Empty,
        "error.type" = Empty,
        segment_relay.integration_id = Empty,
        segment_relay.capture_id = Empty,
        segment_relay.captures = Empty,
    );
    if has_caller {
        let caller = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
        // It fails where nobody looks at spans.
        let _ = span.set_parent(caller);
    }
    span
}

/// The trace of a stream, to which those of its messages are linked.
#[derive(Clone, Debug, Default)]
pub(super) struct StreamTrace {
    /// The stream's span, where it is exported.
    link: Option<TraceLink>,
    /// What its caller has decided on tracing it, where it has.
    decided: Option<bool>,
}

impl StreamTrace {
    /// That of the call with these headers, whose span is entered.
    pub(super) fn current(headers: &HeaderMap) -> Self {
        let caller = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
        let caller = caller.span().span_context().clone();
        Self {
            link: TraceLink::current(),
            decided: caller.is_valid().then(|| caller.is_sampled()),
        }
    }

    /// Whether one of its messages is traced: as the caller has decided for all of them, or by
    /// the ratio.
    fn chooses(&self, traces: Traces, dice: f64) -> bool {
        match self.decided {
            Some(decided) => decided && traces.are_on(),
            None => traces.choose(dice),
        }
    }
}

/// The span of one message of a stream: a trace of its own, linked to the
/// stream's, since a stream may last for days. Nothing where it is not chosen.
pub(super) fn message(traces: Traces, stream: &StreamTrace) -> Span {
    if !stream.chooses(traces, fastrand::f64()) {
        return Span::none();
    }
    let span = tracing::info_span!(
        target: TARGET,
        parent: None,
        "CaptureStream message",
        { CHOSEN } = 1,
        otel.status_code = Empty,
        "error.type" = Empty,
        rpc.response.status_code = Empty,
        segment_relay.integration_id = Empty,
        segment_relay.capture_id = Empty,
    );
    let link = stream.link.as_ref();
    span.add_link(link.map_or(SpanContext::NONE, TraceLink::span_context));
    span
}

/// Notes the status with which a call or a message was answered, and ends its span
/// with this moment.
pub(super) fn answered(span: &Span, code: Code) {
    if span.is_disabled() {
        return;
    }
    let name = code_name(code);
    span.record("rpc.response.status_code", name);
    if is_fault(code) {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", name);
    }
    span.in_scope(|| {});
}

/// Whether the relay is to blame (semantic conventions for gRPC, server spans).
fn is_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_of_a_stream_decides_for_its_messages_and_without_it_the_ratio() {
        let some = Traces::On { sample_ratio: 0.1 };
        let decided = |flags: &str| {
            let mut headers = HeaderMap::new();
            let value = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
            headers.insert(TRACEPARENT, value.parse().expect("ASCII"));
            StreamTrace::current(&headers)
        };
        assert!(decided("01").chooses(some, 0.9));
        assert!(!decided("00").chooses(some, 0.0));
        assert!(!decided("01").chooses(Traces::Off, 0.0));
        let nothing = StreamTrace::current(&HeaderMap::new());
        assert!(nothing.chooses(some, 0.0) && !nothing.chooses(some, 0.9));
    }
}
