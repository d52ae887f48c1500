//! Values of attributes: checked, and after the mapping's privacy rule.

use std::borrow::Cow;

use sha2::{Digest, Sha256};

use crate::{
    capture::Answer,
    integration::{ReservedTrait, ValueType},
    text::{has_control_beyond_line_ends, hex_digits},
    time::UnixMillis,
    violation::{Violations, entry_path},
};

/// Most texts of one list.
const MAX_LIST_VALUES: usize = 1_000;

/// A value that has a JSON form.
#[derive(Clone, PartialEq)]
pub enum Value<'a> {
    /// A text, or the hash of a value.
    Text(Cow<'a, str>),
    /// A finite number.
    Number(f64),
    /// A whole number.
    Integer(i64),
    /// A truth value.
    Bool(bool),
    /// A moment.
    Time(UnixMillis),
    /// Several texts.
    List(Vec<&'a str>),
    /// The hashes of several texts.
    Hashes(Vec<String>),
}

impl std::fmt::Debug for Value<'_> {
    /// An attribute's value is personal data, so only its type is printed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Value({})", self.value_type().name())
    }
}

impl Value<'_> {
    fn value_type(&self) -> ValueType {
        match self {
            Self::Text(_) => ValueType::String,
            Self::Number(_) | Self::Integer(_) => ValueType::Number,
            Self::Bool(_) => ValueType::Bool,
            Self::Time(_) => ValueType::Timestamp,
            Self::List(_) | Self::Hashes(_) => ValueType::List,
        }
    }

    /// The SHA-256 of the value's text: a string as it is, any other value as
    /// its JSON form; a list value by value.
    pub(super) fn hashed(self) -> Self {
        let hash = |text: &str| hex_digits(&Sha256::digest(text.as_bytes()));
        Self::Text(Cow::Owned(match self {
            Self::Text(text) => hash(&text),
            Self::Time(time) => hash(time.to_iso().as_str()),
            Self::Bool(value) => hash(if value { "true" } else { "false" }),
            Self::Integer(integer) => hash(&integer.to_string()),
            // A finite number always has a JSON form.
            Self::Number(number) => hash(&serde_json::to_string(&number).unwrap_or_default()),
            Self::List(texts) => {
                return Self::Hashes(texts.into_iter().map(hash).collect());
            }
            hashes @ Self::Hashes(_) => return hashes,
        }))
    }
}

/// Checks one attribute's value against JSON's limits and the declared type;
/// `None` where a rule is broken.
pub(super) fn check<'a>(
    found: &mut Violations,
    id: &str,
    answer: Option<Answer<'a>>,
    declared: Option<ValueType>,
) -> Option<Value<'a>> {
    let checked = match answer {
        None => Err((
            "VALUE_MISSING",
            Cow::Borrowed("set one kind of value, or leave the attribute out"),
        )),
        Some(answer) => {
            check_answer(answer).map_err(|(reason, rule)| (reason, Cow::Borrowed(rule)))
        }
    };
    let checked = checked.and_then(|value| match declared {
        Some(declared) if declared != value.value_type() => Err((
            "WRONG_TYPE",
            Cow::Owned(format!(
                "the integration's mapping wants a {}, this is a {}",
                declared.name(),
                value.value_type().name()
            )),
        )),
        _ => Ok(value),
    });
    checked
        .map_err(|(reason, rule)| found.add(entry_path("capture.attributes", id), reason, rule))
        .ok()
}

fn check_answer(answer: Answer<'_>) -> Result<Value<'_>, (&'static str, &'static str)> {
    const CONTROL: (&str, &str) = (
        "CONTROL_CHARACTER",
        "control characters other than tab and line ends are not allowed; remove them",
    );
    match answer {
        Answer::Text(text) if has_control_beyond_line_ends(text) => Err(CONTROL),
        Answer::Text(text) => Ok(Value::Text(Cow::Borrowed(text))),
        Answer::Number(number) if !number.is_finite() => Err((
            "NOT_FINITE",
            "NaN and infinity have no form in JSON; leave the attribute out",
        )),
        Answer::Number(number) => Ok(Value::Number(number)),
        Answer::Integer(integer) => Ok(Value::Integer(integer)),
        Answer::Bool(value) => Ok(Value::Bool(value)),
        Answer::Time(time) => UnixMillis::from_proto(&time).map(Value::Time).ok_or((
            "OUT_OF_RANGE",
            "years 1 to 9999, nanos 0 to 999,999,999 (google.protobuf.Timestamp)",
        )),
        Answer::List(list) if list.len() > MAX_LIST_VALUES => {
            Err(("TOO_MANY", "at most 1,000 values in a list"))
        }
        Answer::List(list) if list.iter().any(|text| has_control_beyond_line_ends(text)) => {
            Err(CONTROL)
        }
        Answer::List(list) => Ok(Value::List(list)),
    }
}

/// Checks that a value fits the reserved trait that it is to become.
pub(super) fn check_reserved(
    found: &mut Violations,
    id: &str,
    value: &Value<'_>,
    key: &str,
    kind: ReservedTrait,
) {
    let wanted = match (kind, value) {
        (ReservedTrait::Number, Value::Number(_) | Value::Integer(_))
        | (ReservedTrait::String, Value::Text(_))
        | (ReservedTrait::Date, Value::Time(_)) => return,
        (ReservedTrait::Date, Value::Text(text)) if is_iso_date(text) => return,
        (ReservedTrait::Number, _) => "a number",
        (ReservedTrait::String, _) => "a string",
        (ReservedTrait::Date, _) => "a timestamp, or a string with an ISO-8601 date",
        (ReservedTrait::Object, _) => "an object, which no attribute can be",
    };
    found.add(
        entry_path("capture.attributes", id),
        "RESERVED_TRAIT",
        format!("becomes the trait `{key}`, which Segment reserves for {wanted}"),
    );
}

/// `2000-02-29` or `2000-02-29T12:00:00Z` with an offset of any kind.
fn is_iso_date(text: &str) -> bool {
    text.parse::<jiff::Timestamp>().is_ok() || text.parse::<jiff::civil::Date>().is_ok()
}
