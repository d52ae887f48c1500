//! Log lines, with the ids of the trace to which they belong.

use std::fmt;

use opentelemetry::{Context, trace::TraceContextExt};
use tracing::{Event, Subscriber};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Json, Writer},
    },
    registry::LookupSpan,
};

/// The form of a line.
pub(super) enum Lines {
    /// For people.
    Text(Format<Full>),
    /// For programs: one object, with the event's fields beside the others.
    Json(Format<Json>),
}

impl Lines {
    pub(super) fn text(ansi: bool) -> Self {
        Self::Text(Format::default().with_ansi(ansi))
    }

    pub(super) fn json() -> Self {
        let format = Format::default().json().flatten_event(true);
        // Spans have lines of their own, where they are exported.
        Self::Json(format.with_current_span(false).with_span_list(false))
    }

    /// A whole line with the ids of the span that is entered.
    fn with_ids(&self, line: &str, trace_id: &str, span_id: &str) -> String {
        let line = line.trim_end_matches('\n');
        match self {
            Self::Text(_) => format!("{line} trace_id={trace_id} span_id={span_id}"),
            Self::Json(_) => {
                let open = line.strip_suffix('}').unwrap_or(line);
                format!(r#"{open},"trace_id":"{trace_id}","span_id":"{span_id}"}}"#)
            }
        }
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let format = |writer: Writer<'_>| match self {
            Self::Text(text) => text.format_event(context, writer, event),
            Self::Json(json) => json.format_event(context, writer, event),
        };
        let ids = Context::map_current(|current| {
            let span = current.span();
            let ids = span.span_context();
            ids.is_valid()
                .then(|| (ids.trace_id().to_string(), ids.span_id().to_string()))
        });
        let Some((trace_id, span_id)) = ids else {
            return format(writer);
        };
        let mut line = String::new();
        format(Writer::new(&mut line))?;
        writeln!(writer, "{}", self.with_ids(&line, &trace_id, &span_id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_ids_at_its_end() {
        let text = Lines::text(false);
        assert_eq!(
            text.with_ids("INFO x\n", "7", "8"),
            "INFO x trace_id=7 span_id=8"
        );
        let json = Lines::json();
        assert_eq!(
            json.with_ids("{\"level\":\"INFO\",\"a\":\"}\"}\n", "7", "8"),
            r#"{"level":"INFO","a":"}","trace_id":"7","span_id":"8"}"#
        );
    }
}
