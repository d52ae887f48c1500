//! Entries for terminals.

use std::fmt::Write;

use super::entry::{Entry, Outcome};

/// Deeper levels are not indented further, so that the text stays of the order of
/// the event's size.
const MAX_INDENTED_LEVELS: usize = 32;

/// One block for an entry: a line with time, region, type, outcome and name, then
/// the event's JSON, indented and otherwise as received. Ends with a line feed.
/// Control characters, also those of terminals, are escaped.
#[must_use]
pub fn entry_text(entry: &Entry) -> String {
    let event = entry.event();
    let field = |name: &str| event.get(name).and_then(|value| value.as_str());
    let outcome = match &entry.outcome {
        Outcome::Dropped(dropped) => {
            let reason = serde_json::to_value(dropped.reason).unwrap_or_default();
            let reason = reason.as_str().unwrap_or_default();
            if dropped.detail.is_empty() {
                format!("dropped ({reason})")
            } else {
                format!("dropped ({reason}: {})", dropped.detail)
            }
        }
        taken => taken.as_str().to_owned(),
    };
    let request = &entry.request;
    let mut line = format!(
        "{}  {}  {}  {outcome}",
        request.received_at,
        request.region.as_str(),
        field("type").unwrap_or("-"),
    );
    if let Some(name) = field("event") {
        let _never_fails = write!(line, "  {name:?}");
    }
    for warning in entry.all_warnings() {
        let _never_fails = write!(line, "  [{warning}]");
    }
    let mut text = escape(&line);
    text.push('\n');
    text.push_str(&escape(&indent(entry.event_json())));
    text.push('\n');
    text
}

/// Escapes what a terminal would act on.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        let is_bidi = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (c.is_control() && c != '\n') || is_bidi {
            let _never_fails = write!(escaped, "\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Breaks JSON into indented lines. Works on the text, so that numbers, escapes
/// and the order of members stay as they were received.
fn indent(json: &str) -> String {
    let mut pretty = String::with_capacity(json.len() * 2);
    let mut chars = json.chars().peekable();
    let mut depth = 0_usize;
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                pretty.push(c);
                while let Some(c) = chars.next() {
                    pretty.push(c);
                    match c {
                        '\\' => pretty.extend(chars.next()),
                        '"' => break,
                        _ => {}
                    }
                }
            }
            '{' | '[' => {
                pretty.push(c);
                while chars.next_if(char::is_ascii_whitespace).is_some() {}
                if let Some(close) = chars.next_if(|c| matches!(c, '}' | ']')) {
                    pretty.push(close);
                } else {
                    depth += 1;
                    new_line(&mut pretty, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                new_line(&mut pretty, depth);
                pretty.push(c);
            }
            ',' => {
                pretty.push(c);
                new_line(&mut pretty, depth);
            }
            ':' => pretty.push_str(": "),
            _ if c.is_ascii_whitespace() => {}
            _ => pretty.push(c),
        }
    }
    pretty
}

fn new_line(pretty: &mut String, depth: usize) {
    pretty.push('\n');
    for _ in 0..depth.min(MAX_INDENTED_LEVELS) {
        pretty.push_str("  ");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indenting_agrees_with_serde_json() {
        for json in [
            r#"{"a":[1,-2.5,{"b":null}],"c":{},"d":[],"e":"x{,:}\"\\"}"#,
            " [ true , { } , [ [ ] ] ] ",
            "7",
        ] {
            let value: serde_json::Value = serde_json::from_str(json).expect("fine JSON");
            let expected = serde_json::to_string_pretty(&value).expect("a value");
            assert_eq!(indent(json), expected);
            assert_eq!(indent(&expected), expected);
        }
    }

    #[test]
    fn numbers_and_order_stay_as_received() {
        let pretty = indent(r#"{"z":12345678901234567890123,"a":1.10}"#);
        assert_eq!(
            pretty,
            "{\n  \"z\": 12345678901234567890123,\n  \"a\": 1.10\n}"
        );
    }

    #[test]
    fn deep_nesting_stays_of_the_order_of_its_size() {
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(indent(&deep).len() < deep.len() * (2 * MAX_INDENTED_LEVELS + 2));
    }

    #[test]
    fn what_a_terminal_acts_on_is_escaped() {
        assert_eq!(
            escape("a\u{1b}[2J\u{9b}\u{202e}\nü"),
            "a\\u001b[2J\\u009b\\u202e\nü"
        );
    }
}
