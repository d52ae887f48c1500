//! The relay's own log, on standard error: standard output belongs to answers.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Starts logging. To be called once; a second call changes nothing.
pub fn start(log: &Log) {
    // The configuration has parsed the filter already.
    let filter = EnvFilter::try_new(&log.filter).unwrap_or_else(|_| EnvFilter::new("info"));
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
