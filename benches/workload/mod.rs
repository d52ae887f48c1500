//! The capture that all benchmarks and the guard in `tests/it` send: about 430
//! bytes on the wire, about 1,550 bytes of JSON in its two events.

#![allow(dead_code, reason = "each target uses its part")]

pub(crate) mod reference;

use prost::Message;
use reference::{AttributeValue, CaptureRequest, Kind, StringList, Timestamp};
use segment_relay::{
    capture::Capture,
    intake,
    integration::{Integration, Revision},
    outbox::{Content, NewCapture},
    proto::{self, raw},
    time::UnixMillis,
};

/// Stands for the number of a capture in a template: 16 digits, which occur nowhere else.
pub(crate) const MARK: &str = "9182736455463728";
/// Digits of a capture's number.
pub(crate) const DIGITS: usize = MARK.len();
/// When the captures are received, in the pure path.
pub(crate) const RECEIVED: UnixMillis = UnixMillis(1_800_000_000_000);

/// A capture whose number is a text of [`DIGITS`] digits: another person and
/// session for each.
pub(crate) fn capture(number: &str) -> reference::Capture {
    let text = |text: &str| Kind::Text(text.to_owned());
    let choices = ["skin care", "fragrance", "make-up"];
    let kinds = [
        ("age_group", text("25-34")),
        ("favorite_color", text("ocean blue")),
        (
            "interests",
            Kind::List(StringList {
                values: choices.map(str::to_owned).into(),
            }),
        ),
        ("newsletter_opt_in", Kind::Bool(true)),
        ("purchase_intent", text("within three months")),
        ("quiz_score", Kind::Integer(87)),
        (
            "result",
            text("The \u{201c}Night Owl\u{201d}: glows best after dark"),
        ),
        ("skin_type", text("combination")),
    ];
    reference::Capture {
        capture_id: format!("quiz-{number}"),
        email: format!("Person.{number}@example.com"),
        campaign_id: "n3zrik6g".to_owned(),
        campaign_name: "Find your evening routine".to_owned(),
        session_id: format!("y2P5ks05{number}"),
        traffic_source: "Owned+Web".to_owned(),
        occur_time: Some(Timestamp {
            seconds: 1_790_000_000,
            nanos: 123_000_000,
        }),
        attributes: kinds
            .into_iter()
            .map(|(id, kind)| (id.to_owned(), AttributeValue { kind: Some(kind) }))
            .collect(),
        ..reference::Capture::default()
    }
}

/// The encoded requests of so many captures.
pub(crate) fn encoded(count: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|number| {
            let request = CaptureRequest {
                integration_id: "bench-0".to_owned(),
                capture: Some(capture(&format!("{number:0DIGITS$}"))),
                wait_for: 0,
            };
            request.encode_to_vec()
        })
        .collect()
}

/// The integration that the captures are for: typed mappings of all attributes, to other keys.
pub(crate) fn specification(id: &str) -> proto::Integration {
    use proto::ValueType::{Bool, List, Number, String};
    let mappings = [
        ("age_group", "ageGroup", String),
        ("favorite_color", "favoriteColor", String),
        ("interests", "interests", List),
        ("newsletter_opt_in", "newsletterOptIn", Bool),
        ("purchase_intent", "purchaseIntent", String),
        ("quiz_score", "quizScore", Number),
        ("result", "result", String),
        ("skin_type", "skinType", String),
    ];
    proto::Integration {
        integration_id: id.into(),
        credentials: vec![proto::Credential {
            data_region: proto::DataRegion::NonEu.into(),
            write_key: format!("write-key-of-{id}"),
            ..Default::default()
        }],
        mappings: mappings
            .map(|(attribute_id, key, value_type)| proto::FieldMapping {
                attribute_id: attribute_id.into(),
                segment_key: key.into(),
                value_type: value_type.into(),
                ..Default::default()
            })
            .into(),
        ..Default::default()
    }
}

/// The same, checked.
///
/// # Panics
/// The specification is wrong.
pub(crate) fn integration() -> Integration {
    let revision = Revision {
        etag: String::new(),
        mapping_version: 1,
        create_time: UnixMillis(0),
        update_time: UnixMillis(0),
        read_only: true,
        ..Revision::default()
    };
    Integration::new(&specification("bench-0"), revision).expect("a valid specification")
}

/// The relay's pure path of one capture: decode -> validate -> map -> serialise.
///
/// # Panics
/// The request is not as it should be.
pub(crate) fn relay_path(integration: &Integration, request: &[u8]) -> NewCapture {
    let request = raw::CaptureRequest::decode(request).expect("a request");
    let capture = request.capture().expect("decodes").expect("a capture");
    intake::prepare(integration, capture, RECEIVED).expect("a valid capture")
}

/// The relay's decoding alone; `seen` gets the result.
///
/// # Panics
/// The request is not as it should be.
pub(crate) fn relay_decode(request: &[u8], seen: impl FnOnce(&Capture<'_>)) {
    let request = raw::CaptureRequest::decode(request).expect("a request");
    seen(&request.capture().expect("decodes").expect("a capture"));
}

/// Bytes of JSON of both events.
pub(crate) fn event_bytes(new: &NewCapture) -> usize {
    match &new.content {
        Content::Send { events, .. } => events.identify.len() + events.track.len(),
        Content::Skip { .. } => 0,
    }
}
