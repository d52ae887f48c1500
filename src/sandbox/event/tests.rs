use super::*;

const IDENTIFY: &str = r#"{"context":{"externalIds":[{"collection":"users","encoding":"none",
    "id":"f320794388bf29dabc846c54fe7ff28f78fc3bc3c13748783335a9bf33440d55","type":"emailSha256Hash"}]},
    "timestamp":"2021-03-12T00:00:00.000Z","traits":{"email":"test@aol.com","attribute_id_1":"v"},
    "type":"identify","messageId":"m-1",
    "userId":"f320794388bf29dabc846c54fe7ff28f78fc3bc3c13748783335a9bf33440d55"}"#;

/// A track event; `extra` begins with a comma and may repeat a field, which then wins.
fn track(extra: &str) -> String {
    format!(
        r#"{{"type":"track","event":"Survey Completed","userId":"u","messageId":"m",
        "timestamp":"2021-03-12T00:00:00.000Z","properties":{{"questions":{{"a":1}}}}{extra}}}"#
    )
}

fn reason(event: &str) -> Option<DropReason> {
    check_event(event)
        .verdict
        .err()
        .map(|dropped| dropped.reason)
}

/// What an event without a repeated field of its own is warned about.
fn warnings(event: &str) -> Vec<&'static str> {
    let mut warnings = check_event(event).warnings;
    warnings.retain(|warning| *warning != "repeated_field");
    warnings
}

#[test]
fn fine_events_are_taken_without_a_remark() {
    for event in [IDENTIFY, &track("")] {
        let checked = check_event(event);
        assert_eq!(checked.verdict, Ok(()));
        assert_eq!(checked.warnings, [] as [&str; 0]);
    }
    assert_eq!(check_event(IDENTIFY).message_id.as_deref(), Some("m-1"));
}

#[test]
fn types_other_than_identify_and_track_are_dropped() {
    for event in [
        r#"{"userId":"u"}"#,
        &track(r#","type":"page""#),
        &track(r#","type":"Track""#),
        &track(r#","type":7"#),
        &track(r#","type":null"#),
        "7",
        "[]",
        "null",
    ] {
        assert_eq!(reason(event), Some(DropReason::TypeNotSupported), "{event}");
    }
}

#[test]
fn one_of_two_ids_is_needed() {
    for event in [
        r#"{"type":"identify"}"#,
        r#"{"type":"identify","userId":null,"anonymousId":null}"#,
    ] {
        assert_eq!(reason(event), Some(DropReason::NoUserAnonId), "{event}");
    }
    assert_eq!(reason(r#"{"type":"identify","anonymousId":"a"}"#), None);
}

#[test]
fn ids_are_strings_with_something_in_them() {
    for extra in [
        r#","userId":"""#,
        r#","userId":7"#,
        r#","userId":{}"#,
        r#","anonymousId":"""#,
        r#","anonymousId":false"#,
    ] {
        assert_eq!(
            reason(&track(extra)),
            Some(DropReason::IdNotString),
            "{extra}"
        );
    }
}

#[test]
fn track_events_need_a_name() {
    for extra in [r#","event":null"#, r#","event":"""#] {
        assert_eq!(reason(&track(extra)), Some(DropReason::EventNotDefined));
    }
    let without = r#"{"type":"track","userId":"u"}"#;
    assert_eq!(reason(without), Some(DropReason::EventNotDefined));
    for extra in [r#","event":7"#, r#","event":["a"]"#] {
        assert_eq!(reason(&track(extra)), Some(DropReason::EventNotString));
    }
    // An identify event has no name.
    assert_eq!(
        reason(r#"{"type":"identify","userId":"u","event":7}"#),
        None
    );
}

#[test]
fn properties_and_traits_are_objects() {
    for value in ["[]", "null", r#""a""#, "1", "true"] {
        let properties = track(&format!(r#","properties":{value}"#));
        assert_eq!(reason(&properties), Some(DropReason::PropertiesNotObject));
        let traits = track(&format!(r#","traits":{value}"#));
        assert_eq!(reason(&traits), Some(DropReason::TraitsNotObject));
    }
}

#[test]
fn consent_is_an_object_of_booleans() {
    let with = |consent: &str| track(&format!(r#","context":{{"consent":{consent}}}"#));
    for consent in [
        r#"{"categoryPreferences":{"a":"true"}}"#,
        r#"{"categoryPreferences":{"a":true,"b":1}}"#,
        r#"{"categoryPreferences":["a"]}"#,
        r#"{"categoryPreferences":null}"#,
        r#"{"categoryPreferences":true}"#,
        r#"[{"a":true}]"#,
        "true",
    ] {
        let event = with(consent);
        assert_eq!(
            reason(&event),
            Some(DropReason::ConsentNotValid),
            "{consent}"
        );
    }
    for consent in [
        r#"{"categoryPreferences":{"a":true,"b\u0041":false}}"#,
        r#"{"categoryPreferences":{}}"#,
        "null",
    ] {
        assert_eq!(reason(&with(consent)), None, "{consent}");
        assert!(warnings(&with(consent)).is_empty());
    }
    assert_eq!(
        warnings(&with("{}")),
        ["consent_without_category_preferences"]
    );
    assert_eq!(warnings(&track(r#","context":[]"#)), ["context_not_object"]);
}

#[test]
fn timestamps_are_iso_8601() {
    for time in [
        r#""yesterday""#,
        r#""2021-02-30T00:00:00.000Z""#,
        r#""2021-03-12 00:00:00Z""#,
        r#""2021-03-12T00:00:00Z[UTC]""#,
        r#""""#,
        "1615507200000",
        "null",
    ] {
        let event = track(&format!(r#","timestamp":{time}"#));
        assert_eq!(reason(&event), Some(DropReason::TimestampInvalid), "{time}");
    }
    for time in [
        "2021-03-12T01:00:00.000+01:00",
        "2021-03-12T00:00:00Z",
        "2021-03-12",
    ] {
        let event = track(&format!(r#","timestamp":"{time}""#));
        assert_eq!(reason(&event), None, "{time}");
        assert_eq!(warnings(&event), ["timestamp_not_utc_millis"], "{time}");
    }
    let without = r#"{"type":"identify","userId":"u","messageId":"m"}"#;
    assert_eq!(reason(without), None);
    assert_eq!(warnings(without), ["no_timestamp"]);
}

#[test]
fn message_ids_have_fewer_than_100_characters() {
    let with = |id: &str| track(&format!(r#","messageId":{id}"#));
    let of_length = |chars: usize| with(&format!(r#""{}""#, "ü".repeat(chars)));
    assert_eq!(reason(&of_length(99)), None);
    assert_eq!(reason(&of_length(100)), Some(DropReason::MessageIdTooLong));
    for id in [r#""""#, "null"] {
        assert_eq!(reason(&with(id)), None);
        assert_eq!(warnings(&with(id)), ["no_message_id"]);
    }
    assert_eq!(warnings(&with("7")), ["message_id_not_string"]);
    assert_eq!(check_event(&with("7")).message_id, None);
}

#[test]
fn events_have_at_most_32768_bytes() {
    let empty = track(r#","x":"""#).len();
    let of_bytes = |bytes: usize| track(&format!(r#","x":"{}""#, "x".repeat(bytes - empty)));
    assert_eq!(of_bytes(MAX_EVENT_BYTES).len(), 32_768);
    assert_eq!(reason(&of_bytes(MAX_EVENT_BYTES)), None);
    assert_eq!(
        reason(&of_bytes(MAX_EVENT_BYTES + 1)),
        Some(DropReason::EventTooLarge)
    );
}

#[test]
fn more_than_10000_properties_are_remarked_on() {
    let with = |count: usize| {
        let members: Vec<String> = (0..count).map(|index| format!(r#""{index}":0"#)).collect();
        track(&format!(r#","properties":{{{}}}"#, members.join(",")))
    };
    assert!(!warnings(&with(10_000)).contains(&"properties_truncated"));
    assert!(warnings(&with(10_001)).contains(&"properties_truncated"));
}

#[test]
fn reserved_traits_of_the_wrong_type_are_remarked_on() {
    let with = |name: &str, value: &str| {
        format!(
            r#"{{"type":"identify","userId":"u","messageId":"m",
            "timestamp":"2021-03-12T00:00:00.000Z","traits":{{"{name}":{value}}}}}"#
        )
    };
    let texts =
        "avatar description email firstName gender id lastName name phone title username website";
    let mut cases: Vec<(&str, &str, &str)> = vec![
        ("age", "7.5", r#""7""#),
        ("birthday", r#""2021-03-12""#, r#""soon""#),
        ("createdAt", r#""2021-03-12T00:00:00.000Z""#, "1615507200"),
        ("address", "{}", r#""Street 1""#),
        ("company", r#"{"name":"a"}"#, "[]"),
    ];
    cases.extend(texts.split(' ').map(|name| (name, r#""text""#, "7")));
    for (name, right, wrong) in cases {
        assert!(warnings(&with(name, right)).is_empty(), "{name}");
        assert!(warnings(&with(name, "null")).is_empty(), "{name}");
        let found = warnings(&with(name, wrong));
        assert_eq!(found.len(), 1, "{name}");
        assert!(
            found[0].starts_with(&format!("trait_type: {name} is a")),
            "{found:?}"
        );
        assert_eq!(reason(&with(name, wrong)), None, "{name}");
    }
    // Properties have no reserved names.
    assert!(warnings(&track(r#","properties":{"age":"7"}"#)).is_empty());
}

#[test]
fn repeated_fields_are_remarked_on_and_the_last_counts() {
    let checked_user = track(r#","userId":"""#);
    assert_eq!(reason(&checked_user), Some(DropReason::IdNotString));
    assert_eq!(check_event(&checked_user).warnings, ["repeated_field"]);
    for extra in [
        r#","properties":{"a":1,"a":2}"#,
        r#","properties":{"questions":{"a":1,"a":2}}"#,
        r#","traits":{"a":1,"a":2}"#,
    ] {
        let found = warnings(&track(extra));
        assert_eq!(found, ["repeated_field_in_properties_or_traits"], "{extra}");
    }
}

#[test]
fn what_strict_readers_refuse_is_dropped_and_not_a_panic() {
    for extra in [r#","userId":"\ud800""#, r#","properties":{"a":1e999}"#] {
        let checked = track(extra);
        let dropped = check_event(&checked).verdict.expect_err(extra);
        assert_eq!(dropped.reason, DropReason::TypeNotSupported);
        assert!(dropped.detail.contains("surrogate"));
    }
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    assert_eq!(
        reason(&track(&format!(r#","properties":{{"a":{deep}}}"#))),
        None
    );
}
