//! The connections to one endpoint.
//!
//! reqwest looks addresses up when it connects, and keeps connections as long as
//! they are used. A new client is the way to new addresses and to a new connection;
//! requests under way end on the old one.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{Reply, SetupError};
use crate::config::{Endpoint, Segment as Options};

/// Failed requests in a row after which addresses are looked up anew.
const FAILURES_BEFORE_RENEWAL: u32 = 5;
/// Connections are not renewed more often than this after other failures than time-outs.
const MIN_CONNECTION_AGE: Duration = Duration::from_secs(10);
/// Bounds of the time between two HTTP/2 pings while a request waits. A connection whose
/// peer does not answer one within the same time is closed.
const PING: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// See the module's description.
#[derive(Debug)]
pub(super) struct Connections {
    endpoint: Endpoint,
    options: Options,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    client: reqwest::Client,
    number: u64,
    made: Instant,
    failures: u32,
    /// A request was swallowed or misdirected on it.
    spent: bool,
}

impl Connections {
    pub(super) fn new(endpoint: Endpoint, options: &Options) -> Result<Self, SetupError> {
        let current = Current {
            client: build(&endpoint, options)?,
            number: 0,
            made: Instant::now(),
            failures: 0,
            spent: false,
        };
        Ok(Self {
            endpoint,
            options: options.clone(),
            current: Mutex::new(current),
        })
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The client for the next request, and its number.
    pub(super) fn client(&self) -> (reqwest::Client, u64) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let age = current.made.elapsed();
        let failing = current.failures >= FAILURES_BEFORE_RENEWAL && age >= MIN_CONNECTION_AGE;
        if age >= self.options.max_connection_age || failing || current.spent {
            match build(&self.endpoint, &self.options) {
                Ok(client) => {
                    *current = Current {
                        client,
                        number: current.number + 1,
                        made: Instant::now(),
                        failures: 0,
                        spent: false,
                    }
                }
                Err(error) => tracing::warn!(%error, "connections to Segment are not renewed"),
            }
        }
        (current.client.clone(), current.number)
    }

    /// Notes what came of a request on the client of this number. One time-out or 421 is
    /// enough for new connections; those that follow on the same client add nothing.
    pub(super) fn note(&self, number: u64, reply: &Reply) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.number != number {
            return;
        }
        match reply {
            Reply::TimedOut | Reply::Status { status: 421, .. } => current.spent = true,
            Reply::Status { status, .. } if *status < 500 => current.failures = 0,
            _ => current.failures = current.failures.saturating_add(1),
        }
    }
}

fn build(endpoint: &Endpoint, options: &Options) -> Result<reqwest::Client, SetupError> {
    let (shortest, longest) = PING;
    let ping = (options.request_timeout / 4).clamp(shortest, longest);
    let mut client = reqwest::Client::builder()
        .user_agent(concat!("segment-relay/", env!("CARGO_PKG_VERSION")))
        .timeout(options.request_timeout)
        .connect_timeout(options.connect_timeout)
        .pool_idle_timeout(options.pool_idle_timeout)
        .http2_keep_alive_interval(ping)
        .http2_keep_alive_timeout(ping)
        .tcp_nodelay(true)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy();
    if endpoint.is_tls() {
        client = client.https_only(true);
        if let Some(path) = &options.ca_file {
            client = client.tls_certs_only(own_roots(path)?);
        }
    } else {
        // Plain HTTP to loopback needs no trust roots, which a bare machine lacks.
        client = client.tls_certs_only([]);
    }
    Ok(client.build()?)
}

/// The CAs of a file.
fn own_roots(path: &Path) -> Result<Vec<reqwest::Certificate>, SetupError> {
    let failed = |rule: String| SetupError::CaFile {
        path: path.display().to_string(),
        rule,
    };
    let pem = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    let roots = reqwest::Certificate::from_pem_bundle(&pem).unwrap_or_default();
    if roots.is_empty() {
        return Err(failed("has to hold certificates in PEM".to_owned()));
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connections() -> Connections {
        let config = crate::config::Config::load(
            Some((
                "f.toml",
                "[segment.endpoints]\nnon_eu = \"http://127.0.0.1:1\"\n",
            )),
            std::iter::empty::<(String, String)>(),
            &crate::config::Outside {
                validate: &|_| Vec::new(),
                read_key_file: &|_| Err(std::io::ErrorKind::NotFound.into()),
            },
        );
        let options = config.expect("valid").segment;
        Connections::new(options.endpoints.non_eu.clone(), &options).expect("set up")
    }

    fn status(status: u16) -> Reply {
        Reply::Status {
            status,
            retry_after: None,
        }
    }

    #[test]
    fn one_time_out_or_421_gets_new_connections_and_late_ones_do_not_again() {
        for reply in [Reply::TimedOut, status(421)] {
            let connections = connections();
            assert_eq!(connections.client().1, 0);
            connections.note(0, &reply);
            assert_eq!(connections.client().1, 1);
            // Another request had been swallowed on the old connection.
            connections.note(0, &reply);
            assert_eq!(connections.client().1, 1);
        }
    }

    #[test]
    fn young_connections_outlive_other_failures() {
        let connections = connections();
        for _ in 0..2 * FAILURES_BEFORE_RENEWAL {
            connections.note(0, &status(500));
        }
        assert_eq!(connections.client().1, 0);
    }
}
