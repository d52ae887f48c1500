//! Judges one request: whose it is, which events it has, what becomes of each.
//! No I/O and no clock.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::{SignedDuration, Timestamp};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::Region;
use super::entry::{DropReason, Dropped};
use super::event::{CheckedEvent, check_event, is_iso_8601};
use super::light::{Key, Light};

/// Most events in one batch.
pub(super) const MAX_BATCH_EVENTS: usize = 2_500;
/// How far `sentAt` may be from the time of receipt before it is remarked on.
const MAX_SENT_AT_OFF: SignedDuration = SignedDuration::from_secs(60);

/// The write keys of all sources.
pub(super) struct Keys(HashMap<String, Vec<Region>>);

/// A request to `/v1/batch`, decompressed.
pub(super) struct BatchRequest<'a> {
    pub(super) region: Region,
    /// The `Authorization` header; empty where it isn't text.
    pub(super) authorization: Option<&'a str>,
    pub(super) body: &'a str,
    pub(super) now: Timestamp,
}

/// What there is to say about a request.
#[derive(Debug)]
pub(super) struct CheckedBatch<'a> {
    pub(super) write_key: Option<Cow<'a, str>>,
    /// The reason why none of its events is taken.
    pub(super) whole: Option<Dropped>,
    pub(super) warnings: Vec<&'static str>,
    /// None where the batch has too many.
    pub(super) events: Vec<CheckedEvent<'a>>,
    /// Events in the batch, also where there are too many.
    pub(super) total: usize,
}

/// Why a request is answered 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotABatch {
    #[error("the body is not JSON")]
    NotJson,
    #[error("the body is not a JSON object")]
    NotAnObject,
}

impl Keys {
    pub(super) fn new(keys: Vec<(Region, String)>) -> Self {
        let mut regions_by_key: HashMap<String, Vec<Region>> = HashMap::new();
        for (region, key) in keys {
            regions_by_key.entry(key).or_default().push(region);
        }
        Self(regions_by_key)
    }

    fn check(&self, region: Region, key: &str) -> Option<Dropped> {
        let detail = match self.0.get(key) {
            Some(regions) if regions.contains(&region) => return None,
            Some(_) => "wrong region",
            None if self.0.is_empty() => return None,
            None => "unknown write key",
        };
        Some(Dropped {
            reason: DropReason::UnknownSource,
            detail,
        })
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({} redacted)", self.0.len())
    }
}

/// Judges a request.
///
/// # Errors
/// What makes it a request that even Segment answers 400.
pub(super) fn check_batch<'a>(
    request: &BatchRequest<'a>,
    keys: &Keys,
) -> Result<CheckedBatch<'a>, NotABatch> {
    if !request.body.trim_start().starts_with('{') {
        let is_json = serde_json::from_str::<IgnoredAny>(request.body).is_ok();
        return Err(if is_json {
            NotABatch::NotAnObject
        } else {
            NotABatch::NotJson
        });
    }
    let body = Body::read(request.body).map_err(|_error| NotABatch::NotJson)?;
    let mut warnings = Vec::new();
    if body.repeated {
        warnings.push("repeated_field_in_body");
    }
    check_sent_at(body.sent_at.as_ref(), request.now, &mut warnings);
    let source = find_key(request.authorization, body.write_key, &mut warnings);
    let (write_key, source_fault) = match source {
        Ok(key) => {
            let fault = keys.check(request.region, &key);
            (Some(key), fault)
        }
        Err(fault) => (None, Some(fault)),
    };
    let batch_fault = if body.total == 0 {
        Some(DropReason::EmptyBatch.into())
    } else if body.total > MAX_BATCH_EVENTS {
        Some(DropReason::TooManyEvents.into())
    } else {
        None
    };
    Ok(CheckedBatch {
        write_key,
        whole: batch_fault.or(source_fault),
        warnings,
        events: body.events.into_iter().map(check_event).collect(),
        total: body.total,
    })
}

/// The write key of the header and the body, which have to agree.
fn find_key<'a>(
    authorization: Option<&str>,
    in_body: Option<Light<'a>>,
    warnings: &mut Vec<&'static str>,
) -> Result<Cow<'a, str>, Dropped> {
    let fault = |detail| Dropped {
        reason: DropReason::UnknownSource,
        detail,
    };
    let in_header = authorization.and_then(basic_user);
    if authorization.is_some() && in_header.is_none() {
        warnings.push("authorization_malformed");
    }
    let in_body = match in_body {
        Some(Light::Text(key)) if !key.is_empty() => Some(key),
        None => None,
        Some(_) => {
            warnings.push("write_key_not_string");
            None
        }
    };
    match (in_header, in_body) {
        (Some(header), Some(body)) if header != body => Err(fault(
            "Authorization and writeKey hold different write keys",
        )),
        (_, Some(key)) => Ok(key),
        (Some(key), None) => Ok(Cow::Owned(key)),
        (None, None) => Err(fault("no write key")),
    }
}

/// The user name of a Basic `Authorization` header: the write key before the colon.
pub(super) fn basic_user(header: &str) -> Option<String> {
    let (scheme, encoded) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let (user, _password) = decoded.split_once(':')?;
    (!user.is_empty()).then(|| user.to_owned())
}

fn check_sent_at(sent_at: Option<&Light<'_>>, now: Timestamp, warnings: &mut Vec<&'static str>) {
    let Some(sent_at) = sent_at else {
        warnings.push("no_sent_at");
        return;
    };
    match sent_at {
        Light::Text(text) if is_iso_8601(text) => {
            // Segment shifts each event's time by receivedAt - sentAt.
            if let Ok(time) = text.parse::<Timestamp>()
                && now.duration_since(time).abs() > MAX_SENT_AT_OFF
            {
                warnings.push("sent_at_not_now");
            }
        }
        _ => warnings.push("sent_at_invalid"),
    }
}

/// The top level of the body.
#[derive(Default)]
struct Body<'a> {
    events: Vec<&'a str>,
    total: usize,
    write_key: Option<Light<'a>>,
    sent_at: Option<Light<'a>>,
    repeated: bool,
}

impl<'a> Body<'a> {
    fn read(json: &'a str) -> serde_json::Result<Self> {
        Self::read_with(json, true).or_else(|error| {
            // A `batch` of another kind leaves JSON that is fine, with no events.
            if error.is_data() {
                Self::read_with(json, false)
            } else {
                Err(error)
            }
        })
    }

    fn read_with(json: &'a str, batch_is_array: bool) -> serde_json::Result<Self> {
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let body = deserializer.deserialize_map(BodyVisitor { batch_is_array })?;
        deserializer.end()?;
        Ok(body)
    }
}

struct BodyVisitor {
    batch_is_array: bool,
}

impl<'de> Visitor<'de> for BodyVisitor {
    type Value = Body<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a batch object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body<'de>, A::Error> {
        let mut body = Body::default();
        let mut batches = 0_u32;
        while let Some(Key(key)) = map.next_key()? {
            match key.as_ref() {
                "batch" if self.batch_is_array => {
                    let batch: Batch<'de> = map.next_value()?;
                    body.events = batch.events;
                    body.total = batch.total;
                    batches += 1;
                }
                "writeKey" => body.repeated |= body.write_key.replace(map.next_value()?).is_some(),
                "sentAt" => body.repeated |= body.sent_at.replace(map.next_value()?).is_some(),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        body.repeated |= batches > 1;
        Ok(body)
    }
}

/// The texts of the events.
struct Batch<'a> {
    events: Vec<&'a str>,
    total: usize,
}

impl<'de: 'a, 'a> Deserialize<'de> for Batch<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(BatchVisitor)
    }
}

struct BatchVisitor;

impl<'de> Visitor<'de> for BatchVisitor {
    type Value = Batch<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Batch<'de>, A::Error> {
        let mut events = Vec::new();
        let mut total = 0;
        while let Some(raw) = seq.next_element::<&'de RawValue>()? {
            total += 1;
            if total <= MAX_BATCH_EVENTS {
                events.push(raw.get());
            }
        }
        if total > MAX_BATCH_EVENTS {
            events = Vec::new();
        }
        Ok(Batch { events, total })
    }
}

#[cfg(test)]
mod tests;
