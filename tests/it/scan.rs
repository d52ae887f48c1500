//! All that is logged during the tests, at the level trace, is searched for what
//! must never stand there. Whatever is found ends the test run at once, since the
//! line may be any test's.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    sync::{LazyLock, Once},
};

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::harness::WRITE_KEY;

/// What the tests plant: addresses, write keys, tokens, and other secrets.
static PLANTED: LazyLock<Vec<String>> = LazyLock::new(|| {
    let mut planted: Vec<String> = [
        "@example.com",
        "@Example.com",
        "@aol.com",
        "write-key-of",
        "eu-write-key",
        "a-key-for-tests",
        "attribute_value_1",
        "planted",
        "srt1_",
        "srk1_",
        "whsec_",
    ]
    .map(String::from)
    .into();
    // As it stands in a header.
    planted.push(STANDARD.encode(format!("{WRITE_KEY}:")));
    // As its bytes are printed one by one.
    planted.push(format!("{:?}", &WRITE_KEY.as_bytes()[..8]).replace(['[', ']'], ""));
    planted
});

/// Ends the test run if a line holds what was planted.
fn check(line: &str) {
    if let Some(found) = PLANTED
        .iter()
        .find(|planted| line.contains(planted.as_str()))
    {
        let mut err = io::stderr().lock();
        let _ = writeln!(err, "\n{found:?} was logged:\n{line}");
        std::process::abort();
    }
}

/// Takes what the subscriber writes: one whole line at a time.
struct Scanner;

impl Write for Scanner {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        check(&String::from_utf8_lossy(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Searches all that this process logs from now on.
pub(crate) fn this_process() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing_subscriber::fmt()
            .with_env_filter(segment_relay::telemetry::filter("trace"))
            .with_span_events(tracing_subscriber::fmt::format::FmtSpan::FULL)
            .with_writer(|| Scanner)
            .with_ansi(false)
            .init();
        // A scanner that finds nothing would pass every test.
        assert!(
            PLANTED
                .iter()
                .any(|planted| "person-1@example.com".contains(planted))
        );
    });
}

/// Searches what another process writes to its standard error.
pub(crate) fn of_process(stderr: impl Read + Send + 'static) {
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines() {
            let Ok(line) = line else { return };
            check(&line);
        }
    });
}
