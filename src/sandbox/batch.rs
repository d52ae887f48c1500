//! `POST /v1/batch`: reads a request with bounds, has it judged, and answers it
//! well or badly.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use ::http::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, RETRY_AFTER,
};
use ::http::{Response, StatusCode};
use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::answer::{AnswerBody, Refusal, answer, problem, problem_json};
use super::check::{BatchRequest, CheckedBatch, basic_user, check_batch};
use super::entry::RequestInfo;
use super::fault::{DropConnection, Facts, Fault};
use super::state::Store;
use super::{Region, Sandbox, tally};

/// Largest body of a batch request, before and after decompression, in bytes.
pub(super) const MAX_BODY_BYTES: usize = 500_000;
/// So much of a body that is too large is still read, so that the client, which
/// may send all before it reads, gets its answer. In bytes.
const MAX_DISCARDED_BYTES: usize = 16 * 1024 * 1024;
/// How long a client may take to send a body.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// A key that is shorter is not hinted at.
const MIN_CHARS_FOR_HINT: usize = 12;

/// Why a body can't be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unreadable {
    #[error("the body is too large")]
    TooLarge,
    #[error("the body took too long")]
    TooSlow,
    #[error("the body broke off")]
    BrokeOff,
    #[error("the body is not gzip")]
    NotGzip,
    #[error("the content encoding is not supported")]
    OtherEncoding,
    #[error("the body is not UTF-8")]
    NotUtf8,
}

impl Unreadable {
    pub(super) const fn status(self) -> StatusCode {
        match self {
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

/// Counts a request as in flight for as long as it is.
struct InFlight<'a> {
    store: &'a Store,
    number: u64,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.store.count(|stats| {
            stats.requests_in_flight = stats.requests_in_flight.saturating_sub(1);
        });
    }
}

/// The headers that matter, and the decompressed body.
struct Received<'a> {
    region: Region,
    number: u64,
    retry_count: u32,
    authorization: Option<&'a str>,
    body: Arc<String>,
    warnings: Vec<&'static str>,
}

/// Takes a request and answers it. `close` makes the connection end at once.
pub(super) async fn handle(
    region: Region,
    headers: &HeaderMap,
    body: Incoming,
    sandbox: &Sandbox,
    close: &CancellationToken,
) -> Response<AnswerBody> {
    let store = &sandbox.store;
    let in_flight = InFlight {
        number: store.begin_request(),
        store,
    };
    let mut warnings = Vec::new();
    let retry_count = retry_count(headers, &mut warnings);
    if retry_count > 0 {
        store.count(|stats| stats.retried_requests += 1);
    }
    if !is_json(headers) {
        warnings.push("content_type_not_json");
    }
    // A header that isn't text counts as malformed.
    let authorization = headers
        .get(AUTHORIZATION)
        .map(|value| value.to_str().unwrap_or(""));
    let (outcome, fault) = match read_text(headers, body, store).await {
        Ok(body) => {
            let received = Received {
                region,
                number: in_flight.number,
                retry_count,
                authorization,
                body: Arc::new(body),
                warnings,
            };
            if sandbox.count_only {
                (Ok(()), tally::take(region, &received.body, sandbox))
            } else {
                process(received, sandbox)
            }
        }
        Err(unreadable) => {
            let key = authorization.and_then(basic_user);
            let facts = Facts {
                region,
                write_key: key.as_deref(),
                events: &[],
            };
            let refusal = Refusal {
                status: unreadable.status(),
                message: unreadable.to_string(),
            };
            (Err(refusal), sandbox.faults.decide(&facts))
        }
    };
    match fault {
        None => respond(outcome, store),
        Some(fault) => misbehave(outcome, fault, store, close).await,
    }
}

/// Judges the request and takes its events, unless it is to misbehave without.
fn process(received: Received<'_>, sandbox: &Sandbox) -> (Result<(), Refusal>, Option<Fault>) {
    let now = Timestamp::now();
    let body = Arc::clone(&received.body);
    let request = BatchRequest {
        region: received.region,
        authorization: received.authorization,
        body: &body,
        now,
    };
    let checked = check_batch(&request, &sandbox.keys);
    let header_key = match &checked {
        Ok(_) => None,
        Err(_) => received.authorization.and_then(basic_user),
    };
    let (write_key, events) = match &checked {
        Ok(batch) => (batch.write_key.as_deref(), batch.events.as_slice()),
        Err(_) => (header_key.as_deref(), [].as_slice()),
    };
    let fault = sandbox.faults.decide(&Facts {
        region: received.region,
        write_key,
        events,
    });
    let batch = match checked {
        Ok(batch) => batch,
        Err(error) => {
            let refusal = Refusal {
                status: StatusCode::BAD_REQUEST,
                message: error.to_string(),
            };
            return (Err(refusal), fault);
        }
    };
    let status = match &fault {
        None => Some(200),
        Some(fault) if fault.drop_connection.is_some() => None,
        Some(fault) => Some(fault.status.unwrap_or(200)),
    };
    let total = batch.total as u64;
    if fault.as_ref().is_none_or(|fault| fault.process) {
        let request = request_info(received, &batch, now, status);
        sandbox.store.take(request, &batch);
    } else {
        sandbox.store.count(|stats| stats.events_refused += total);
    }
    sandbox.store.count(|stats| {
        stats.largest_batch_events = stats.largest_batch_events.max(total);
    });
    (Ok(()), fault)
}

fn request_info(
    received: Received<'_>,
    batch: &CheckedBatch<'_>,
    now: Timestamp,
    status: Option<u16>,
) -> RequestInfo {
    let key = batch.write_key.as_deref().unwrap_or("");
    let chars = key.chars().count();
    let hint = if chars < MIN_CHARS_FOR_HINT {
        String::new()
    } else {
        key.chars().skip(chars - 4).collect()
    };
    let mut warnings = received.warnings;
    warnings.extend(&batch.warnings);
    RequestInfo {
        number: received.number,
        received_at: format!("{now:.3}"),
        region: received.region,
        write_key_hint: hint,
        retry_count: received.retry_count,
        status,
        warnings,
        body: received.body,
    }
}

/// The answer of a sandbox that behaves.
fn respond(outcome: Result<(), Refusal>, store: &Store) -> Response<AnswerBody> {
    let (status, json) = status_and_json(outcome, None);
    store.count(|stats| *stats.statuses.entry(status.as_u16()).or_default() += 1);
    answer(status, "application/json", AnswerBody::Whole(Some(json)))
}

async fn misbehave(
    outcome: Result<(), Refusal>,
    fault: Fault,
    store: &Store,
    close: &CancellationToken,
) -> Response<AnswerBody> {
    store.count(|stats| stats.misbehaved_requests += 1);
    if !fault.delay.is_zero() {
        tokio::time::sleep(fault.delay).await;
    }
    let (status, json) = status_and_json(outcome, fault.status);
    let body = match fault.drop_connection {
        Some(dropped) => {
            store.count(|stats| stats.connections_dropped += 1);
            if dropped == DropConnection::BeforeAnswer {
                close.cancel();
                return std::future::pending().await;
            }
            AnswerBody::broken(&json, close.clone())
        }
        None => {
            store.count(|stats| *stats.statuses.entry(status.as_u16()).or_default() += 1);
            AnswerBody::Whole(Some(json))
        }
    };
    let mut response = answer(status, "application/json", body);
    let headers = response.headers_mut();
    headers.extend(fault.retry_after.map(|value| (RETRY_AFTER, value)));
    let reset = HeaderName::from_static("x-ratelimit-reset");
    headers.extend(fault.rate_limit_reset.map(|value| (reset, value)));
    response
}

/// The status and body for a request, where a rule may say another status.
fn status_and_json(outcome: Result<(), Refusal>, status: Option<u16>) -> (StatusCode, Bytes) {
    let success = Bytes::from_static(br#"{"success":true}"#);
    let by_rule = status.and_then(|status| StatusCode::from_u16(status).ok());
    match (by_rule, outcome) {
        (None, Ok(())) => (StatusCode::OK, success),
        (None, Err(refusal)) => (refusal.status, problem_json(&refusal.message)),
        (Some(status), _) if status.is_success() => (status, success),
        (Some(status), _) => (
            status,
            problem_json("the sandbox misbehaves as it was told"),
        ),
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).map(|value| value.as_bytes());
    content_type.is_some_and(|value| {
        let media_type = value.split(|byte| *byte == b';').next().unwrap_or_default();
        media_type
            .trim_ascii()
            .eq_ignore_ascii_case(b"application/json")
    })
}

fn retry_count(headers: &HeaderMap, warnings: &mut Vec<&'static str>) -> u32 {
    let Some(value) = headers.get("x-retry-count") else {
        return 0;
    };
    let count = value.to_str().ok().and_then(|text| text.parse().ok());
    if count.is_none() {
        warnings.push("retry_count_not_a_number");
    }
    count.unwrap_or(0)
}

/// The body, decompressed.
async fn read_text(
    headers: &HeaderMap,
    body: Incoming,
    store: &Store,
) -> Result<String, Unreadable> {
    let encoding = headers
        .get(CONTENT_ENCODING)
        .map_or(&b"identity"[..], |value| value.as_bytes().trim_ascii());
    let is_gzip = encoding.eq_ignore_ascii_case(b"gzip");
    if is_gzip {
        store.count(|stats| stats.gzip_requests += 1);
    }
    let received = read_body(body, MAX_BODY_BYTES).await?;
    store.count(|stats| stats.bytes += received.len() as u64);
    let plain = if is_gzip {
        gunzip(&received)?
    } else if encoding.eq_ignore_ascii_case(b"identity") {
        received
    } else {
        return Err(Unreadable::OtherEncoding);
    };
    store.count(|stats| {
        stats.bytes_decompressed += plain.len() as u64;
        stats.largest_batch_bytes = stats.largest_batch_bytes.max(plain.len() as u64);
    });
    String::from_utf8(plain).map_err(|_error| Unreadable::NotUtf8)
}

fn gunzip(compressed: &[u8]) -> Result<Vec<u8>, Unreadable> {
    let mut plain = Vec::new();
    MultiGzDecoder::new(compressed)
        .take(MAX_BODY_BYTES as u64 + 1)
        .read_to_end(&mut plain)
        .map_err(|_error| Unreadable::NotGzip)?;
    if plain.len() > MAX_BODY_BYTES {
        return Err(Unreadable::TooLarge);
    }
    Ok(plain)
}

/// Reads a body of at most `max_bytes`; of a larger one the rest is thrown away.
pub(super) async fn read_body(body: Incoming, max_bytes: usize) -> Result<Vec<u8>, Unreadable> {
    tokio::time::timeout(READ_TIMEOUT, read_bounded(body, max_bytes))
        .await
        .unwrap_or(Err(Unreadable::TooSlow))
}

async fn read_bounded(mut body: Incoming, max_bytes: usize) -> Result<Vec<u8>, Unreadable> {
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    let mut received = Vec::with_capacity(announced.min(max_bytes));
    let mut total = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_error| Unreadable::BrokeOff)?;
        let Some(data) = frame.data_ref() else {
            continue;
        };
        total += data.len();
        if total <= max_bytes {
            received.extend_from_slice(data);
        } else if total > MAX_DISCARDED_BYTES {
            break;
        }
    }
    if total > max_bytes {
        return Err(Unreadable::TooLarge);
    }
    Ok(received)
}

/// The answer to a control request whose body can't be read.
pub(super) fn unreadable(error: Unreadable) -> Response<AnswerBody> {
    problem(error.status(), &error.to_string())
}
