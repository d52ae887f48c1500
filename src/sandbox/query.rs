//! The filters of `GET /debugger`.

use serde::Deserialize;

use super::entry::Entry;

/// Which entries to show, and how.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    kind: Option<String>,
    user_id: Option<String>,
    message_id: Option<String>,
    limit: Option<usize>,
    after: Option<u64>,
    /// `format=text` or `format=json`, where given.
    pub(super) as_text: Option<bool>,
}

/// The fields of an event that can be asked for.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Fields {
    r#type: serde_json::Value,
    user_id: serde_json::Value,
    message_id: serde_json::Value,
}

impl Filter {
    /// Reads a URL's query. The error names the parameter.
    pub(super) fn parse(query: &str) -> Result<Self, String> {
        let mut filter = Self::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decode(value).ok_or(format!("{name} is not percent-encoded"))?;
            let not_a_number = |_error| format!("{name} has to be a number");
            match name {
                "type" => filter.kind = Some(value),
                "userId" => filter.user_id = Some(value),
                "messageId" => filter.message_id = Some(value),
                "limit" => filter.limit = Some(value.parse().map_err(not_a_number)?),
                "after" => filter.after = Some(value.parse().map_err(not_a_number)?),
                "format" if value == "text" => filter.as_text = Some(true),
                "format" if value == "json" => filter.as_text = Some(false),
                "format" => return Err("format has to be text or json".to_owned()),
                _ => {
                    return Err(format!(
                        "unknown parameter {name}; there are type, userId, messageId, limit, \
                         after and format"
                    ));
                }
            }
        }
        Ok(filter)
    }

    /// The matching entries, oldest first: with `after` the first `limit` of them,
    /// so that one can read on from there, otherwise the last.
    pub(super) fn apply(&self, mut entries: Vec<Entry>) -> Vec<Entry> {
        entries.retain(|entry| self.matches(entry));
        let limit = self.limit.unwrap_or(usize::MAX);
        if self.after.is_some() {
            entries.truncate(limit);
        } else {
            entries.drain(..entries.len().saturating_sub(limit));
        }
        entries
    }

    fn matches(&self, entry: &Entry) -> bool {
        if self.after.is_some_and(|after| entry.seq <= after) {
            return false;
        }
        if self.kind.is_none() && self.user_id.is_none() && self.message_id.is_none() {
            return true;
        }
        let fields: Fields = serde_json::from_str(entry.event_json()).unwrap_or_default();
        let is_asked_for = |asked: &Option<String>, found: &serde_json::Value| {
            asked.is_none() || asked.as_deref() == found.as_str()
        };
        is_asked_for(&self.kind, &fields.r#type)
            && is_asked_for(&self.user_id, &fields.user_id)
            && is_asked_for(&self.message_id, &fields.message_id)
    }
}

fn percent_decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => {
                let high = char::from(bytes.next()?).to_digit(16)?;
                let low = char::from(bytes.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            _ => byte,
        });
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_decoded() {
        let filter = Filter::parse("type=track&userId=a%26b+c&limit=5&after=7&format=text");
        let expected = Filter {
            kind: Some("track".to_owned()),
            user_id: Some("a&b c".to_owned()),
            message_id: None,
            limit: Some(5),
            after: Some(7),
            as_text: Some(true),
        };
        assert_eq!(filter, Ok(expected));
        assert_eq!(Filter::parse(""), Ok(Filter::default()));
    }

    #[test]
    fn wrong_parameters_are_named() {
        for (query, name) in [
            ("limit=x", "limit"),
            ("after=-1", "after"),
            ("format=xml", "format"),
            ("userId=%f", "userId"),
            ("userId=%ff", "userId"),
            ("user=1", "user"),
        ] {
            let error = Filter::parse(query).expect_err(query);
            assert!(error.contains(name), "{error}");
        }
    }
}
