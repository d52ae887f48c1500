//! The spans of a batch: one for the batch, linked to the calls that brought its
//! captures; its request to Segment below it, by OpenTelemetry's semantic
//! conventions for HTTP; and one in the trace of each such call, so that whoever
//! looks at a capture sees what became of it.

use opentelemetry::trace::TraceContextExt;
use tracing::{Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::report::word;
use crate::{
    config::Endpoint,
    outbox::{LaneKey, LeasedCapture, Settlement},
    proto::DeliveryReason,
    segment::Answer,
    trace::{TARGET, Traces, number},
};

/// The spans of one batch.
pub(super) struct BatchSpans {
    batch: Span,
    /// Those in the captures' own traces, by the captures' sequence.
    captures: Vec<(i64, Span)>,
}

impl BatchSpans {
    pub(super) fn open(traces: Traces, lane: &LaneKey, leased: &[LeasedCapture]) -> Self {
        if !traces.are_on() {
            return Self {
                batch: Span::none(),
                captures: Vec::new(),
            };
        }
        let events: u32 = leased.iter().map(LeasedCapture::event_count).sum();
        let batch = tracing::info_span!(
            target: TARGET,
            parent: None,
            "deliver batch",
            otel.status_code = Empty,
            segment_relay.integration_id = lane.integration_id.name(),
            segment_relay.region = lane.region.name(),
            segment_relay.lane = number(lane.shard),
            segment_relay.captures = number(leased.len()),
            segment_relay.events = number(events),
        );
        let traced = leased
            .iter()
            .filter_map(|capture| Some((capture, capture.record.trace.as_ref()?)));
        for (_, call) in traced.clone() {
            batch.add_link(call.span_context());
        }
        let context = batch.context().span().span_context().clone();
        let captures = traced.map(|(capture, call)| {
            let span = tracing::info_span!(
                target: TARGET,
                parent: None,
                "deliver",
                otel.status_code = Empty,
                segment_relay.integration_id = lane.integration_id.name(),
                segment_relay.capture_id = capture.record.capture_id,
                segment_relay.identify.state = Empty,
                segment_relay.track.state = Empty,
                segment_relay.reason = Empty,
            );
            let call = opentelemetry::Context::new().with_remote_span_context(call.span_context());
            // It fails where nobody looks at spans.
            let _ = span.set_parent(call);
            span.add_link(context.clone());
            (capture.sequence, span)
        });
        let captures = captures.collect();
        Self { batch, captures }
    }

    pub(super) fn batch(&self) -> &Span {
        &self.batch
    }

    /// Ends them with what was made durable.
    pub(super) fn close(self, settlement: &Settlement) {
        for (sequence, span) in self.captures {
            let found = settlement
                .captures
                .iter()
                .find(|one| one.sequence == sequence);
            if let Some(settled) = found {
                let (identify, track) = (&settled.record.identify, &settled.record.track);
                let reason = match identify.state.reason() {
                    DeliveryReason::Unspecified => track.state.reason(),
                    reason => reason,
                };
                span.record("segment_relay.identify.state", identify.state.name());
                span.record("segment_relay.track.state", track.state.name());
                if reason != DeliveryReason::Unspecified {
                    span.record("segment_relay.reason", word(reason));
                    span.record("otel.status_code", "ERROR");
                }
            }
            span.in_scope(|| {});
        }
    }
}

/// The span of a request to Segment, below the batch's.
pub(super) fn attempt(
    traces: Traces,
    endpoint: &Endpoint,
    retries: u32,
    events: usize,
    bytes: usize,
) -> Span {
    if !traces.are_on() {
        return Span::none();
    }
    let span = tracing::info_span!(
        target: TARGET,
        "attempt",
        otel.name = "POST",
        otel.kind = "client",
        otel.status_code = Empty,
        http.request.method = "POST",
        http.request.body.size = number(bytes),
        http.request.resend_count = Empty,
        http.response.status_code = Empty,
        server.address = endpoint.host(),
        server.port = number(endpoint.port()),
        url.full = endpoint.as_str(),
        "error.type" = Empty,
        segment_relay.events = number(events),
        segment_relay.reason = Empty,
    );
    if retries > 0 {
        span.record("http.request.resend_count", number(retries));
    }
    span
}

/// Notes what came of the request, and what that means for its events.
pub(super) fn answered(batch: &Span, attempt: &Span, answer: &Answer, reason: DeliveryReason) {
    if answer.http_status() > 0 {
        let status = number(answer.http_status());
        attempt.record("http.response.status_code", status);
    }
    if reason == DeliveryReason::Unspecified {
        return;
    }
    attempt.record("error.type", answer.error_type().as_str());
    attempt.record("segment_relay.reason", word(reason));
    for span in [batch, attempt] {
        span.record("otel.status_code", "ERROR");
    }
}
