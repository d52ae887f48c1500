//! All that is logged during the tests, at the level trace, and all metrics of their
//! relays are searched for what must never stand there. Whatever is found ends the
//! test run at once, since the line may be any test's.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::SocketAddr,
    sync::{Arc, LazyLock, Mutex, Once},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
};

use crate::harness::{PATIENCE, WRITE_KEY};

/// Lines of another process that are kept.
const KEPT_LINES: usize = 10_000;

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
    // Whose data something is: the user id of an address tells it too.
    for address in ["test@aol.com", "person-1@example.com"] {
        planted.push(hex::encode(Sha256::digest(address)));
    }
    // As it stands in a header.
    planted.push(STANDARD.encode(format!("{WRITE_KEY}:")));
    // As its bytes are printed one by one.
    planted.push(format!("{:?}", &WRITE_KEY.as_bytes()[..8]).replace(['[', ']'], ""));
    planted
});

/// Ends the test run if a line holds what was planted.
pub(crate) fn check(line: &str) {
    if let Some(found) = PLANTED
        .iter()
        .find(|planted| line.contains(planted.as_str()))
    {
        let mut err = io::stderr().lock();
        let _ = writeln!(err, "\n{found:?} was logged or counted:\n{line}");
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
            .with_max_level(tracing::level_filters::LevelFilter::TRACE)
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

/// Searches the metrics that a relay gives to whoever scrapes them.
pub(crate) async fn of_metrics(address: SocketAddr) {
    let mut scraper = TcpStream::connect(address).await.expect("connects");
    let request = "GET /metrics HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n\r\n";
    let sent = scraper.write_all(request.as_bytes()).await;
    sent.expect("sent");
    let mut text = String::new();
    let read = scraper.read_to_string(&mut text).await;
    read.expect("answered");
    assert!(text.contains("\nsegment_relay_"), "no metrics: {text}");
    text.lines().for_each(check);
}

/// What another process has written to its standard error.
#[derive(Clone, Default)]
pub(crate) struct Written {
    lines: Arc<Mutex<Vec<String>>>,
    came: Arc<Notify>,
}

impl Written {
    /// Waits for a line of which something is true.
    pub(crate) async fn line(&self, is_it: impl Fn(&str) -> bool) -> String {
        self.nth(0, is_it).await
    }

    /// Waits for the one after so many of which something is true.
    pub(crate) async fn nth(&self, others: usize, is_it: impl Fn(&str) -> bool) -> String {
        let found = async {
            loop {
                let came = self.came.notified();
                let found = {
                    let lines = self.lines.lock().expect("sound");
                    lines.iter().filter(|line| is_it(line)).nth(others).cloned()
                };
                if let Some(line) = found {
                    return line;
                }
                came.await;
            }
        };
        match tokio::time::timeout(PATIENCE, found).await {
            Ok(line) => line,
            Err(_) => panic!("no such line among {:#?}", self.lines.lock()),
        }
    }

    pub(crate) fn count(&self, is_it: impl Fn(&str) -> bool) -> usize {
        let lines = self.lines.lock().expect("sound");
        lines.iter().filter(|line| is_it(line)).count()
    }
}

/// Searches what another process writes to its standard error, and keeps the last
/// lines of it.
pub(crate) fn of_process(stderr: impl Read + Send + 'static) -> Written {
    let written = Written::default();
    let kept = written.clone();
    std::thread::spawn(move || {
        // Whatever it is, it is searched: also what is no UTF-8.
        for line in BufReader::new(stderr).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).into_owned();
            check(&line);
            let mut lines = kept.lines.lock().expect("sound");
            lines.push(line);
            if lines.len() > 2 * KEPT_LINES {
                lines.drain(..KEPT_LINES);
            }
            drop(lines);
            kept.came.notify_waiters();
        }
    });
    written
}
