//! Segment's HTTP Tracking API: one request to `/v1/batch`, and what came of it.
//!
//! Which host gets a request is decided by a [`Region`] alone: each region has
//! a client of its own that knows no other endpoint, follows no redirect and
//! uses no proxy.

mod answer;
mod body;
mod connections;
mod request;
mod retry_after;

use std::{
    error::Error as _,
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::{
    config::{Endpoint, Segment as Options},
    region::{PerRegion, Region},
    secret::WriteKey,
    time::UnixMillis,
};

pub use answer::{Answer, Reply};
use connections::Connections;
use request::Batch;
pub use request::REQUEST_OVERHEAD_BYTES;

/// How much of an answer is read, in bytes; Segment's are of 20 bytes.
const MAX_ANSWER_BYTES: usize = 16 * 1024;
/// How long it is read for, once its status is known.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);

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
    regions: PerRegion<Connections>,
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
                non_eu: Connections::new(options.endpoints.non_eu.clone(), options)?,
                eu: Connections::new(options.endpoints.eu.clone(), options)?,
            },
            gzip: options.gzip,
        })
    }

    /// Where a region's events go.
    #[must_use]
    pub fn endpoint(&self, region: Region) -> &Endpoint {
        self.regions.get(region).endpoint()
    }

    /// Sends serialised events in one request and waits for the answer, at
    /// most for the configured time. `retry_count` is told to Segment.
    pub async fn send(
        &self,
        region: Region,
        write_key: &WriteKey,
        events: Vec<Bytes>,
        retry_count: u32,
    ) -> Answer {
        let started = UnixMillis::now();
        let clock = Instant::now();
        let connections = self.regions.get(region);
        let batch = Batch::new(events, write_key, started);
        let (client, number) = connections.client();
        let exchange = Exchange {
            client: &client,
            endpoint: connections.endpoint(),
            write_key,
            retry_count,
            gzip: self.gzip,
        };
        let reply = exchange.post(batch).await;
        let reply = reply.unwrap_or_else(|error| failure(&error));
        connections.note(number, &reply);
        Answer {
            reply,
            started,
            latency: clock.elapsed(),
        }
    }
}

/// One request on a region's connections.
struct Exchange<'a> {
    client: &'a reqwest::Client,
    endpoint: &'a Endpoint,
    write_key: &'a WriteKey,
    retry_count: u32,
    gzip: bool,
}

impl Exchange<'_> {
    async fn post(&self, batch: Batch) -> Result<Reply, reqwest::Error> {
        let authorization = self.write_key.basic_authorization();
        let mut request = self
            .client
            .post(self.endpoint.as_str())
            .header(http::header::CONTENT_TYPE, "application/json")
            .header(http::header::AUTHORIZATION, authorization);
        if self.retry_count > 0 {
            request = request.header("X-Retry-Count", self.retry_count);
        }
        request = match self.gzip.then(|| batch.gzip()) {
            Some(Ok(packed)) => request
                .header(http::header::CONTENT_ENCODING, "gzip")
                .body(packed),
            _ => request.body(reqwest::Body::wrap(batch.into_body())),
        };
        let mut answer = request.send().await?;
        let status = answer.status().as_u16();
        let retry_after = retry_after::parse(answer.headers(), UnixMillis::now());
        // The status line has settled it; the body is read so that the connection can be
        // used again, and for what it may show.
        let mut body = Vec::new();
        let _ = tokio::time::timeout(BODY_TIMEOUT, read(&mut answer, &mut body)).await;
        let shown = body::contradiction(answer.headers(), &body);
        if let (200..300, Some(body)) = (status, shown) {
            return Ok(Reply::NotTaken { status, body });
        }
        Ok(Reply::Status {
            status,
            retry_after,
        })
    }
}

/// Reads to the end of a body, to its bound, or to where it is cut off.
async fn read(answer: &mut reqwest::Response, body: &mut Vec<u8>) {
    while let Ok(Some(chunk)) = answer.chunk().await {
        let room = MAX_ANSWER_BYTES.saturating_sub(body.len());
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if chunk.len() >= room {
            return;
        }
    }
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
        sent: !error.is_connect(),
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
