//! From flags and a file to a capture. Pure; every fault names its flag.

use crate::{
    client::{args::CaptureArgs, json::from_json, timestamp::timestamp},
    proto::{AttributeValue, Capture, StringList, attribute_value::Kind},
};

/// Builds the capture of the flags on top of that of the file.
///
/// # Errors
/// What is wrong, with the name of the flag.
pub(super) fn capture(args: &CaptureArgs, file: Option<&str>) -> Result<Capture, String> {
    let mut capture = match file {
        Some(text) => from_json(text, "Capture").map_err(|error| format!("--file: {error}"))?,
        None => Capture::default(),
    };
    for (value, field) in [
        (&args.capture_id, &mut capture.capture_id),
        (&args.email, &mut capture.email),
        (&args.campaign_id, &mut capture.campaign_id),
        (&args.campaign_name, &mut capture.campaign_name),
        (&args.session_id, &mut capture.session_id),
        (&args.traffic_source, &mut capture.traffic_source),
    ] {
        if let Some(value) = value {
            field.clone_from(value);
        }
    }
    if let Some(time) = &args.occur_time {
        capture.occur_time = Some(timestamp("--occur-time", time)?);
    }
    if let Some(region) = args.region {
        capture.data_region = region.to_proto().into();
    }
    for pair in &args.attribute {
        let (key, text) = split("--attribute", pair)?;
        capture
            .attributes
            .insert(key, value(Kind::StringValue(text)));
    }
    for pair in &args.attribute_json {
        let (key, text) = split("--attribute-json", pair)?;
        capture.attributes.insert(key, value(json_value(&text)?));
    }
    for pair in &args.timestamp {
        let (key, text) = split("--timestamp", pair)?;
        let time = timestamp("--timestamp", &text)?;
        capture
            .attributes
            .insert(key, value(Kind::TimestampValue(time)));
    }
    for pair in &args.consent {
        let (category, text) = split("--consent", pair)?;
        let given = text
            .parse()
            .map_err(|_| "--consent: write CATEGORY=true or =false")?;
        capture.consent.insert(category, given);
    }
    Ok(capture)
}

fn value(kind: Kind) -> AttributeValue {
    AttributeValue { kind: Some(kind) }
}

fn split(flag: &str, pair: &str) -> Result<(String, String), String> {
    let (key, value) = pair
        .split_once('=')
        .ok_or_else(|| format!("{flag}: write KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

fn json_value(text: &str) -> Result<Kind, String> {
    use serde_json::Value;
    const RULE: &str =
        "--attribute-json: write KEY=JSON with a string, number, boolean or array of strings";
    match serde_json::from_str(text).map_err(|error| format!("{RULE}: {error}"))? {
        Value::String(text) => Ok(Kind::StringValue(text)),
        Value::Bool(value) => Ok(Kind::BoolValue(value)),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Ok(Kind::IntegerValue(integer)),
            (None, Some(number)) => Ok(Kind::NumberValue(number)),
            (None, None) => Err(RULE.to_owned()),
        },
        Value::Array(items) => {
            let texts: Option<Vec<String>> = items
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect();
            let values = texts.ok_or(RULE)?;
            Ok(Kind::ListValue(StringList { values }))
        }
        Value::Null | Value::Object(_) => Err(RULE.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::args::RegionArg;

    fn flags() -> CaptureArgs {
        CaptureArgs {
            integration: "acme".into(),
            ..CaptureArgs::default()
        }
    }

    #[test]
    fn flags_win_over_the_file_and_every_kind_of_value_is_read() {
        let args = CaptureArgs {
            email: Some("b@example.com".into()),
            region: Some(RegionArg::Eu),
            occur_time: Some("1969-12-31T23:59:59.5Z".into()),
            attribute: vec!["a=x=y".into()],
            attribute_json: vec![
                "i=7".into(),
                "f=1.5".into(),
                "t=true".into(),
                "s=\"q\"".into(),
                "l=[\"m\"]".into(),
            ],
            timestamp: vec!["at=2021-03-12T00:00:00+01:00".into()],
            consent: vec!["ads=false".into()],
            ..flags()
        };
        let file = r#"{"email":"a@example.com","campaignId":"c"}"#;
        let capture = capture(&args, Some(file)).expect("a capture");
        assert_eq!(
            (capture.email.as_str(), capture.campaign_id.as_str()),
            ("b@example.com", "c")
        );
        let time = capture.occur_time.expect("a time");
        assert_eq!((time.seconds, time.nanos), (-1, 500_000_000));
        let kind = |key: &str| capture.attributes[key].kind.clone().expect("a kind");
        assert_eq!(kind("a"), Kind::StringValue("x=y".into()));
        assert_eq!(kind("i"), Kind::IntegerValue(7));
        assert_eq!(kind("f"), Kind::NumberValue(1.5));
        assert_eq!(kind("t"), Kind::BoolValue(true));
        assert_eq!(kind("s"), Kind::StringValue("q".into()));
        assert_eq!(
            kind("l"),
            Kind::ListValue(StringList {
                values: vec!["m".into()]
            })
        );
        assert!(matches!(kind("at"), Kind::TimestampValue(time) if time.seconds == 1_615_503_600));
        assert!(!capture.consent["ads"]);
    }

    #[test]
    fn faults_name_their_flag() {
        let with = |change: fn(&mut CaptureArgs)| {
            let mut args = flags();
            change(&mut args);
            capture(&args, None).expect_err("a fault")
        };
        assert!(with(|a| a.attribute = vec!["x".into()]).starts_with("--attribute:"));
        assert!(with(|a| a.attribute_json = vec!["x={}".into()]).starts_with("--attribute-json:"));
        assert!(with(|a| a.attribute_json = vec!["x=[1]".into()]).starts_with("--attribute-json:"));
        assert!(with(|a| a.timestamp = vec!["x=soon".into()]).starts_with("--timestamp:"));
        assert!(with(|a| a.occur_time = Some("soon".into())).starts_with("--occur-time:"));
        assert!(with(|a| a.consent = vec!["x=maybe".into()]).starts_with("--consent:"));
        let bad_file = capture(&flags(), Some("{")).expect_err("a fault");
        assert!(bad_file.starts_with("--file:"));
    }
}
