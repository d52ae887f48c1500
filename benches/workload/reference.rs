//! The least that the same work can be with typed serde: the messages as prost
//! derives them, and both events as structs of serde_json. It checks nothing, knows no
//! integration and keeps no fingerprint.
//!
//! The messages are written down here, not taken from the relay's schema, so that what the
//! relay gains by decoding otherwise shows.

use std::collections::BTreeMap;

use prost::Message;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// `CaptureRequest`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct CaptureRequest {
    #[prost(string, tag = "1")]
    pub(crate) integration_id: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) capture: Option<Capture>,
    #[prost(int32, tag = "3")]
    pub(crate) wait_for: i32,
}

/// `CaptureBatchRequest`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct CaptureBatchRequest {
    #[prost(string, tag = "1")]
    pub(crate) integration_id: String,
    #[prost(message, repeated, tag = "2")]
    pub(crate) captures: Vec<Capture>,
    #[prost(int32, tag = "3")]
    pub(crate) wait_for: i32,
}

/// `CaptureStreamRequest`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct CaptureStreamRequest {
    #[prost(string, tag = "1")]
    pub(crate) correlation_id: String,
    #[prost(string, tag = "2")]
    pub(crate) integration_id: String,
    #[prost(message, optional, tag = "3")]
    pub(crate) capture: Option<Capture>,
}

/// `Capture`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Capture {
    #[prost(string, tag = "1")]
    pub(crate) capture_id: String,
    #[prost(string, tag = "2")]
    pub(crate) email: String,
    #[prost(string, tag = "3")]
    pub(crate) campaign_id: String,
    #[prost(string, tag = "4")]
    pub(crate) campaign_name: String,
    #[prost(string, tag = "5")]
    pub(crate) session_id: String,
    #[prost(string, tag = "6")]
    pub(crate) traffic_source: String,
    #[prost(message, optional, tag = "7")]
    pub(crate) occur_time: Option<Timestamp>,
    #[prost(int32, tag = "8")]
    pub(crate) data_region: i32,
    #[prost(btree_map = "string, message", tag = "9")]
    pub(crate) attributes: BTreeMap<String, AttributeValue>,
    #[prost(btree_map = "string, bool", tag = "10")]
    pub(crate) consent: BTreeMap<String, bool>,
}

/// `google.protobuf.Timestamp`.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct Timestamp {
    #[prost(int64, tag = "1")]
    pub(crate) seconds: i64,
    #[prost(int32, tag = "2")]
    pub(crate) nanos: i32,
}

/// `AttributeValue`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct AttributeValue {
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6")]
    pub(crate) kind: Option<Kind>,
}

/// The kinds of an `AttributeValue`.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Kind {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(double, tag = "2")]
    Number(f64),
    #[prost(int64, tag = "3")]
    Integer(i64),
    #[prost(bool, tag = "4")]
    Bool(bool),
    #[prost(message, tag = "5")]
    Time(Timestamp),
    #[prost(message, tag = "6")]
    List(StringList),
}

/// `StringList`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct StringList {
    #[prost(string, repeated, tag = "1")]
    pub(crate) values: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Event<'a> {
    context: Context<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<&'static str>,
    message_id: &'a str,
    timestamp: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    traits: Option<Traits<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    properties: Option<Properties<'a>>,
    r#type: &'static str,
    user_id: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Context<'a> {
    external_ids: [ExternalId<'a>; 1],
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
struct Traits<'a> {
    email: &'a str,
    email_sha256_hash: &'a str,
    #[serde(flatten)]
    attributes: Attributes<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Properties<'a> {
    questions: Attributes<'a>,
    survey_id: &'a str,
    survey_session_id: &'a str,
    survey_title: &'a str,
    traffic_source: &'a str,
}

struct Attributes<'a>(&'a BTreeMap<String, AttributeValue>);

impl Serialize for Attributes<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0)
    }
}

impl Serialize for AttributeValue {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.kind {
            Some(Kind::Text(text)) => serializer.serialize_str(text),
            Some(Kind::Number(number)) => serializer.serialize_f64(*number),
            Some(Kind::Integer(number)) => serializer.serialize_i64(*number),
            Some(Kind::Bool(value)) => serializer.serialize_bool(*value),
            Some(Kind::List(list)) => serializer.collect_seq(&list.values),
            Some(Kind::Time(_)) | None => serializer.serialize_unit(),
        }
    }
}

/// Decodes a request and serialises both events of its capture.
///
/// # Panics
/// The request is not as it should be.
pub(crate) fn path(request: &[u8]) -> [Vec<u8>; 2] {
    const TYPICAL_BYTES: usize = 1_024;
    let request = CaptureRequest::decode(request).expect("a request");
    let capture = request.capture.expect("a capture");
    let user_id = hex::encode(Sha256::digest(capture.email.to_ascii_lowercase()));
    let time = capture.occur_time.unwrap_or_default();
    let time = jiff::Timestamp::new(time.seconds, time.nanos).expect("a time");
    let timestamp = format!("{time:.3}");
    ["identify", "track"].map(|kind| {
        let is_track = kind == "track";
        let message_id = format!("{}-{kind}", capture.capture_id);
        let event = Event {
            context: Context {
                external_ids: [ExternalId {
                    collection: "users",
                    encoding: "none",
                    id: &user_id,
                    r#type: "emailSha256Hash",
                }],
            },
            event: is_track.then_some("Survey Completed"),
            message_id: &message_id,
            timestamp: &timestamp,
            traits: (!is_track).then(|| Traits {
                email: &capture.email,
                email_sha256_hash: &user_id,
                attributes: Attributes(&capture.attributes),
            }),
            properties: is_track.then(|| Properties {
                questions: Attributes(&capture.attributes),
                survey_id: &capture.campaign_id,
                survey_session_id: &capture.session_id,
                survey_title: &capture.campaign_name,
                traffic_source: &capture.traffic_source,
            }),
            r#type: kind,
            user_id: &user_id,
        };
        let mut bytes = Vec::with_capacity(TYPICAL_BYTES);
        serde_json::to_writer(&mut bytes, &event).expect("serialises");
        bytes
    })
}
