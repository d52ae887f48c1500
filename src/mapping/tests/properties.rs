//! What holds for any capture.

use proptest::prelude::*;

use super::*;
use crate::integration::IntegrationId;

fn any_kind() -> impl Strategy<Value = AttributeValue> {
    let time = (any::<i64>(), any::<i32>())
        .prop_map(|(seconds, nanos)| prost_types::Timestamp { seconds, nanos });
    prop_oneof![
        any::<String>().prop_map(Kind::StringValue),
        any::<f64>().prop_map(Kind::NumberValue),
        any::<i64>().prop_map(Kind::IntegerValue),
        any::<bool>().prop_map(Kind::BoolValue),
        time.prop_map(Kind::TimestampValue),
        prop::collection::vec(any::<String>(), 0..4)
            .prop_map(|values| Kind::ListValue(StringList { values })),
    ]
    .prop_map(value)
}

proptest! {
    #[test]
    fn whatever_comes_is_either_refused_or_becomes_two_valid_events(
        capture_id in prop_oneof![Just(String::new()), any::<String>()],
        session in "\\PC{0,20}",
        name in any::<String>(),
        attributes in prop::collection::btree_map("\\PC{1,12}", any_kind(), 0..6),
    ) {
        let capture = proto::Capture {
            capture_id, session_id: session, campaign_name: name, attributes,
            ..worked_example()
        };
        let integration = integration(&forwarding());
        let Ok(mapped) = map(&integration, &capture, NOW) else { return Ok(()) };
        let events = build(integration.id(), &mapped).expect("small").expect("events");
        for event in EventType::ALL {
            let json: serde_json::Value = serde_json::from_slice(events.get(event)).expect("JSON");
            prop_assert_eq!(&json["type"], event.name());
            let id = message_id(integration.id(), &mapped.capture_id, event);
            prop_assert_eq!(&json["messageId"], id.as_str());
            prop_assert!(id.len() < 100);
        }
        let again = map(&integration, &capture, NOW).expect("still valid");
        prop_assert_eq!(build(integration.id(), &again).expect("small"), Some(events));
    }

    #[test]
    fn no_violation_repeats_a_value(secret in "[a-z]{12,20}") {
        let planted = format!("planted{secret}");
        let capture = proto::Capture {
            email: planted.clone(),
            session_id: format!("{planted}\n"),
            campaign_name: format!("{planted}\n"),
            attributes: [("a".to_owned(), text(&format!("{planted}\u{1}")))].into(),
            ..worked_example()
        };
        let fault = map(&integration(&spec()), &capture, NOW).expect_err("several faults");
        let told = format!("{fault:?}");
        prop_assert!(!told.contains(&planted));
    }

    #[test]
    fn message_ids_differ_between_captures_and_types(a in "\\PC{1,20}", b in "\\PC{1,20}") {
        let id = IntegrationId::new("acme").expect("valid");
        let of = |capture: &str, event| message_id(&id, capture, event);
        prop_assert_ne!(of(&a, EventType::Identify), of(&a, EventType::Track));
        prop_assert_eq!(crate::event::message_ids(&id, &a), EventType::ALL.map(|event| of(&a, event)));
        prop_assert_eq!(a == b, of(&a, EventType::Track) == of(&b, EventType::Track));
    }
}
