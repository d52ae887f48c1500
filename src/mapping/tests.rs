mod properties;

use super::*;
use crate::{
    event::{EventType, MAX_EVENT_BYTES, build, message_id},
    integration::Revision,
    proto::{self, AttributeValue, Credential, StringList, attribute_value::Kind},
};

fn map<'a>(
    integration: &'a Integration,
    capture: &'a proto::Capture,
    received: UnixMillis,
) -> Result<Mapped<'a>, CaptureFault> {
    super::map(integration, capture.into(), received)
}

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

fn spec() -> proto::Integration {
    proto::Integration {
        integration_id: "acme".into(),
        credentials: vec![Credential {
            data_region: DataRegion::NonEu.into(),
            write_key: "write-key-1234567890".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn forwarding() -> proto::Integration {
    proto::Integration {
        unmapped_attributes: proto::UnmappedAttributes::Forward.into(),
        ..spec()
    }
}

fn integration(spec: &proto::Integration) -> Integration {
    let revision = Revision {
        etag: String::new(),
        mapping_version: 1,
        create_time: NOW,
        update_time: NOW,
        read_only: false,
        ..Revision::default()
    };
    Integration::new(spec, revision).expect("a valid specification")
}

fn value(kind: Kind) -> AttributeValue {
    AttributeValue { kind: Some(kind) }
}

fn text(text: &str) -> AttributeValue {
    value(Kind::StringValue(text.into()))
}

fn worked_example() -> proto::Capture {
    proto::Capture {
        email: "test@aol.com".into(),
        campaign_id: "n3zrik6g".into(),
        campaign_name: "New Quiz".into(),
        session_id: "y2P5ks05mqzGsdkIGjbQ".into(),
        traffic_source: "Owned+Web".into(),
        occur_time: Some(prost_types::Timestamp {
            seconds: 1_615_507_200,
            nanos: 0,
        }),
        attributes: [
            ("attribute_id_2".to_owned(), text("attribute_value_2")),
            ("attribute_id_1".to_owned(), text("attribute_value_1")),
        ]
        .into(),
        ..Default::default()
    }
}

fn reasons(spec: &proto::Integration, capture: &proto::Capture) -> Vec<(String, &'static str)> {
    match map(&integration(spec), capture, NOW) {
        Ok(_) => Vec::new(),
        Err(CaptureFault::Invalid(found)) => {
            found.into_iter().map(|v| (v.field, v.reason)).collect()
        }
        Err(other) => panic!("{other:?}"),
    }
}

fn refused(spec: &proto::Integration, capture: &proto::Capture, field: &str, reason: &str) {
    let found = reasons(spec, capture);
    assert!(
        found.iter().any(|(f, r)| f == field && *r == reason),
        "{field} {reason} is missing in {found:?}"
    );
}

/// The event as text with its `messageId` taken out of the place after
/// `context` (and `event`), and laid out like the vectors.
fn without_message_id(json: &[u8]) -> String {
    let mut event: serde_json::Value = serde_json::from_slice(json).expect("JSON");
    let fields = event.as_object_mut().expect("an object");
    let id = fields.shift_remove("messageId").expect("a messageId");
    assert!(id.as_str().is_some_and(|id| id.len() < 100));
    serde_json::to_string_pretty(&event).expect("JSON")
}

#[test]
fn the_worked_example_equals_the_vectors_in_everything_but_message_id() {
    let integration = integration(&forwarding());
    let capture = worked_example();
    let mapped = map(&integration, &capture, NOW).expect("valid");
    let events = build(integration.id(), &mapped)
        .expect("small")
        .expect("events");
    assert_eq!(
        without_message_id(&events.identify),
        include_str!("../../tests/vectors/identify.json").trim_end()
    );
    assert_eq!(
        without_message_id(&events.track),
        include_str!("../../tests/vectors/track.json").trim_end()
    );
}

#[test]
fn every_broken_rule_is_told_at_once() {
    let capture = proto::Capture {
        capture_id: "c".repeat(65),
        email: "not an address".into(),
        campaign_id: String::new(),
        campaign_name: "n".repeat(1_025),
        session_id: "s\u{7}".into(),
        occur_time: Some(prost_types::Timestamp {
            seconds: 1_615_507_200_000,
            nanos: 0,
        }),
        data_region: 9,
        attributes: [("nan".to_owned(), value(Kind::NumberValue(f64::NAN)))].into(),
        consent: [(String::new(), true)].into(),
        ..Default::default()
    };
    for (field, reason) in [
        ("capture.capture_id", "TOO_LONG"),
        ("capture.email", "INVALID_EMAIL"),
        ("capture.campaign_id", "REQUIRED"),
        ("capture.campaign_name", "TOO_LONG"),
        ("capture.session_id", "CONTROL_CHARACTER"),
        ("capture.occur_time", "OUT_OF_RANGE"),
        ("capture.data_region", "UNKNOWN_VALUE"),
        ("capture.attributes[\"nan\"]", "NOT_FINITE"),
        ("capture.consent[\"\"]", "REQUIRED"),
    ] {
        refused(&spec(), &capture, field, reason);
    }
}

#[test]
fn values_without_a_json_form_or_with_control_characters_are_refused() {
    for (bad, reason) in [
        (value(Kind::NumberValue(f64::INFINITY)), "NOT_FINITE"),
        (AttributeValue { kind: None }, "VALUE_MISSING"),
        (text("bell\u{7}"), "CONTROL_CHARACTER"),
        (
            value(Kind::ListValue(StringList {
                values: vec!["\0".into()],
            })),
            "CONTROL_CHARACTER",
        ),
        (
            value(Kind::ListValue(StringList {
                values: vec![String::new(); 1_001],
            })),
            "TOO_MANY",
        ),
        (
            value(Kind::TimestampValue(prost_types::Timestamp {
                seconds: 0,
                nanos: -1,
            })),
            "OUT_OF_RANGE",
        ),
    ] {
        let mut capture = worked_example();
        capture.attributes.insert("a".into(), bad);
        refused(&spec(), &capture, "capture.attributes[\"a\"]", reason);
    }
    let mut lines = worked_example();
    lines
        .attributes
        .insert("a".into(), text("tab\tand\r\nline"));
    assert_eq!(reasons(&spec(), &lines), []);
}

#[test]
fn attributes_are_bounded_in_number_and_the_events_in_size() {
    let mut many = worked_example();
    many.attributes = (0..=MAX_ATTRIBUTES)
        .map(|i| (i.to_string(), text("v")))
        .collect();
    refused(&spec(), &many, "capture.attributes", "TOO_MANY");

    let forward = integration(&forwarding());
    let mut large = worked_example();
    large
        .attributes
        .insert("essay".into(), text(&"x".repeat(MAX_EVENT_BYTES)));
    let mapped = map(&forward, &large, NOW).expect("valid");
    let found = build(forward.id(), &mapped).expect_err("too large");
    assert_eq!(found[0].reason, "EVENT_TOO_LARGE");
    assert!(
        found[0]
            .description
            .contains("[\"essay\"] with 32770 bytes"),
        "{found:?}"
    );
}

#[test]
fn mapped_attributes_are_renamed_typed_targeted_and_required() {
    let mut spec = spec();
    spec.mappings = vec![
        proto::FieldMapping {
            attribute_id: "first".into(),
            segment_key: "firstName".into(),
            required: true,
            targets: vec![proto::EventType::Identify.into()],
            ..Default::default()
        },
        proto::FieldMapping {
            attribute_id: "count".into(),
            value_type: proto::ValueType::Number.into(),
            targets: vec![proto::EventType::Track.into()],
            ..Default::default()
        },
    ];
    let mut capture = worked_example();
    refused(&spec, &capture, "capture.attributes[\"first\"]", "REQUIRED");
    capture
        .attributes
        .insert("first".into(), value(Kind::BoolValue(true)));
    refused(
        &spec,
        &capture,
        "capture.attributes[\"first\"]",
        "RESERVED_TRAIT",
    );
    capture.attributes.insert("first".into(), text("Ada"));
    capture.attributes.insert("count".into(), text("7"));
    refused(
        &spec,
        &capture,
        "capture.attributes[\"count\"]",
        "WRONG_TYPE",
    );
    capture
        .attributes
        .insert("count".into(), value(Kind::IntegerValue(7)));

    let integration = integration(&spec);
    let mapped = map(&integration, &capture, NOW).expect("valid");
    let events = build(integration.id(), &mapped)
        .expect("small")
        .expect("events");
    let identify: serde_json::Value = serde_json::from_slice(&events.identify).expect("JSON");
    let track: serde_json::Value = serde_json::from_slice(&events.track).expect("JSON");
    assert_eq!(identify["traits"]["firstName"], "Ada");
    assert_eq!(identify["traits"].get("count"), None);
    assert_eq!(
        track["properties"]["questions"],
        serde_json::json!({"count": 7})
    );
}

#[test]
fn unmapped_attributes_are_dropped_rejected_or_forwarded() {
    let capture = worked_example();
    let dropping = integration(&spec());
    assert!(
        map(&dropping, &capture, NOW)
            .expect("valid")
            .fields
            .is_empty()
    );
    let rejecting = proto::Integration {
        unmapped_attributes: proto::UnmappedAttributes::Reject.into(),
        ..spec()
    };
    refused(
        &rejecting,
        &capture,
        "capture.attributes[\"attribute_id_1\"]",
        "UNMAPPED_ATTRIBUTE",
    );

    let mut conflicting = worked_example();
    conflicting.attributes.insert("email".into(), text("x"));
    conflicting.attributes.insert("age".into(), text("old"));
    conflicting
        .attributes
        .insert("birthday".into(), text("1990-02-30"));
    let found = reasons(&forwarding(), &conflicting);
    assert_eq!(
        found,
        [
            ("capture.attributes[\"age\"]".to_owned(), "RESERVED_TRAIT"),
            (
                "capture.attributes[\"birthday\"]".to_owned(),
                "RESERVED_TRAIT"
            ),
            ("capture.attributes[\"email\"]".to_owned(), "KEY_CONFLICT"),
        ]
    );
    conflicting.attributes = [("birthday".to_owned(), text("1990-02-28"))].into();
    assert_eq!(reasons(&forwarding(), &conflicting), []);
}

#[test]
fn privacy_hashes_or_drops_a_value_before_it_reaches_an_event() {
    let mut spec = spec();
    let mapping = |id: &str, privacy: proto::Privacy| proto::FieldMapping {
        attribute_id: id.into(),
        privacy: privacy.into(),
        ..Default::default()
    };
    spec.mappings = vec![
        mapping("hashed", proto::Privacy::Hash),
        mapping("dropped", proto::Privacy::Drop),
        mapping("list", proto::Privacy::Hash),
    ];
    let mut capture = worked_example();
    capture.attributes = [
        ("hashed".to_owned(), text("test@aol.com")),
        ("dropped".to_owned(), text("planted-secret")),
        (
            "list".to_owned(),
            value(Kind::ListValue(StringList {
                values: vec!["abc".into()],
            })),
        ),
    ]
    .into();
    let integration = integration(&spec);
    let mapped = map(&integration, &capture, NOW).expect("valid");
    let events = build(integration.id(), &mapped)
        .expect("small")
        .expect("events");
    let track = String::from_utf8(events.track).expect("UTF-8");
    // printf %s test@aol.com | sha256sum; printf %s abc | sha256sum
    assert!(track.contains(
        r#""questions":{"hashed":"f320794388bf29dabc846c54fe7ff28f78fc3bc3c13748783335a9bf33440d55","list":["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"]}"#
    ), "{track}");
    assert!(!track.contains("planted-secret") && !track.contains("dropped"));
}

#[test]
fn the_address_is_hashed_in_the_form_that_the_integration_wants() {
    let lower = integration(&spec());
    let exact = integration(&proto::Integration {
        email_normalization: proto::EmailNormalization::Exact.into(),
        ..spec()
    });
    let mut capture = worked_example();
    capture.email = "  Test@AOL.com ".into();
    let subject = map(&lower, &capture, NOW)
        .expect("valid")
        .subject
        .expect("a subject");
    assert_eq!(subject.email, "Test@AOL.com");
    assert!(subject.user_id.starts_with("f320794388bf"));
    assert!(!format!("{subject:?}").contains("AOL"));
    assert!(matches!(
        map(&exact, &capture, NOW),
        Err(CaptureFault::Invalid(_))
    ));
    capture.email = "Test@AOL.com".into();
    let subject = map(&exact, &capture, NOW)
        .expect("valid")
        .subject
        .expect("a subject");
    // printf %s Test@AOL.com | sha256sum
    assert!(!subject.user_id.starts_with("f320794388bf"));
    assert_eq!(subject.user_id.len(), 64);
}

#[test]
fn addresses_that_are_none_are_refused_and_no_address_is_no_subject() {
    for bad in [
        "a",
        "a@b",
        "@b.com",
        "a@",
        "a b@c.com",
        "a@b..com",
        "a@[127.0.0.1]",
        "Ada <a@b.com>",
        "a@b.com\u{0}",
        "a@b.com,c@d.com",
        &format!("{}@b.com", "l".repeat(65)),
        &format!("l@{}.com", "d.".repeat(125)),
    ] {
        let capture = proto::Capture {
            email: bad.into(),
            ..worked_example()
        };
        refused(&spec(), &capture, "capture.email", "INVALID_EMAIL");
    }
    for none in ["", "  "] {
        let capture = proto::Capture {
            email: none.into(),
            ..worked_example()
        };
        let integration = integration(&spec());
        let mapped = map(&integration, &capture, NOW).expect("valid");
        assert!(mapped.subject.is_none());
        assert_eq!(
            build(integration.id(), &mapped).expect("nothing to refuse"),
            None
        );
    }
}

#[test]
fn the_region_is_the_only_one_or_the_one_that_is_named() {
    let asked = |spec: &proto::Integration, region: DataRegion| {
        let capture = proto::Capture {
            data_region: region.into(),
            ..worked_example()
        };
        map(&integration(spec), &capture, NOW).map(|mapped| mapped.region)
    };
    assert_eq!(asked(&spec(), DataRegion::Unspecified), Ok(Region::NonEu));
    assert_eq!(
        asked(&spec(), DataRegion::Eu),
        Err(CaptureFault::RegionNotConfigured(Region::Eu))
    );
    let mut both = spec();
    both.credentials.push(Credential {
        data_region: DataRegion::Eu.into(),
        write_key: "eu-key".into(),
        ..Default::default()
    });
    assert_eq!(
        asked(&both, DataRegion::Unspecified),
        Err(CaptureFault::RegionAmbiguous)
    );
    assert_eq!(asked(&both, DataRegion::Eu), Ok(Region::Eu));
}

#[test]
fn occur_time_is_kept_cut_to_milliseconds_or_is_the_time_of_receipt() {
    let at = |time| {
        let capture = proto::Capture {
            occur_time: time,
            ..worked_example()
        };
        map(&integration(&spec()), &capture, NOW).map(|mapped| mapped.occur_time)
    };
    let time = |seconds, nanos| Some(prost_types::Timestamp { seconds, nanos });
    assert_eq!(at(None), Ok(NOW));
    assert_eq!(
        at(time(1_615_507_200, 1_999_999)),
        Ok(UnixMillis(1_615_507_200_001))
    );
    let day_ahead = NOW.0 / 1_000 + 86_400;
    assert!(at(time(day_ahead, 0)).is_ok());
    for bad in [
        time(day_ahead, 1_000_000),
        time(946_684_799, 0),
        time(1_615_507_200, 1_000_000_000),
    ] {
        assert!(at(bad).is_err());
    }
}

#[test]
fn consent_travels_in_both_events() {
    let mut capture = worked_example();
    capture.consent = [("ads".to_owned(), false), ("analytics".to_owned(), true)].into();
    let integration = integration(&spec());
    let mapped = map(&integration, &capture, NOW).expect("valid");
    let events = build(integration.id(), &mapped)
        .expect("small")
        .expect("events");
    for event in EventType::ALL {
        let json: serde_json::Value = serde_json::from_slice(events.get(event)).expect("JSON");
        assert_eq!(
            json["context"]["consent"]["categoryPreferences"],
            serde_json::json!({"ads": false, "analytics": true})
        );
    }
}
