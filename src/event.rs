//! Builds the identify and the track event of a mapped capture: once, straight
//! to the bytes that will be sent.
//!
//! Shape, key names and key order are those of the integration's public
//! description (see `tests/it/vectors`), with `messageId` added. The order of
//! the attributes is that of their ids.

use serde::{Serialize, Serializer, ser::SerializeMap};
use sha2::{Digest, Sha256};

use crate::{
    integration::IntegrationId,
    mapping::{Field, Mapped, Subject},
    proto,
    text::hex_digits,
    violation::Violation,
};

/// Largest serialised event that Segment takes, in bytes: 32 KB.
pub const MAX_EVENT_BYTES: usize = 32 * 1024;
/// Bytes of the hash that a message id shows before its suffix.
const MESSAGE_ID_BYTES: usize = 16;

/// The type of an event in Segment's Spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EventType {
    /// Ties traits to a user.
    Identify,
    /// Records what a user did.
    Track,
}

impl EventType {
    /// Both types in the order in which they are sent.
    pub const ALL: [Self; 2] = [Self::Identify, Self::Track];

    /// The word in Segment's Spec.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Identify => "identify",
            Self::Track => "track",
        }
    }

    /// The schema's value.
    #[must_use]
    pub fn to_proto(self) -> proto::EventType {
        match self {
            Self::Identify => proto::EventType::Identify,
            Self::Track => proto::EventType::Track,
        }
    }
}

/// The same capture always has the same id, in this process and in any other:
/// Segment removes repeats by it. 38 to 41 characters.
#[must_use]
pub fn message_id(integration: &IntegrationId, capture_id: &str, event: EventType) -> String {
    with_suffix(&message_id_stem(integration, capture_id), event)
}

/// What the ids of both events begin with.
fn message_id_stem(integration: &IntegrationId, capture_id: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(integration.as_str().as_bytes());
    // An integration id holds no NUL, so no two pairs read the same.
    hash.update([0]);
    hash.update(capture_id.as_bytes());
    hex_digits(&hash.finalize()[..MESSAGE_ID_BYTES])
}

fn with_suffix(stem: &str, event: EventType) -> String {
    [stem, "-", event.name()].concat()
}

/// Both events of a capture, serialised.
#[derive(Clone, PartialEq, Eq)]
pub struct EventPair {
    /// JSON of the identify event.
    pub identify: Vec<u8>,
    /// JSON of the track event.
    pub track: Vec<u8>,
}

impl EventPair {
    /// The event of one type.
    #[must_use]
    pub fn get(&self, event: EventType) -> &[u8] {
        match event {
            EventType::Identify => &self.identify,
            EventType::Track => &self.track,
        }
    }
}

impl std::fmt::Debug for EventPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventPair")
            .field("identify_bytes", &self.identify.len())
            .field("track_bytes", &self.track.len())
            .finish()
    }
}

/// Serialises both events; `None` where the capture has no subject.
///
/// # Errors
/// An event is larger than [`MAX_EVENT_BYTES`].
pub fn build(
    integration: &IntegrationId,
    mapped: &Mapped<'_>,
) -> Result<Option<EventPair>, Vec<Violation>> {
    let Some(subject) = &mapped.subject else {
        return Ok(None);
    };
    let timestamp = mapped.occur_time.to_iso();
    let context = Context {
        external_ids: [ExternalId {
            collection: "users",
            encoding: "none",
            id: &subject.user_id,
            r#type: "emailSha256Hash",
        }],
        consent: (!mapped.consent.is_empty()).then_some(Consent {
            category_preferences: mapped.consent,
        }),
    };
    let stem = message_id_stem(integration, &mapped.capture_id);
    let identify = Identify {
        context: &context,
        message_id: with_suffix(&stem, EventType::Identify),
        timestamp: &timestamp,
        traits: Traits {
            subject,
            fields: &mapped.fields,
        },
        r#type: EventType::Identify.name(),
        user_id: &subject.user_id,
    };
    let track = Track {
        context: &context,
        event: mapped.event_name,
        message_id: with_suffix(&stem, EventType::Track),
        timestamp: &timestamp,
        properties: Properties {
            questions: Questions(&mapped.fields),
            survey_id: mapped.campaign_id,
            survey_session_id: mapped.session_id,
            survey_title: mapped.campaign_name,
            traffic_source: mapped.traffic_source,
        },
        r#type: EventType::Track.name(),
        user_id: &subject.user_id,
    };
    Ok(Some(EventPair {
        identify: serialise(&identify, EventType::Identify, mapped)?,
        track: serialise(&track, EventType::Track, mapped)?,
    }))
}

fn serialise(
    event: &impl Serialize,
    event_type: EventType,
    mapped: &Mapped<'_>,
) -> Result<Vec<u8>, Vec<Violation>> {
    const TYPICAL_BYTES: usize = 1_024;
    let refuse = |reason, description| {
        vec![Violation {
            field: "capture.attributes".to_owned(),
            reason,
            description,
        }]
    };
    let mut bytes = Vec::with_capacity(TYPICAL_BYTES);
    serde_json::to_writer(&mut bytes, event)
        .map_err(|error| refuse("NOT_SERIALISABLE", format!("no JSON form: {error}")))?;
    if bytes.len() > MAX_EVENT_BYTES {
        let largest = mapped
            .fields
            .iter()
            .map(|field| {
                (
                    serde_json::to_vec(&field.value).map_or(0, |v| v.len()),
                    field.key,
                )
            })
            .max()
            .map(|(size, key)| {
                format!(
                    " The largest is {} with {size} bytes.",
                    crate::violation::entry_path("", key)
                )
            });
        return Err(refuse(
            "EVENT_TOO_LARGE",
            format!(
                "the {} event would have {} bytes of JSON; Segment takes at most {MAX_EVENT_BYTES}. \
                 Shorten or leave out attributes.{}",
                event_type.name(),
                bytes.len(),
                largest.unwrap_or_default()
            ),
        ));
    }
    Ok(bytes)
}

#[derive(Serialize)]
struct Identify<'a> {
    context: &'a Context<'a>,
    #[serde(rename = "messageId")]
    message_id: String,
    timestamp: &'a str,
    traits: Traits<'a>,
    r#type: &'static str,
    #[serde(rename = "userId")]
    user_id: &'a str,
}

#[derive(Serialize)]
struct Track<'a> {
    context: &'a Context<'a>,
    event: &'a str,
    #[serde(rename = "messageId")]
    message_id: String,
    timestamp: &'a str,
    properties: Properties<'a>,
    r#type: &'static str,
    #[serde(rename = "userId")]
    user_id: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Context<'a> {
    external_ids: [ExternalId<'a>; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    consent: Option<Consent<'a>>,
}

#[derive(Serialize)]
struct ExternalId<'a> {
    collection: &'static str,
    encoding: &'static str,
    id: &'a str,
    r#type: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Consent<'a> {
    category_preferences: &'a std::collections::BTreeMap<String, bool>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Properties<'a> {
    questions: Questions<'a>,
    survey_id: &'a str,
    survey_session_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    survey_title: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    traffic_source: &'a str,
}

struct Traits<'a> {
    subject: &'a Subject<'a>,
    fields: &'a [Field<'a>],
}

impl Serialize for Traits<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("email", self.subject.email)?;
        map.serialize_entry("emailSha256Hash", &self.subject.user_id)?;
        for field in self.fields.iter().filter(|field| field.in_identify) {
            map.serialize_entry(field.key, &field.value)?;
        }
        map.end()
    }
}

struct Questions<'a>(&'a [Field<'a>]);

impl Serialize for Questions<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for field in self.0.iter().filter(|field| field.in_track) {
            map.serialize_entry(field.key, &field.value)?;
        }
        map.end()
    }
}
