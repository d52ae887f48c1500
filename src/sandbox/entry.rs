//! What the sandbox tells about the events that it was sent.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde::ser::{Error as _, SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::Region;

/// Why an event was dropped after a 200, in the words of Segment's delivery
/// overview where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// The batch has no events, or `batch` is missing or not an array.
    EmptyBatch,
    /// The batch has more than 2,500 events.
    TooManyEvents,
    /// No write key, one that is not known in this region, or two different ones.
    UnknownSource,
    /// The event has more than 32,768 bytes as received.
    EventTooLarge,
    /// `type` is missing or neither `identify` nor `track`, or the event is no object.
    TypeNotSupported,
    /// Neither `userId` nor `anonymousId`.
    NoUserAnonId,
    /// `userId` or `anonymousId` is empty or not a string.
    IdNotString,
    /// A track event whose `event` is missing or empty.
    EventNotDefined,
    /// A track event whose `event` is not a string.
    EventNotString,
    /// `properties` is there and not an object.
    PropertiesNotObject,
    /// `traits` is there and not an object.
    TraitsNotObject,
    /// `context.consent.categoryPreferences` is not an object of booleans.
    ConsentNotValid,
    /// `timestamp` is not ISO-8601.
    TimestampInvalid,
    /// `messageId` has 100 characters or more.
    MessageIdTooLong,
}

/// A drop with what there is to say about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Why.
    pub reason: DropReason,
    /// More for people; empty where the reason says it all.
    pub detail: &'static str,
}

impl From<DropReason> for Dropped {
    fn from(reason: DropReason) -> Self {
        Self { reason, detail: "" }
    }
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Taken.
    Accepted,
    /// Its `messageId` was accepted before.
    Duplicate,
    /// Discarded although it was answered 200.
    Dropped(Dropped),
}

impl Outcome {
    /// The outcome's name in JSON.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Duplicate => "duplicate",
            Self::Dropped(_) => "dropped",
        }
    }
}

/// What the entries of one request have in common.
#[derive(Clone, Debug)]
pub struct RequestInfo {
    /// Number of the request, from 1 on.
    pub number: u64,
    /// When its events were judged: ISO-8601, UTC, milliseconds.
    pub received_at: String,
    /// The region of the listener.
    pub region: Region,
    /// The last four characters of a write key of at least 12, otherwise empty.
    pub write_key_hint: String,
    /// `X-Retry-Count`, 0 if there was none.
    pub retry_count: u32,
    /// The HTTP status that was answered; none if the connection was dropped instead.
    pub status: Option<u16>,
    /// Oddities of the request, which did no harm.
    pub warnings: Vec<&'static str>,
    pub(super) body: Arc<String>,
}

/// One event as the debugger shows it, or a batch that was dropped as a whole.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Number of the entry, from 1 on.
    pub seq: u64,
    /// The request that brought it.
    pub request: Arc<RequestInfo>,
    /// What became of it.
    pub outcome: Outcome,
    /// Oddities of the event, which did no harm.
    pub warnings: Vec<&'static str>,
    pub(super) range: Range<usize>,
}

impl Entry {
    /// The event's JSON exactly as it was received; `null` for a batch that was
    /// dropped as a whole.
    #[must_use]
    pub fn event_json(&self) -> &str {
        match self.request.body.get(self.range.clone()) {
            Some(json) if !json.is_empty() => json,
            _ => "null",
        }
    }

    /// The event as a value. `null` for a batch that was dropped as a whole and
    /// for an event that is nested more than 128 levels deep.
    #[must_use]
    pub fn event(&self) -> serde_json::Value {
        serde_json::from_str(self.event_json()).unwrap_or_default()
    }

    /// The oddities of the request and then those of the event.
    pub fn all_warnings(&self) -> impl Iterator<Item = &'static str> {
        let of_request = self.request.warnings.iter();
        of_request.chain(&self.warnings).copied()
    }
}

impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("seq", &self.seq)?;
        map.serialize_entry("received_at", &self.request.received_at)?;
        map.serialize_entry("region", &self.request.region)?;
        map.serialize_entry("write_key_hint", &self.request.write_key_hint)?;
        map.serialize_entry("request", &self.request.number)?;
        map.serialize_entry("retry_count", &self.request.retry_count)?;
        map.serialize_entry("status", &self.request.status)?;
        map.serialize_entry("outcome", self.outcome.as_str())?;
        match &self.outcome {
            Outcome::Accepted => {}
            Outcome::Duplicate => map.serialize_entry("reason", "duplicate_message_id")?,
            Outcome::Dropped(dropped) => {
                map.serialize_entry("reason", &dropped.reason)?;
                if !dropped.detail.is_empty() {
                    map.serialize_entry("detail", dropped.detail)?;
                }
            }
        }
        map.serialize_entry("warnings", &self.all_warnings().collect::<Vec<_>>())?;
        let event: &RawValue = serde_json::from_str(self.event_json()).map_err(S::Error::custom)?;
        map.serialize_entry("event", event)?;
        map.end()
    }
}

/// Counters since the start or the last reset. Requests are those to `/v1/batch`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Requests that began.
    pub requests: u64,
    /// Requests that have begun and not ended.
    pub requests_in_flight: u64,
    /// The most requests that were in flight at once.
    pub most_requests_in_flight: u64,
    /// Requests whose `X-Retry-Count` was above 0.
    pub retried_requests: u64,
    /// Requests with `Content-Encoding: gzip`.
    pub gzip_requests: u64,
    /// Requests that misbehaviour rules acted on.
    pub misbehaved_requests: u64,
    /// Answers by HTTP status; a dropped connection is no answer.
    pub statuses: BTreeMap<u16, u64>,
    /// Connections opened.
    pub connections_opened: u64,
    /// Connections open now.
    pub connections_open: u64,
    /// Connections that misbehaviour rules dropped.
    pub connections_dropped: u64,
    /// Events taken.
    pub events_accepted: u64,
    /// Events whose `messageId` was accepted before.
    pub events_duplicate: u64,
    /// Events discarded after a 200.
    pub events_dropped: u64,
    /// The same by reason. An `empty_batch` counts as one event.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Events of requests that misbehaved without taking them.
    pub events_refused: u64,
    /// Bytes of request bodies as they came over the wire.
    pub bytes: u64,
    /// Bytes of request bodies after decompression.
    pub bytes_decompressed: u64,
    /// Events in the largest batch.
    pub largest_batch_events: u64,
    /// Bytes of the largest body after decompression.
    pub largest_batch_bytes: u64,
}
