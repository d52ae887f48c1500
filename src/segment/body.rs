//! Whether the body of a 2xx is Segment's.

use http::{HeaderMap, header::CONTENT_TYPE};
use serde_json::Value;

/// What shows that the events were not taken, if anything does. Segment answers
/// `{"success":true}`; a body that was cut off or is empty shows nothing.
pub(super) fn contradiction(headers: &HeaderMap, body: &[u8]) -> Option<&'static str> {
    let declared = headers.get(CONTENT_TYPE).and_then(|it| it.to_str().ok());
    let is_html = |it: &str| {
        it.trim_start()
            .to_ascii_lowercase()
            .starts_with("text/html")
    };
    let first = body.trim_ascii_start().strip_prefix(b"\xef\xbb\xbf");
    let first = first.unwrap_or(body.trim_ascii_start());
    if declared.is_some_and(is_html) || first.starts_with(b"<") {
        return Some("an HTML page");
    }
    let value: Value = serde_json::from_slice(first).ok()?;
    (value.get("success") == Some(&Value::Bool(false))).then_some("\"success\": false")
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
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
            assert_eq!(contradiction(&headers, body.as_bytes()), expected, "{body}");
        }
    }
}
