//! Decoding beside prost's own.

use proptest::prelude::*;

use super::*;
use crate::proto::{AttributeValue, CaptureRequest, StringList};

fn key(number: u32, wire: u32) -> Vec<u8> {
    varint(u64::from(number << 3 | wire))
}

fn varint(value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_varint(value, &mut bytes);
    bytes
}

fn delimited(number: u32, content: &[u8]) -> Vec<u8> {
    [&*key(number, 2), &*varint(content.len() as u64), content].concat()
}

/// Groups of unknown fields, nested so deep.
fn groups(depth: usize) -> Vec<u8> {
    [key(15, 3).repeat(depth), key(15, 4).repeat(depth)].concat()
}

/// The field in which a request has its capture.
const CAPTURE: u32 = 2;

/// Fields with numbers that the message at this level of a capture has, or nearly has.
fn fields(level: usize) -> BoxedStrategy<Vec<u8>> {
    let numbers = [11_u32, 3, 7, 3][level];
    let number = || 1..=numbers;
    let bytes = |length: std::ops::Range<usize>| prop::collection::vec(any::<u8>(), length);
    let text = prop_oneof![
        4 => "\\PC{0,6}".prop_map(String::into_bytes),
        1 => bytes(0..6),
    ];
    let field = prop_oneof![
        6 => (number(), text).prop_map(|(number, text)| delimited(number, &text)),
        2 => (number(), any::<u64>()).prop_map(|(number, value)| [key(number, 0), varint(value)].concat()),
        1 => (number(), bytes(1..12)).prop_map(|(number, odd)| [key(number, 0), odd].concat()),
        1 => (number(), bytes(8..9)).prop_map(|(number, value)| [key(number, 1), value].concat()),
        1 => (number(), bytes(4..5)).prop_map(|(number, value)| [key(number, 5), value].concat()),
        1 => (0..20_u32, 0..8_u32, bytes(0..4)).prop_map(|(number, wire, odd)| [key(number, wire), odd].concat()),
    ];
    let field = if level == 3 {
        field.boxed()
    } else {
        let entry = if level == 0 { 7..=10 } else { 1..=numbers };
        prop_oneof![
            2 => field,
            2 => (entry, fields(level + 1)).prop_map(|(number, inner)| delimited(number, &inner)),
            1 => (12..14_u32, 12..14_u32, fields(level + 1))
                .prop_map(|(start, end, inner)| [key(start, 3), inner, key(end, 4)].concat()),
        ]
        .boxed()
    };
    prop::collection::vec(field, 0..5)
        .prop_map(|fields| fields.concat())
        .boxed()
}

fn any_value() -> impl Strategy<Value = AttributeValue> {
    let time =
        (any::<i64>(), any::<i32>()).prop_map(|(seconds, nanos)| Timestamp { seconds, nanos });
    let kind = prop_oneof![
        any::<String>().prop_map(Kind::StringValue),
        any::<f64>().prop_map(Kind::NumberValue),
        any::<i64>().prop_map(Kind::IntegerValue),
        any::<bool>().prop_map(Kind::BoolValue),
        prop_oneof![Just(Timestamp::default()), time].prop_map(Kind::TimestampValue),
        prop::collection::vec(any::<String>(), 0..4)
            .prop_map(|values| Kind::ListValue(StringList { values })),
    ];
    prop::option::of(kind).prop_map(|kind| AttributeValue { kind })
}

fn any_request() -> impl Strategy<Value = CaptureRequest> {
    let text = || prop_oneof![Just(String::new()), any::<String>()];
    let texts = (text(), text(), text(), text(), text(), text());
    let time = prop::option::of((any::<i64>(), any::<i32>()));
    let attributes = prop::collection::btree_map(".{0,3}", any_value(), 0..6);
    let consent = prop::collection::btree_map(".{0,3}", any::<bool>(), 0..4);
    (texts, time, any::<i32>(), attributes, consent).prop_map(
        |(texts, time, data_region, attributes, consent)| CaptureRequest {
            integration_id: "acme".into(),
            capture: Some(proto::Capture {
                capture_id: texts.0,
                email: texts.1,
                campaign_id: texts.2,
                campaign_name: texts.3,
                session_id: texts.4,
                traffic_source: texts.5,
                occur_time: time.map(|(seconds, nanos)| Timestamp { seconds, nanos }),
                data_region,
                attributes,
                consent,
            }),
            wait_for: 0,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_capture_that_prost_encodes_is_decoded_as_it_was(request in any_request()) {
        let bytes = request.encode_to_vec();
        prop_assert!(check_against_prost(&bytes), "taken");
    }

    #[test]
    fn damaged_bytes_are_taken_or_refused_as_prost_does(
        request in any_request(),
        places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
        doubled in any::<bool>(),
    ) {
        let mut bytes = request.encode_to_vec();
        let _ = check_against_prost(&bytes[..cut.index(bytes.len())]);
        for (place, byte) in places {
            let place = place.index(bytes.len());
            bytes[place] ^= byte;
        }
        if doubled {
            bytes = bytes.repeat(2);
        }
        let _ = check_against_prost(&bytes);
    }

    #[test]
    fn any_fields_in_any_order_are_taken_or_refused_as_prost_does(
        pieces in prop::collection::vec(fields(0), 1..3),
    ) {
        let bytes: Vec<u8> = pieces.iter().flat_map(|piece| delimited(CAPTURE, piece)).collect();
        let _ = check_against_prost(&bytes);
    }
}

#[test]
fn unknown_groups_may_be_nested_as_deep_as_prost_lets_them() {
    for depth in 90..=101 {
        let unknown = groups(depth);
        let in_value = delimited(2, &unknown);
        let in_time = delimited(2, &delimited(5, &unknown));
        let in_list = delimited(2, &delimited(6, &unknown));
        let own_time = delimited(7, &unknown);
        let places = [&unknown, &in_value, &in_time, &in_list];
        let mut taken = Vec::new();
        for entry in places {
            taken.push(check_against_prost(&delimited(
                CAPTURE,
                &delimited(9, entry),
            )));
        }
        for content in [&unknown, &own_time, &delimited(10, &unknown)] {
            taken.push(check_against_prost(&delimited(CAPTURE, content)));
        }
        assert_eq!(taken.contains(&true), depth <= 99, "{depth}");
        assert_eq!(taken.contains(&false), depth > 96, "{depth}");
    }
}

#[test]
fn what_comes_twice_is_merged_and_of_a_key_the_last_value_stays() {
    let text = |number, text: &str| delimited(number, text.as_bytes());
    let list = |texts: &[&str]| {
        let values: Vec<u8> = texts.iter().flat_map(|one| text(1, one)).collect();
        delimited(2, &delimited(6, &values))
    };
    let entry = |id: &str, value: &[u8]| delimited(9, &[text(1, id), value.to_vec()].concat());
    let first = [
        text(2, "old@example.com"),
        delimited(7, &[key(1, 0), varint(7)].concat()),
        entry("b", &list(&["x"])),
        entry("a", &[list(&["x"]), list(&["y", "z"])].concat()),
    ]
    .concat();
    let second = [
        text(2, "new@example.com"),
        delimited(7, &[key(2, 0), varint(9)].concat()),
        entry("b", &delimited(2, &text(1, "last"))),
    ]
    .concat();
    let decoded = decode([&*first, &*second]).expect("well-formed");
    let attribute = |id, answer| Attribute {
        id,
        answer: Some(answer),
    };
    assert_eq!(decoded.email, "new@example.com");
    assert_eq!(
        decoded.occur_time,
        Some(Timestamp {
            seconds: 7,
            nanos: 9
        })
    );
    assert_eq!(
        decoded.attributes(),
        [
            attribute("a", Answer::List(vec!["x", "y", "z"])),
            attribute("b", Answer::Text("last")),
        ]
    );
    let twice = [delimited(CAPTURE, &first), delimited(CAPTURE, &second)].concat();
    assert!(check_against_prost(&twice));
}

#[test]
fn nothing_that_people_said_is_printed() {
    let capture = Capture {
        email: "planted",
        attributes: vec![Attribute {
            id: "a",
            answer: Some(Answer::List(vec!["planted"])),
        }],
        ..Capture::default()
    };
    let printed = format!("{capture:?} {:?}", capture.attributes());
    assert!(!printed.contains("planted"), "{printed}");
}
