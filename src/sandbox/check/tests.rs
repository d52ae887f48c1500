use super::*;

const EVENT: &str = r#"{"type":"identify","userId":"u","messageId":"m"}"#;
const NOW: &str = "2021-03-12T00:00:00.000Z";

/// `Basic base64("key:")`.
fn basic(key: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{key}:")))
}

fn check<'a>(
    authorization: Option<&'a str>,
    body: &'a str,
    keys: &[(Region, &str)],
) -> Result<CheckedBatch<'a>, NotABatch> {
    let keys = keys
        .iter()
        .map(|(region, key)| (*region, (*key).to_owned()));
    let request = BatchRequest {
        region: Region::NonEu,
        authorization,
        body,
        now: NOW.parse().expect("a time"),
    };
    check_batch(&request, &Keys::new(keys.collect()))
}

fn body(events: &[&str], rest: &str) -> String {
    format!(
        r#"{{"batch":[{}],"sentAt":"{NOW}"{rest}}}"#,
        events.join(",")
    )
}

fn whole(authorization: Option<&str>, body: &str, keys: &[(Region, &str)]) -> Option<Dropped> {
    check(authorization, body, keys).expect("a batch").whole
}

fn unknown_source(detail: &'static str) -> Option<Dropped> {
    Some(Dropped {
        reason: DropReason::UnknownSource,
        detail,
    })
}

#[test]
fn only_json_objects_are_batches() {
    for body in [
        "",
        "x",
        "{",
        r#"{"batch":[}"#,
        r#"{"batch":[]} x"#,
        "{'a':1}",
    ] {
        assert_eq!(
            check(None, body, &[]).err(),
            Some(NotABatch::NotJson),
            "{body}"
        );
    }
    for body in ["[]", "7", "null", r#""a""#] {
        assert_eq!(
            check(None, body, &[]).err(),
            Some(NotABatch::NotAnObject),
            "{body}"
        );
    }
    assert!(check(None, " \n{ \"batch\" : [ {} ] } ", &[]).is_ok());
}

#[test]
fn events_are_taken_as_received_whitespace_included() {
    let spaced = r#"{ "type" : "identify", "userId":"u" }"#;
    let body = format!(r#"{{ "other": [1], "batch" : [ {spaced} , {EVENT} ], "writeKey":"k" }}"#);
    let batch = check(None, &body, &[]).expect("a batch");
    let texts: Vec<&str> = batch.events.iter().map(|event| event.text).collect();
    assert_eq!(texts, [spaced, EVENT]);
    assert_eq!(batch.total, 2);
    assert_eq!(batch.whole, None);
}

#[test]
fn empty_batches_are_dropped() {
    let auth = basic("k");
    for body in [
        r#"{"batch":[]}"#,
        "{}",
        r#"{"batch":null}"#,
        r#"{"batch":{}}"#,
        r#"{"batch":"a","writeKey":"k"}"#,
    ] {
        let dropped = whole(Some(&auth), body, &[]);
        assert_eq!(dropped, Some(DropReason::EmptyBatch.into()), "{body}");
    }
}

#[test]
fn more_than_2500_events_are_dropped_as_a_whole() {
    let auth = basic("k");
    let fits = body(&["{}"; 2_500], "");
    assert_eq!(whole(Some(&auth), &fits, &[]), None);
    let too_many = body(&["{}"; 2_501], "");
    let batch = check(Some(&auth), &too_many, &[]).expect("a batch");
    assert_eq!(batch.whole, Some(DropReason::TooManyEvents.into()));
    assert_eq!((batch.events.len(), batch.total), (0, 2_501));
}

#[test]
fn the_write_key_may_be_in_the_header_or_the_body() {
    let keys = [(Region::NonEu, "key")];
    let auth = basic("key");
    let with_key = body(&[EVENT], r#","writeKey":"key""#);
    let without = body(&[EVENT], "");
    assert_eq!(whole(Some(&auth), &without, &keys), None);
    assert_eq!(whole(None, &with_key, &keys), None);
    assert_eq!(whole(Some(&auth), &with_key, &keys), None);
    assert_eq!(whole(None, &without, &keys), unknown_source("no write key"));
    let other = basic("other");
    assert_eq!(
        whole(Some(&other), &with_key, &keys),
        unknown_source("Authorization and writeKey hold different write keys")
    );
}

#[test]
fn malformed_authorization_counts_as_none() {
    let no_colon = format!("Basic {}", STANDARD.encode("key"));
    let no_key = format!("Basic {}", STANDARD.encode(":"));
    let plain = body(&[EVENT], "");
    let with_key = body(&[EVENT], r#","writeKey":"key""#);
    for auth in ["", "Basic", "Basic !!", "Bearer abc", &no_colon, &no_key] {
        assert_eq!(
            whole(Some(auth), &plain, &[]),
            unknown_source("no write key"),
            "{auth}"
        );
        let batch = check(Some(auth), &with_key, &[]).expect("a batch");
        assert_eq!(batch.whole, None, "{auth}");
        assert_eq!(batch.warnings, ["authorization_malformed"], "{auth}");
    }
    assert_eq!(basic_user("bAsIc  a2V5Og=="), Some("key".to_owned()));
}

#[test]
fn keys_of_no_source_or_of_the_other_region_are_unknown() {
    let keys = [
        (Region::NonEu, "here"),
        (Region::Eu, "there"),
        (Region::Eu, "both"),
        (Region::NonEu, "both"),
    ];
    let plain = body(&[EVENT], "");
    for (key, expected) in [
        ("here", None),
        ("both", None),
        ("there", unknown_source("wrong region")),
        ("nowhere", unknown_source("unknown write key")),
    ] {
        assert_eq!(whole(Some(&basic(key)), &plain, &keys), expected, "{key}");
    }
    assert_eq!(whole(Some(&basic("any")), &plain, &[]), None);
}

#[test]
fn sent_at_is_the_time_of_the_attempt() {
    let warnings = |rest: &str| {
        let body = format!(r#"{{"batch":[{EVENT}],"writeKey":"k"{rest}}}"#);
        check(None, &body, &[]).expect("a batch").warnings
    };
    assert_eq!(warnings(""), ["no_sent_at"]);
    assert_eq!(
        warnings(r#","sentAt":"2021-03-11T23:59:30.000Z""#),
        [] as [&str; 0]
    );
    assert_eq!(
        warnings(r#","sentAt":"2021-03-11T23:58:30.000Z""#),
        ["sent_at_not_now"]
    );
    assert_eq!(
        warnings(r#","sentAt":"2021-03-12T00:01:30.000Z""#),
        ["sent_at_not_now"]
    );
    for wrong in [r#""now""#, "1615507200000", "null"] {
        assert_eq!(
            warnings(&format!(r#","sentAt":{wrong}"#)),
            ["sent_at_invalid"]
        );
    }
}

#[test]
fn repeated_fields_of_the_body_are_remarked_on() {
    for rest in [
        r#","writeKey":"k","writeKey":"k""#.to_owned(),
        format!(r#","writeKey":"k","sentAt":"{NOW}""#),
        r#","writeKey":"k","batch":[]"#.to_owned(),
    ] {
        let body = body(&[EVENT], &rest);
        let batch = check(None, &body, &[]).expect("a batch");
        assert_eq!(batch.warnings, ["repeated_field_in_body"], "{rest}");
    }
}

#[test]
fn keys_never_print_themselves() {
    let keys = Keys::new(vec![(Region::Eu, "topsecret".to_owned())]);
    assert_eq!(format!("{keys:?}"), "Keys(1 redacted)");
}
