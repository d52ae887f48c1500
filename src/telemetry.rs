//! The relay's own log, on standard error: standard output belongs to answers.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Starts logging. To be called once; a second call changes nothing.
pub fn start(log: &Log) {
    let filter = filter(&log.filter);
    let terminal = std::io::stderr().is_terminal();
    let text = match log.format {
        LogFormat::Auto => terminal,
        LogFormat::Text => true,
        LogFormat::Json => false,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(terminal);
    // An error says that logging is started already.
    let _ = if text {
        subscriber.try_init()
    } else {
        subscriber.json().flatten_event(true).try_init()
    };
}

/// What is logged. The NATS client's connection would log payloads and credentials at the
/// level trace: it never gets that far, whatever the directives say.
#[must_use]
pub fn filter(directives: &str) -> EnvFilter {
    // The configuration has parsed them already.
    let filter = EnvFilter::try_new(directives).unwrap_or_else(|_| EnvFilter::new("info"));
    match "async_nats::connection=debug".parse() {
        Ok(bound) => filter.add_directive(bound),
        Err(_) => filter,
    }
}
