//! Builds the identify and the track event of a mapped capture: once, straight
//! to the bytes that will be sent.
//!
//! Shape, key names and key order are those of the integration's public
//! description (see `tests/it/vectors`), with `messageId` added. The order of
//! the attributes is that of their ids.

mod json;

use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::{
    integration::IntegrationId,
    mapping::{Mapped, Subject},
    proto,
    text::{hex_digits, push_hex},
    time::ISO_BYTES,
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
    let stem = hex_digits(&message_id_stem(integration, capture_id));
    [&stem, "-", event.name()].concat()
}

/// The ids of both events, in the order of [`EventType::ALL`].
#[must_use]
pub fn message_ids(integration: &IntegrationId, capture_id: &str) -> [String; 2] {
    let stem = hex_digits(&message_id_stem(integration, capture_id));
    EventType::ALL.map(|event| [&stem, "-", event.name()].concat())
}

/// What the ids of both events begin with, before it is written in digits.
fn message_id_stem(integration: &IntegrationId, capture_id: &str) -> [u8; MESSAGE_ID_BYTES] {
    let mut hash = Sha256::new();
    hash.update(integration.as_str().as_bytes());
    // An integration id holds no NUL, so no two pairs read the same.
    hash.update([0]);
    hash.update(capture_id.as_bytes());
    let mut stem = [0; MESSAGE_ID_BYTES];
    stem.copy_from_slice(&hash.finalize()[..MESSAGE_ID_BYTES]);
    stem
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
    let pair = Pair {
        mapped,
        subject,
        message_id_stem: message_id_stem(integration, &mapped.capture_id),
        time: mapped.occur_time.iso_bytes(),
    };
    let unserialisable = |error| refusal("NOT_SERIALISABLE", format!("no JSON form: {error}"));
    let (identify, shared) = pair.identify().map_err(unserialisable)?;
    check_size(&identify, EventType::Identify, mapped)?;
    let track = pair.track(&identify, shared).map_err(unserialisable)?;
    check_size(&track, EventType::Track, mapped)?;
    Ok(Some(EventPair { identify, track }))
}

fn refusal(reason: &'static str, description: String) -> Vec<Violation> {
    vec![Violation {
        field: "capture.attributes".to_owned(),
        reason,
        description,
    }]
}

fn check_size(
    bytes: &[u8],
    event_type: EventType,
    mapped: &Mapped<'_>,
) -> Result<(), Vec<Violation>> {
    if bytes.len() <= MAX_EVENT_BYTES {
        return Ok(());
    }
    let sizes = mapped.fields.iter().map(|field| {
        let mut value = Vec::new();
        let written = json::push_value(&mut value, &field.value);
        (written.map_or(0, |()| value.len()), field.key)
    });
    let largest = sizes.max().map(|(size, key)| {
        format!(
            " The largest is {} with {size} bytes.",
            crate::violation::entry_path("", key)
        )
    });
    Err(refusal(
        "EVENT_TOO_LARGE",
        format!(
            "the {} event would have {} bytes of JSON; Segment takes at most {MAX_EVENT_BYTES}. \
             Shorten or leave out attributes.{}",
            event_type.name(),
            bytes.len(),
            largest.unwrap_or_default()
        ),
    ))
}

/// What both events are written from.
struct Pair<'a> {
    mapped: &'a Mapped<'a>,
    subject: &'a Subject<'a>,
    message_id_stem: [u8; MESSAGE_ID_BYTES],
    time: [u8; ISO_BYTES],
}

/// Where in the identify event stands what the track event has too.
struct Shared {
    context: Range<usize>,
    fields: Range<usize>,
}

impl Pair<'_> {
    /// Writes the identify event.
    fn identify(&self) -> serde_json::Result<(Vec<u8>, Shared)> {
        const TYPICAL_BYTES: usize = 1_024;
        let mut out = Vec::with_capacity(TYPICAL_BYTES);
        out.extend_from_slice(b"{\"context\":");
        let context = out.len();
        self.push_context(&mut out)?;
        let context = context..out.len();
        self.push_message_id(&mut out, EventType::Identify);
        self.push_time(&mut out);
        out.extend_from_slice(b",\"traits\":{\"email\":");
        json::push_text(&mut out, &self.subject.email)?;
        out.extend_from_slice(b",\"emailSha256Hash\":");
        json::push_quoted(&mut out, self.subject.user_id.as_bytes());
        let fields = out.len();
        let carried = self.mapped.fields.iter().filter(|field| field.in_identify);
        json::push_fields(&mut out, carried)?;
        let fields = fields..out.len();
        out.push(b'}');
        self.push_end(&mut out, EventType::Identify);
        Ok((out, Shared { context, fields }))
    }

    /// Writes the track event; what both have is copied.
    fn track(&self, identify: &[u8], shared: Shared) -> serde_json::Result<Vec<u8>> {
        // Without the fields of both an event is about this long, names and titles included.
        const TYPICAL_BYTES: usize = 640;
        let mapped = self.mapped;
        let mut out = Vec::with_capacity(TYPICAL_BYTES + shared.fields.len());
        out.extend_from_slice(b"{\"context\":");
        out.extend_from_slice(&identify[shared.context]);
        out.extend_from_slice(b",\"event\":");
        json::push_text(&mut out, mapped.event_name)?;
        self.push_message_id(&mut out, EventType::Track);
        self.push_time(&mut out);
        out.extend_from_slice(b",\"properties\":{\"questions\":{");
        let fields = out.len();
        if mapped
            .fields
            .iter()
            .all(|field| field.in_identify && field.in_track)
        {
            out.extend_from_slice(&identify[shared.fields]);
        } else {
            let carried = mapped.fields.iter().filter(|field| field.in_track);
            json::push_fields(&mut out, carried)?;
        }
        if out.len() > fields {
            // The comma before the first one, which here has none before it.
            out.remove(fields);
        }
        out.extend_from_slice(b"},\"surveyId\":");
        json::push_text(&mut out, mapped.campaign_id)?;
        out.extend_from_slice(b",\"surveySessionId\":");
        json::push_text(&mut out, mapped.session_id)?;
        if !mapped.campaign_name.is_empty() {
            out.extend_from_slice(b",\"surveyTitle\":");
            json::push_text(&mut out, mapped.campaign_name)?;
        }
        if !mapped.traffic_source.is_empty() {
            out.extend_from_slice(b",\"trafficSource\":");
            json::push_text(&mut out, mapped.traffic_source)?;
        }
        out.push(b'}');
        self.push_end(&mut out, EventType::Track);
        Ok(out)
    }

    fn push_context(&self, out: &mut Vec<u8>) -> serde_json::Result<()> {
        out.extend_from_slice(
            b"{\"externalIds\":[{\"collection\":\"users\",\"encoding\":\"none\",\"id\":",
        );
        json::push_quoted(out, self.subject.user_id.as_bytes());
        out.extend_from_slice(b",\"type\":\"emailSha256Hash\"}]");
        let mut separator: &[u8] = b",\"consent\":{\"categoryPreferences\":{";
        for (category, given) in &self.mapped.consent {
            out.extend_from_slice(separator);
            json::push_text(out, category)?;
            out.extend_from_slice(if *given { b":true" } else { b":false" });
            separator = b",";
        }
        if !self.mapped.consent.is_empty() {
            out.extend_from_slice(b"}}");
        }
        out.push(b'}');
        Ok(())
    }

    fn push_message_id(&self, out: &mut Vec<u8>, event: EventType) {
        out.extend_from_slice(b",\"messageId\":\"");
        push_hex(out, &self.message_id_stem);
        out.push(b'-');
        out.extend_from_slice(event.name().as_bytes());
        out.push(b'"');
    }

    fn push_end(&self, out: &mut Vec<u8>, event: EventType) {
        out.extend_from_slice(b",\"type\":");
        json::push_quoted(out, event.name().as_bytes());
        out.extend_from_slice(b",\"userId\":");
        json::push_quoted(out, self.subject.user_id.as_bytes());
        out.push(b'}');
    }

    fn push_time(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b",\"timestamp\":");
        json::push_quoted(out, &self.time);
    }
}
