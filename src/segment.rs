//! Segment's HTTP Tracking API: one request to `/v1/batch`, and what came of it.
//!
//! Which host gets a request is decided by a [`Region`] alone: each region has
//! a client of its own that knows no other endpoint, follows no redirect and
//! uses no proxy.

mod request;
mod retry_after;

use std::{
    error::Error as _,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::{
    config::{Endpoint, Segment as Options},
    region::{PerRegion, Region},
    secret::WriteKey,
    time::UnixMillis,
};

use request::Batch;
pub use request::REQUEST_OVERHEAD_BYTES;

/// How much of an answer is read, in bytes; Segment's are of 20 bytes.
const MAX_ANSWER_BYTES: usize = 16 * 1024;
/// Failed requests in a row after which addresses are looked up anew.
const FAILURES_BEFORE_RENEWAL: u32 = 5;
/// Connections are not renewed more often than this.
const MIN_CONNECTION_AGE: Duration = Duration::from_secs(10);

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A whole answer.
    Status {
        /// The HTTP status.
        status: u16,
        /// How long to wait, where the answer says so.
        retry_after: Option<Duration>,
    },
    /// No answer within the time-out. Segment may have taken the events.
    TimedOut,
    /// No connection, or it broke. Segment may have taken the events.
    Broken {
        /// What happened, without addresses of people or keys.
        error: String,
    },
}

/// A request's outcome with its timing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What came of it.
    pub reply: Reply,
    /// When it was started.
    pub started: UnixMillis,
    /// Until the end of the answer, or the failure.
    pub latency: Duration,
}

impl Answer {
    /// The HTTP status; 0 where no whole answer came.
    #[must_use]
    pub fn http_status(&self) -> u16 {
        match self.reply {
            Reply::Status { status, .. } => status,
            Reply::TimedOut | Reply::Broken { .. } => 0,
        }
    }

    /// What went wrong, as one of few words or the status (semantic conventions for
    /// HTTP, `error.type`); empty after a 2xx.
    #[must_use]
    pub fn error_type(&self) -> String {
        match self.reply {
            Reply::Status { status, .. } if (200..300).contains(&status) => String::new(),
            Reply::Status { status, .. } => status.to_string(),
            Reply::TimedOut => "timeout".to_owned(),
            Reply::Broken { .. } => "connection".to_owned(),
        }
    }

    /// What went wrong, for people; empty after a 2xx.
    #[must_use]
    pub fn error(&self) -> String {
        match &self.reply {
            Reply::Status { status, .. } if (200..300).contains(status) => String::new(),
            Reply::Status { status, .. } => {
                let known = http::StatusCode::from_u16(*status).ok();
                match known.and_then(|status| status.canonical_reason()) {
                    Some(reason) => format!("HTTP {status} {reason}"),
                    None => format!("HTTP {status}"),
                }
            }
            Reply::TimedOut => {
                format!("no answer within {:.1} s", self.latency.as_secs_f32())
            }
            Reply::Broken { error } => error.clone(),
        }
    }
}

/// Why the client can't be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// No trust roots.
    #[error(
        "the HTTP client for Segment cannot be set up: {}; are this machine's CA certificates \
         installed (package ca-certificates)?",
        innermost(.0)
    )]
    Client(#[from] reqwest::Error),
    /// The file of CAs can't be read.
    #[error("[segment] ca_file {path}: {rule}")]
    CaFile {
        /// Its path.
        path: String,
        /// What is wrong.
        rule: String,
    },
}

/// What an error comes down to; the outer ones repeat it, and the URL.
fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Sends batches to both regions.
#[derive(Debug)]
pub struct SegmentClient {
    regions: PerRegion<RegionClient>,
    gzip: bool,
}

impl SegmentClient {
    /// Sets up a client for each region.
    ///
    /// # Errors
    /// No TLS trust roots could be found on this machine.
    pub fn new(options: &Options) -> Result<Self, SetupError> {
        // An error says that it is installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(Self {
            regions: PerRegion {
                non_eu: RegionClient::new(options.endpoints.non_eu.clone(), options)?,
                eu: RegionClient::new(options.endpoints.eu.clone(), options)?,
            },
            gzip: options.gzip,
        })
    }

    /// Where a region's events go.
    #[must_use]
    pub fn endpoint(&self, region: Region) -> &Endpoint {
        &self.regions.get(region).endpoint
    }

    /// Sends serialised events in one request and waits for the whole answer,
    /// at most for the configured time. `retry_count` is told to Segment.
    pub async fn send(
        &self,
        region: Region,
        write_key: &WriteKey,
        events: Vec<Bytes>,
        retry_count: u32,
    ) -> Answer {
        let started = UnixMillis::now();
        let clock = Instant::now();
        let region = self.regions.get(region);
        let batch = Batch::new(events, write_key, started);
        let result = region.post(batch, self.gzip, write_key, retry_count).await;
        let reply = result.unwrap_or_else(|error| failure(&error));
        region.note(&reply);
        Answer {
            reply,
            started,
            latency: clock.elapsed(),
        }
    }
}

/// The one endpoint of a region.
#[derive(Debug)]
struct RegionClient {
    endpoint: Endpoint,
    options: Options,
    current: Mutex<Current>,
}

/// reqwest looks addresses up when it connects, and keeps connections as long as
/// they are used. A new client is the way to new addresses; requests under way
/// end on the old one.
#[derive(Debug)]
struct Current {
    client: reqwest::Client,
    made: Instant,
    failures: u32,
}

impl RegionClient {
    fn new(endpoint: Endpoint, options: &Options) -> Result<Self, SetupError> {
        let current = Current {
            client: build(&endpoint, options)?,
            made: Instant::now(),
            failures: 0,
        };
        Ok(Self {
            endpoint,
            options: options.clone(),
            current: Mutex::new(current),
        })
    }

    async fn post(
        &self,
        batch: Batch,
        gzip: bool,
        write_key: &WriteKey,
        retry_count: u32,
    ) -> Result<Reply, reqwest::Error> {
        let mut request = self
            .client()
            .post(self.endpoint.as_str())
            .header(http::header::CONTENT_TYPE, "application/json")
            .header(http::header::AUTHORIZATION, write_key.basic_authorization());
        if retry_count > 0 {
            request = request.header("X-Retry-Count", retry_count);
        }
        request = match gzip.then(|| batch.gzip()) {
            Some(Ok(packed)) => request
                .header(http::header::CONTENT_ENCODING, "gzip")
                .body(packed),
            _ => request.body(reqwest::Body::wrap(batch.into_body())),
        };
        let mut answer = request.send().await?;
        let status = answer.status().as_u16();
        let retry_after = retry_after::parse(answer.headers(), UnixMillis::now());
        // Read to its end, so that the connection can be used again and a
        // truncated answer is seen as one.
        let mut read = 0;
        while let Some(chunk) = answer.chunk().await? {
            read += chunk.len();
            if read > MAX_ANSWER_BYTES {
                break;
            }
        }
        Ok(Reply::Status {
            status,
            retry_after,
        })
    }

    fn client(&self) -> reqwest::Client {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let age = current.made.elapsed();
        let failing = current.failures >= FAILURES_BEFORE_RENEWAL && age >= MIN_CONNECTION_AGE;
        if age >= self.options.max_connection_age || failing {
            match build(&self.endpoint, &self.options) {
                Ok(client) => {
                    *current = Current {
                        client,
                        made: Instant::now(),
                        failures: 0,
                    }
                }
                Err(error) => tracing::warn!(%error, "connections to Segment are not renewed"),
            }
        }
        current.client.clone()
    }

    fn note(&self, reply: &Reply) {
        let failed = !matches!(reply, Reply::Status { status, .. } if *status < 500);
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.failures = if failed {
            current.failures.saturating_add(1)
        } else {
            0
        };
    }
}

fn build(endpoint: &Endpoint, options: &Options) -> Result<reqwest::Client, SetupError> {
    let mut client = reqwest::Client::builder()
        .user_agent(concat!("segment-relay/", env!("CARGO_PKG_VERSION")))
        .timeout(options.request_timeout)
        .connect_timeout(options.connect_timeout)
        .pool_idle_timeout(options.pool_idle_timeout)
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

fn failure(error: &reqwest::Error) -> Reply {
    if error.is_timeout() && !error.is_connect() {
        return Reply::TimedOut;
    }
    let stage = if error.is_connect() {
        "no connection"
    } else {
        "the connection broke"
    };
    let cause = match error.source() {
        Some(_) => format!(": {}", innermost(error)),
        None => String::new(),
    };
    Reply::Broken {
        error: format!("{stage}{cause}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_endpoint_that_nobody_listens_on_is_named_without_its_url() {
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
        let client = SegmentClient::new(&config.expect("valid").segment).expect("set up");
        let key = WriteKey::new("a-planted-write-key").expect("valid");
        let answer = client
            .send(Region::NonEu, &key, vec![Bytes::from_static(b"{}")], 0)
            .await;
        assert_eq!(answer.http_status(), 0);
        let error = answer.error();
        assert!(error.starts_with("no connection: "), "{error}");
        assert!(
            !error.contains("http") && !error.contains("planted"),
            "{error}"
        );
    }
}
