//! Whether the body of a 2xx is Segment's.

use std::{borrow::Cow, fmt};

use http::{HeaderMap, header::CONTENT_TYPE};
use serde::{
    Deserializer as _,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;

/// What shows that the events were not taken, if anything does. Segment answers
/// `{"success":true}`. Of a body that was cut off, what did arrive counts.
pub(super) fn contradiction(headers: &HeaderMap, body: &[u8]) -> Option<&'static str> {
    let declared = headers.get(CONTENT_TYPE).and_then(|it| it.to_str().ok());
    let is_html = |it: &str| {
        it.trim_start()
            .to_ascii_lowercase()
            .starts_with("text/html")
    };
    let first = body.trim_ascii_start();
    let first = first.strip_prefix(b"\xef\xbb\xbf").unwrap_or(first);
    let first = first.trim_ascii_start();
    if declared.is_some_and(is_html) || first.starts_with(b"<") {
        return Some("an HTML page");
    }
    let mut success = None;
    let mut json = serde_json::Deserializer::from_slice(first);
    // An error says where the body ends; what stands before has been seen.
    let _ = json.deserialize_map(SuccessOf(&mut success));
    (success == Some(Value::Bool(false))).then_some("\"success\": false")
}

/// Keeps the value of `success` of a JSON object, also of one without its end.
struct SuccessOf<'a>(&'a mut Option<Value>);

impl<'de> Visitor<'de> for SuccessOf<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        while let Some(key) = object.next_key::<Cow<'_, str>>()? {
            match key.as_ref() {
                "success" => *self.0 = Some(object.next_value()?),
                _ => {
                    object.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_and_a_denial_are_not_segments_and_all_else_may_be() {
        let html = Some("an HTML page");
        let denial = Some("\"success\": false");
        for (kind, body, expected) in [
            ("application/json", r#"{"success":true}"#, None),
            ("application/json", r#"{"success":"#, None),
            ("application/json", r#"{"success":false"#, denial),
            (
                "application/json",
                r#"{"success":false,"message":"qu"#,
                denial,
            ),
            (
                "application/json",
                r#"{"code":"x\n","success":false,"#,
                denial,
            ),
            ("application/json", r#"{"\u0073uccess":false}"#, denial),
            ("application/json", r#"{"success":fal"#, None),
            ("application/json", r#"{"success":true,"error":"quo"#, None),
            ("application/json", r#"{"batch":{"success":false}}"#, None),
            ("application/json", r#"[{"success":false}]"#, None),
            ("application/json", "false", None),
            ("application/json", "", None),
            ("text/plain", "OK", None),
            (
                "application/json",
                r#" {"code":"x","success": false }"#,
                denial,
            ),
            ("text/plain", r#"{"success":false}"#, denial),
            ("application/json", r#"{"success":"false"}"#, None),
            ("application/json", "[1]", None),
            ("text/html; charset=utf-8", "", html),
            ("Text/HTML", "x", html),
            ("application/json", "\n<!doctype html><p>Log in", html),
            ("", "\u{feff}<html>", html),
            ("", " \u{feff}\r\n <!-- x", html),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
            assert_eq!(contradiction(&headers, body.as_bytes()), expected, "{body}");
        }
    }
}
