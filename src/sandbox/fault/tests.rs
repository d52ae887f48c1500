use super::*;
use crate::sandbox::event::check_event;

const EVENT: &str = r#"{"type":"identify","userId":"poison","messageId":"m-1"}"#;

fn faults(json: &str) -> Faults {
    let faults = Faults::new(0);
    let rules = parse_rules(json.as_bytes()).expect(json);
    faults.set(rules).expect(json);
    faults
}

fn decide(faults: &Faults) -> Option<Fault> {
    let events = [check_event(EVENT)];
    faults.decide(&Facts {
        region: Region::Eu,
        write_key: Some("key"),
        events: &events,
    })
}

fn status(json: &str) -> Option<u16> {
    decide(&faults(json)).and_then(|fault| fault.status)
}

fn error(json: &str) -> String {
    let result = parse_rules(json.as_bytes()).and_then(|rules| Faults::new(0).set(rules));
    result.expect_err(json).to_string()
}

#[test]
fn wrong_rules_are_refused_with_the_name_of_the_field() {
    for (json, field) in [
        (r#"{"sttus":500}"#, "sttus"),
        (r#"{"rules":[],"status":500}"#, "status"),
        (r#"{"rules":[{"sttus":500}]}"#, "sttus"),
        (r#"{"status":99}"#, "status"),
        (r#"{"status":101}"#, "status"),
        (r#"{"status":600}"#, "status"),
        (r#"{"delay_ms":600001}"#, "delay_ms"),
        (r#"{"status":500,"share":1.5}"#, "share"),
        (r#"{"status":500,"share":-0.1}"#, "share"),
        (r#"{"status":429,"retry_after":"1\n2"}"#, "retry_after"),
        (
            r#"{"status":429,"rate_limit_reset":"\u0000"}"#,
            "rate_limit_reset",
        ),
        (r#"{"drop_connection":"sometimes"}"#, "sometimes"),
        (r#"{"reject_status":500}"#, "reject_status"),
        (r#"{"reject_containing":""}"#, "reject_containing"),
        (
            r#"{"status":204,"drop_connection":"mid_answer"}"#,
            "drop_connection",
        ),
        (r#"{"region":"moon"}"#, "moon"),
        ("{}", "what to do"),
        ("[]", "object"),
        ("", "object"),
    ] {
        let error = error(json);
        assert!(error.contains(field), "{json}: {error}");
    }
    let second = error(r#"{"rules":[{"status":500},{"status":1}]}"#);
    assert_eq!(second, "rule 1: status has to be from 200 to 599");
    assert_eq!(
        Faults::new(0).set(vec![Rule::default(); MAX_RULES + 1]),
        Err(RuleError::TooMany)
    );
}

#[test]
fn a_wrong_rule_leaves_the_former_ones() {
    let faults = faults(r#"{"status":503}"#);
    let wrong = Rule {
        status: Some(1),
        ..Rule::default()
    };
    assert!(faults.set(vec![wrong]).is_err());
    assert_eq!(faults.rules_and_acted().0[0].status, Some(503));
}

#[test]
fn the_first_rule_that_matches_acts() {
    let json = r#"{"rules":[{"status":500,"region":"non_eu"},{"status":501,"write_key":"other"},
        {"status":502,"write_key":"key","region":"eu"},{"status":503}]}"#;
    let faults = faults(json);
    assert_eq!(decide(&faults).and_then(|fault| fault.status), Some(502));
    assert_eq!(faults.rules_and_acted().1, [0, 0, 1, 0]);
}

#[test]
fn count_ends_the_misbehaviour() {
    let faults = faults(r#"{"status":500,"count":2}"#);
    let acts: Vec<bool> = (0..4).map(|_| decide(&faults).is_some()).collect();
    assert_eq!(acts, [true, true, false, false]);
}

#[test]
fn a_share_of_requests_misbehaves_and_a_seed_repeats_it() {
    let draw = |json: &str| {
        let faults = faults(json);
        (0..1_000)
            .map(|_| decide(&faults).is_some())
            .collect::<Vec<bool>>()
    };
    let seven = draw(r#"{"status":500,"share":0.3,"seed":7}"#);
    let acted = seven.iter().filter(|acted| **acted).count();
    assert!((240..360).contains(&acted), "{acted}");
    assert_eq!(seven, draw(r#"{"status":500,"share":0.3,"seed":7}"#));
    assert_ne!(seven, draw(r#"{"status":500,"share":0.3,"seed":8}"#));
    assert!(!draw(r#"{"status":500,"share":0}"#).contains(&true));
    assert!(!draw(r#"{"status":500,"share":1}"#).contains(&false));
}

#[test]
fn rejections_look_into_the_events() {
    assert_eq!(status(r#"{"reject_message_ids":["m-0","m-1"]}"#), Some(400));
    assert_eq!(status(r#"{"reject_message_ids":["m-0"]}"#), None);
    assert_eq!(status(r#"{"reject_containing":"\"poison\""}"#), Some(400));
    assert_eq!(status(r#"{"reject_containing":"antidote"}"#), None);
    let both =
        r#"{"reject_containing":"antidote","reject_message_ids":["m-1"],"reject_status":422}"#;
    assert_eq!(status(both), Some(422));
    assert_eq!(
        status(r#"{"reject_containing":"poison","status":413}"#),
        Some(413)
    );
}

#[test]
fn events_are_taken_where_the_answer_is_a_success_unless_told() {
    for (json, process) in [
        (r#"{"delay_ms":5}"#, true),
        (r#"{"status":202}"#, true),
        (r#"{"status":503}"#, false),
        (r#"{"status":302}"#, false),
        (r#"{"drop_connection":"before_answer"}"#, false),
        (r#"{"reject_containing":"poison"}"#, false),
        (r#"{"drop_connection":"mid_answer","process":true}"#, true),
        (r#"{"status":503,"process":true}"#, true),
        (r#"{"process":false}"#, false),
    ] {
        let fault = decide(&faults(json)).expect(json);
        assert_eq!(fault.process, process, "{json}");
    }
}

#[test]
fn rules_are_shown_as_they_were_put() {
    let json =
        r#"{"status":429,"retry_after":"3","share":0.5,"count":9,"region":"eu","process":true}"#;
    let shown = serde_json::to_string(&faults(json).rules_and_acted().0[0]).expect("a rule");
    assert_eq!(shown, json);
}
