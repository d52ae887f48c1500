//! Which spans are exported.

use opentelemetry::{
    Context, KeyValue,
    trace::{Link, SpanKind, TraceContextExt, TraceId, TraceState},
};
use opentelemetry_sdk::trace::{Sampler, SamplingDecision, SamplingResult, ShouldSample};

use crate::{config, trace::CHOSEN};

/// Follows the parent's decision. A span without parent is exported if one of
/// those that it is linked to is, if it asks for it, or by the ratio.
#[derive(Clone, Debug)]
pub struct RelaySampler {
    ratio: Sampler,
    not_chosen: SamplingDecision,
}

impl RelaySampler {
    /// A sampler by the configuration.
    #[must_use]
    pub fn new(traces: config::Traces) -> Self {
        Self {
            ratio: Sampler::TraceIdRatioBased(traces.sample_ratio),
            // What is recorded can still be exported when it turns out to be an error.
            not_chosen: if traces.keep_errors {
                SamplingDecision::RecordOnly
            } else {
                SamplingDecision::Drop
            },
        }
    }

    /// A sampler that exports nothing.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            ratio: Sampler::AlwaysOff,
            not_chosen: SamplingDecision::Drop,
        }
    }
}

impl ShouldSample for RelaySampler {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let by_ratio = || {
            let result = self
                .ratio
                .should_sample(None, trace_id, name, kind, attributes, links);
            result.decision == SamplingDecision::RecordAndSample
        };
        let parent = parent.map(|context| context.span().span_context().clone());
        let parent = parent.filter(opentelemetry::trace::SpanContext::is_valid);
        let exports = !matches!(self.ratio, Sampler::AlwaysOff);
        let chosen = match &parent {
            _ if !exports => false,
            Some(parent) => parent.is_sampled(),
            None => {
                links.iter().any(|link| link.span_context.is_sampled())
                    || attributes.iter().any(|one| one.key.as_str() == CHOSEN)
                    || by_ratio()
            }
        };
        SamplingResult {
            decision: if chosen {
                SamplingDecision::RecordAndSample
            } else {
                self.not_chosen.clone()
            },
            attributes: Vec::new(),
            trace_state: parent.map_or(TraceState::NONE, |parent| parent.trace_state().clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{SpanContext, SpanId, TraceFlags};

    fn span(sampled: bool) -> SpanContext {
        SpanContext::new(
            TraceId::from(7),
            SpanId::from(8),
            TraceFlags::default().with_sampled(sampled),
            true,
            TraceState::NONE,
        )
    }

    fn decide(
        sampler: &RelaySampler,
        parent: Option<SpanContext>,
        attributes: &[KeyValue],
        links: &[SpanContext],
    ) -> SamplingDecision {
        let parent = parent.map(|span| Context::new().with_remote_span_context(span));
        let links: Vec<_> = links.iter().cloned().map(Link::with_context).collect();
        sampler
            .should_sample(
                parent.as_ref(),
                // The ratio looks at the lower half of the id.
                TraceId::from(u128::from(u64::MAX)),
                "",
                &SpanKind::Internal,
                attributes,
                &links,
            )
            .decision
    }

    fn sampler(sample_ratio: f64, keep_errors: bool) -> RelaySampler {
        RelaySampler::new(config::Traces {
            sample_ratio,
            keep_errors,
            max_queued_spans: 128,
        })
    }

    #[test]
    fn the_caller_decides_for_its_calls() {
        use SamplingDecision::{Drop, RecordAndSample};
        let (never, always) = (sampler(0.0, false), sampler(1.0, false));
        for sampler in [&never, &always] {
            assert_eq!(decide(sampler, Some(span(true)), &[], &[]), RecordAndSample);
            assert_eq!(decide(sampler, Some(span(false)), &[], &[]), Drop);
        }
    }

    #[test]
    fn without_a_caller_links_wishes_and_the_ratio_decide() {
        use SamplingDecision::{Drop, RecordAndSample};
        let (never, always) = (sampler(0.0, false), sampler(1.0, false));
        let chosen = [KeyValue::new(CHOSEN, 1)];
        assert_eq!(decide(&always, None, &[], &[]), RecordAndSample);
        assert_eq!(decide(&never, None, &[], &[]), Drop);
        assert_eq!(decide(&never, None, &[], &[span(false)]), Drop);
        let one_of = [span(false), span(true)];
        assert_eq!(decide(&never, None, &[], &one_of), RecordAndSample);
        assert_eq!(decide(&never, None, &chosen, &[]), RecordAndSample);
    }

    #[test]
    fn what_is_not_chosen_is_recorded_for_its_errors() {
        let sampler = sampler(0.0, true);
        let decision = decide(&sampler, Some(span(false)), &[], &[]);
        assert_eq!(decision, SamplingDecision::RecordOnly);
    }

    #[test]
    fn where_nobody_gets_the_spans_no_caller_changes_that() {
        let sampler = RelaySampler::nothing();
        let chosen = [KeyValue::new(CHOSEN, 1)];
        let decision = decide(&sampler, Some(span(true)), &chosen, &[span(true)]);
        assert_eq!(decision, SamplingDecision::Drop);
    }
}
