//! A capture as it came, borrowed from the bytes of its request.
//!
//! The schema's own [`proto::Capture`] owns each of its texts; taking one apart costs more
//! than all that follows. So the rpcs that take captures keep a capture's bytes as they are
//! ([`proto::raw`]), and [`decode`] finds the texts in them. It takes and refuses exactly what
//! prost does, and finds the same in it: the tests and `fuzz/` compare the two.

mod canonical;
mod decode;
mod reader;
mod requests;

use prost::Message;
use prost_types::Timestamp;

use crate::proto::{self, attribute_value::Kind, raw};

pub use decode::decode;
pub use reader::Malformed;

/// What one person left in one session. The fields are those of the schema.
#[derive(Clone, Default, PartialEq)]
pub struct Capture<'a> {
    /// The caller's idempotency key; empty where it is to be derived.
    pub capture_id: &'a str,
    /// The address as it was collected.
    pub email: &'a str,
    /// Jebbit campaign id.
    pub campaign_id: &'a str,
    /// Jebbit campaign name.
    pub campaign_name: &'a str,
    /// Id of the person's session.
    pub session_id: &'a str,
    /// Where the person came from.
    pub traffic_source: &'a str,
    /// When the person answered.
    pub occur_time: Option<Timestamp>,
    /// The number of a [`proto::DataRegion`].
    pub data_region: i32,
    attributes: Vec<Attribute<'a>>,
    consent: Vec<(&'a str, bool)>,
}

/// One attribute.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribute<'a> {
    /// Jebbit attribute id.
    pub id: &'a str,
    /// Its value; `None` where the caller has set none.
    pub answer: Option<Answer<'a>>,
}

/// The value of an attribute, unchecked.
#[derive(Clone, PartialEq)]
pub enum Answer<'a> {
    /// A text.
    Text(&'a str),
    /// A number.
    Number(f64),
    /// A whole number.
    Integer(i64),
    /// A truth value.
    Bool(bool),
    /// A moment.
    Time(Timestamp),
    /// Several texts.
    List(Vec<&'a str>),
}

impl std::fmt::Debug for Capture<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capture")
            .field("capture_id", &self.capture_id)
            .field("campaign_id", &self.campaign_id)
            .field("session_id", &self.session_id)
            .field("data_region", &self.data_region)
            .field("attributes", &self.attributes.len())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Answer<'_> {
    /// An attribute's value is personal data.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

impl<'a> Capture<'a> {
    /// The attributes in the order of their ids, each id once.
    #[must_use]
    pub fn attributes(&self) -> &[Attribute<'a>] {
        &self.attributes
    }

    /// The consent by category, in their order, each once.
    #[must_use]
    pub fn consent(&self) -> &[(&'a str, bool)] {
        &self.consent
    }

    /// The attributes, taken out.
    #[must_use]
    pub fn take_attributes(&mut self) -> Vec<Attribute<'a>> {
        std::mem::take(&mut self.attributes)
    }

    /// The consent, taken out.
    #[must_use]
    pub fn take_consent(&mut self) -> Vec<(&'a str, bool)> {
        std::mem::take(&mut self.consent)
    }
}

impl<'a> From<&'a proto::Capture> for Capture<'a> {
    fn from(capture: &'a proto::Capture) -> Self {
        let attribute = |(id, value): (&'a String, &'a proto::AttributeValue)| Attribute {
            id,
            answer: value.kind.as_ref().map(Answer::from),
        };
        Self {
            capture_id: &capture.capture_id,
            email: &capture.email,
            campaign_id: &capture.campaign_id,
            campaign_name: &capture.campaign_name,
            session_id: &capture.session_id,
            traffic_source: &capture.traffic_source,
            occur_time: capture.occur_time,
            data_region: capture.data_region,
            attributes: capture.attributes.iter().map(attribute).collect(),
            consent: capture
                .consent
                .iter()
                .map(|(k, v)| (k.as_str(), *v))
                .collect(),
        }
    }
}

impl<'a> From<&'a Kind> for Answer<'a> {
    fn from(kind: &'a Kind) -> Self {
        match kind {
            Kind::StringValue(text) => Self::Text(text),
            Kind::NumberValue(number) => Self::Number(*number),
            Kind::IntegerValue(integer) => Self::Integer(*integer),
            Kind::BoolValue(value) => Self::Bool(*value),
            Kind::TimestampValue(time) => Self::Time(*time),
            Kind::ListValue(list) => Self::List(list.values.iter().map(String::as_str).collect()),
        }
    }
}

/// For tests and fuzzing: a `CaptureRequest` is taken or refused as prost takes or refuses
/// it, with the same capture in it. Returns whether it is taken.
///
/// # Panics
/// It is not.
#[doc(hidden)]
#[must_use = "whether it is taken"]
pub fn check_against_prost(request: &[u8]) -> bool {
    let raw = raw::CaptureRequest::decode(request).ok();
    let ours = raw.as_ref().and_then(|request| request.capture().ok());
    let prosts = proto::CaptureRequest::decode(request).ok();
    assert_eq!(ours.is_some(), prosts.is_some(), "taken here, and by prost");
    let (Some(ours), Some(prosts)) = (&ours, prosts) else {
        return false;
    };
    assert_eq!(ours.is_some(), prosts.capture.is_some());
    let (Some(ours), Some(mut prosts)) = (ours, prosts.capture) else {
        return true;
    };
    assert_eq!(ours.capture_id, std::mem::take(&mut prosts.capture_id));
    // Bytes, since NaN differs from itself.
    let encoded = prosts.encode_to_vec();
    assert_eq!(ours.canonical_content(), encoded);
    assert_eq!(Capture::from(&prosts).canonical_content(), encoded);
    true
}

#[cfg(test)]
mod tests;
