//! Exports spans with an error although they were not chosen.

use std::time::Duration;

use opentelemetry::{
    Context,
    trace::{SpanContext, Status},
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Span, SpanData, SpanProcessor},
};

/// Gives the next processor what was chosen, and what has failed.
#[derive(Debug)]
pub struct KeepErrors<P>(pub P);

impl<P: SpanProcessor> SpanProcessor for KeepErrors<P> {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.0.on_start(span, context);
    }

    fn on_end(&self, mut span: SpanData) {
        let context = &span.span_context;
        if !context.is_sampled() {
            if !matches!(span.status, Status::Error { .. }) {
                return;
            }
            span.span_context = SpanContext::new(
                context.trace_id(),
                context.span_id(),
                context.trace_flags().with_sampled(true),
                context.is_remote(),
                context.trace_state().clone(),
            );
        }
        self.0.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry::trace::{Span as _, Tracer, TracerProvider};
    use opentelemetry_sdk::trace::SdkTracerProvider;

    use super::*;
    use crate::{config::Traces, telemetry::sampler::RelaySampler};

    #[derive(Clone, Debug, Default)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl SpanProcessor for Kept {
        fn on_start(&self, _: &mut Span, _: &Context) {}

        fn on_end(&self, span: SpanData) {
            self.0.lock().expect("no panic").push(span);
        }

        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }

        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }
    }

    fn kept(sample_ratio: f64) -> Vec<(String, bool)> {
        let kept = Kept::default();
        let provider = SdkTracerProvider::builder()
            .with_sampler(RelaySampler::new(Traces {
                sample_ratio,
                keep_errors: true,
                max_queued_spans: 128,
            }))
            .with_span_processor(KeepErrors(kept.clone()))
            .build();
        let tracer = provider.tracer("test");
        tracer.start("fine").end();
        let mut failed = tracer.start("failed");
        failed.set_status(Status::error("why"));
        failed.end();
        let spans = kept.0.lock().expect("no panic");
        let told = |span: &SpanData| (span.name.to_string(), span.span_context.is_sampled());
        spans.iter().map(told).collect()
    }

    #[test]
    fn errors_are_exported_although_they_were_not_chosen() {
        assert_eq!(kept(0.0), [("failed".to_owned(), true)]);
        let both = [("fine".to_owned(), true), ("failed".to_owned(), true)];
        assert_eq!(kept(1.0), both);
    }
}
