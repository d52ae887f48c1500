//! What a capture passes on its way, as spans for OpenTelemetry.
//!
//! - A call has a span, the child of its caller's where the metadata has a trace
//!   context (W3C Trace Context). Steps have spans where the call is traced.
//! - The call's context is stored with its captures, so that a batch to Segment
//!   can be linked to them, also after a restart.
//! - Where nobody gets the spans, there are none but those of callers with a trace
//!   context: their ids stand in the log.
//! - No span holds an address, an attribute or a write key.

use std::{fmt, str::FromStr, sync::Arc};

use opentelemetry::{
    Context,
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use tracing::Span;

/// Target of all spans, by which the log leaves them out.
pub const TARGET: &str = "segment_relay::span";
/// Attribute with which a span without parent asks to be exported.
pub(crate) const CHOSEN: &str = "sampling.priority";

/// Whether somebody gets the spans.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Traces {
    /// Nobody.
    #[default]
    Off,
    /// A collector.
    On {
        /// Share of the calls without a caller's decision that it gets.
        sample_ratio: f64,
    },
}

impl Traces {
    /// Whether somebody gets them.
    #[must_use]
    pub fn are_on(self) -> bool {
        matches!(self, Self::On { .. })
    }

    /// Whether one more of many is to be traced; `dice` is from 0 to 1.
    #[must_use]
    pub fn choose(self, dice: f64) -> bool {
        matches!(self, Self::On { sample_ratio } if dice < sample_ratio)
    }
}

/// Longest trace state that is kept, in bytes: so much at least is to be passed on (W3C Trace
/// Context, section 3.3.1.5).
const MAX_STATE_BYTES: usize = 512;

/// A number as the value of a span's attribute: of other types it would become a text.
pub(crate) fn number(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

/// A span that is exported, as it is stored with a capture.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TraceLink {
    trace_id: TraceId,
    span_id: SpanId,
    /// The header `tracestate`, where there is one that is not too long.
    state: Option<Arc<str>>,
}

impl fmt::Debug for TraceLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.trace_id, self.span_id)
    }
}

impl TraceLink {
    /// Bytes of one that is stored without a trace state.
    pub const BYTES: usize = 24;

    /// The span that is entered, if it is exported.
    #[must_use]
    pub fn current() -> Option<Self> {
        Context::map_current(|context| {
            let span = context.span();
            let context = span.span_context();
            (context.is_valid() && context.is_sampled()).then(|| Self {
                trace_id: context.trace_id(),
                span_id: context.span_id(),
                state: kept(&context.trace_state().header()),
            })
        })
    }

    /// As it is stored: both ids, and the trace state as text.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let state = self.state.as_deref().unwrap_or_default();
        let ids = [&self.trace_id.to_bytes()[..], &self.span_id.to_bytes()];
        [ids.concat().as_slice(), state.as_bytes()].concat()
    }

    /// From what was stored; nothing where that is no span.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (trace_id, rest) = bytes.split_first_chunk()?;
        let (span_id, state) = rest.split_first_chunk()?;
        let link = Self {
            trace_id: TraceId::from_bytes(*trace_id),
            span_id: SpanId::from_bytes(*span_id),
            state: std::str::from_utf8(state).ok().and_then(kept),
        };
        let is_valid = link.trace_id != TraceId::INVALID && link.span_id != SpanId::INVALID;
        is_valid.then_some(link)
    }

    /// As spans are linked to it, or are its children.
    #[must_use]
    pub fn span_context(&self) -> SpanContext {
        let state = self.state.as_deref().map(TraceState::from_str);
        SpanContext::new(
            self.trace_id,
            self.span_id,
            TraceFlags::SAMPLED,
            true,
            state.and_then(Result::ok).unwrap_or(TraceState::NONE),
        )
    }
}

fn kept(state: &str) -> Option<Arc<str>> {
    (1..=MAX_STATE_BYTES)
        .contains(&state.len())
        .then(|| state.into())
}

/// A step of what is traced; nothing where it is not.
#[must_use]
pub fn step(name: &'static str) -> Span {
    if TraceLink::current().is_none() {
        return Span::none();
    }
    tracing::info_span!(target: TARGET, "step", otel.name = name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_comes_back_as_it_was_stored() {
        let bytes: Vec<u8> = (1..=24).collect();
        let link = TraceLink::from_bytes(&bytes).expect("a span");
        assert_eq!(link.to_bytes(), bytes);
        assert!(link.span_context().is_valid() && link.span_context().is_sampled());
        assert_eq!(link.span_context().trace_state(), &TraceState::NONE);
    }

    #[test]
    fn a_trace_state_is_kept_unless_it_is_too_long() {
        let ids: Vec<u8> = (1..=24).collect();
        let with = |state: &str| TraceLink::from_bytes(&[&ids, state.as_bytes()].concat());
        let link = with("vendor=1,other=2").expect("a span");
        assert_eq!(
            link.span_context().trace_state().header(),
            "vendor=1,other=2"
        );
        assert_eq!(TraceLink::from_bytes(&link.to_bytes()), Some(link));
        let long = format!("vendor={}", "x".repeat(MAX_STATE_BYTES));
        for lost in [long.as_str(), "no state"] {
            let link = with(lost).expect("a span");
            assert_eq!(link.span_context().trace_state().header(), "", "{lost}");
        }
    }

    #[test]
    fn what_is_no_span_is_no_link() {
        for bytes in [&[1; 23][..], &[], &[0; 24], &{
            let mut half = [0; 24];
            half[0] = 1;
            half
        }] {
            assert_eq!(TraceLink::from_bytes(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn the_ratio_decides_whom_nobody_has_chosen() {
        assert!(!Traces::Off.choose(0.0));
        let some = Traces::On { sample_ratio: 0.1 };
        assert!(some.choose(0.0) && some.choose(0.09) && !some.choose(0.1));
        assert!(!Traces::On { sample_ratio: 0.0 }.choose(0.0));
        assert!(Traces::On { sample_ratio: 1.0 }.choose(0.999));
    }
}
