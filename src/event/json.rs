//! The pieces of an event's JSON, the same text as serde_json writes.

use serde_json::Result;

use crate::{
    mapping::{Field, Value},
    text::needs_json_escape,
};

/// Appends a text as a JSON string.
pub(super) fn push_text(out: &mut Vec<u8>, text: &str) -> Result<()> {
    // Most texts stand in JSON as they are, and are copied in one piece.
    if needs_json_escape(text) {
        return serde_json::to_writer(out, text);
    }
    push_quoted(out, text.as_bytes());
    Ok(())
}

/// Appends a string of characters that need no escape.
pub(super) fn push_quoted(out: &mut Vec<u8>, plain: &[u8]) {
    out.push(b'"');
    out.extend_from_slice(plain);
    out.push(b'"');
}

/// Appends the value of an attribute.
pub(super) fn push_value(out: &mut Vec<u8>, value: &Value<'_>) -> Result<()> {
    match value {
        Value::Text(text) => push_text(out, text),
        Value::Number(number) => serde_json::to_writer(out, number),
        Value::Integer(integer) => serde_json::to_writer(out, integer),
        Value::Bool(true) => {
            out.extend_from_slice(b"true");
            Ok(())
        }
        Value::Bool(false) => {
            out.extend_from_slice(b"false");
            Ok(())
        }
        Value::Time(time) => {
            push_quoted(out, &time.iso_bytes());
            Ok(())
        }
        Value::List(texts) => push_list(out, texts.iter().copied()),
        Value::Hashes(texts) => push_list(out, texts.iter().map(String::as_str)),
    }
}

fn push_list<'a>(out: &mut Vec<u8>, texts: impl Iterator<Item = &'a str>) -> Result<()> {
    out.push(b'[');
    for (place, text) in texts.enumerate() {
        if place > 0 {
            out.push(b',');
        }
        push_text(out, text)?;
    }
    out.push(b']');
    Ok(())
}

/// Appends the key and the value of each field, with a comma before each.
pub(super) fn push_fields<'a>(
    out: &mut Vec<u8>,
    fields: impl Iterator<Item = &'a Field<'a>>,
) -> Result<()> {
    for field in fields {
        out.push(b',');
        push_text(out, field.key)?;
        out.push(b':');
        push_value(out, &field.value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(value: &Value<'_>) -> String {
        let mut out = Vec::new();
        push_value(&mut out, value).expect("written");
        String::from_utf8(out).expect("UTF-8")
    }

    proptest! {
        #[test]
        fn values_are_written_as_serde_json_writes_them(
            texts in prop::collection::vec(any::<String>(), 0..4),
            number in any::<f64>().prop_filter("finite", |number| number.is_finite()),
            integer in any::<i64>(),
        ) {
            for text in &texts {
                let json = serde_json::to_string(text).expect("JSON");
                prop_assert_eq!(written(&Value::Text(text.into())), json);
            }
            let json = serde_json::to_string(&texts).expect("JSON");
            prop_assert_eq!(written(&Value::List(texts.iter().map(String::as_str).collect())), json.clone());
            prop_assert_eq!(written(&Value::Hashes(texts)), json);
            prop_assert_eq!(written(&Value::Number(number)), serde_json::to_string(&number).expect("JSON"));
            prop_assert_eq!(written(&Value::Integer(integer)), integer.to_string());
        }
    }

    #[test]
    fn every_ascii_character_is_written_as_serde_json_writes_it() {
        for byte in 0..0x80_u8 {
            let text = format!("plain{}and on", char::from(byte));
            let json = serde_json::to_string(&text).expect("JSON");
            assert_eq!(written(&Value::Text(text.into())), json);
        }
        assert_eq!(written(&Value::Bool(true)), "true");
        assert_eq!(written(&Value::Bool(false)), "false");
    }
}
