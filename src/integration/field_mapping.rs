//! What becomes of one attribute, and the rules that make a mapping possible.

use std::collections::HashSet;

use crate::{
    proto::{self, EventType},
    text::{MAX_NAME_CHARS, check_line},
    violation::Violations,
};

/// Most mappings of one integration.
const MAX_MAPPINGS: usize = 1_000;
/// Keys of the traits that the relay writes itself.
pub const RELAY_KEYS: [&str; 2] = ["email", "emailSha256Hash"];

/// What happens to a value before anything is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privacy {
    /// The value as it came.
    Pass,
    /// Lower-case hex SHA-256 of the value's text.
    Hash,
    /// Checked, then forgotten.
    Drop,
}

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// A text.
    String,
    /// A whole or other number.
    Number,
    /// A truth value.
    Bool,
    /// A moment.
    Timestamp,
    /// Several texts.
    List,
}

impl ValueType {
    /// The type's name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::Number => "number",
            Self::Bool => "bool",
            Self::Timestamp => "timestamp",
            Self::List => "list",
        }
    }
}

/// The type that Segment's Spec fixes for a reserved trait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservedTrait {
    /// `age`.
    Number,
    /// `birthday` and `createdAt`: an ISO-8601 date or date and time.
    Date,
    /// `address` and `company`: no attribute value can be one.
    Object,
    /// `firstName` and its like.
    String,
}

/// The fixed type of a trait, if Segment's Spec reserves its key.
#[must_use]
pub fn reserved_trait(key: &str) -> Option<ReservedTrait> {
    Some(match key {
        "age" => ReservedTrait::Number,
        "birthday" | "createdAt" => ReservedTrait::Date,
        "address" | "company" => ReservedTrait::Object,
        "avatar" | "description" | "email" | "firstName" | "gender" | "id" | "lastName"
        | "name" | "phone" | "title" | "username" | "website" => ReservedTrait::String,
        _ => return None,
    })
}

/// A valid mapping of one attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldMapping {
    /// Jebbit attribute id.
    pub attribute_id: String,
    /// Key of the trait and of the question.
    pub segment_key: String,
    /// What happens to the value before anything is stored.
    pub privacy: Privacy,
    /// The type that a value has to have; `None` takes any.
    pub value_type: Option<ValueType>,
    /// Whether a capture has to have the attribute.
    pub required: bool,
    /// Whether the identify event carries it.
    pub in_identify: bool,
    /// Whether the track event carries it.
    pub in_track: bool,
}

impl FieldMapping {
    /// The fixed type of the trait that this mapping writes, if it has one.
    #[must_use]
    pub fn reserved(&self) -> Option<ReservedTrait> {
        let writes_trait = self.in_identify && self.privacy != Privacy::Drop;
        writes_trait
            .then(|| reserved_trait(&self.segment_key))
            .flatten()
    }

    /// The mapping in the schema's form.
    #[must_use]
    pub fn to_proto(&self) -> proto::FieldMapping {
        let mut targets = Vec::with_capacity(2);
        if self.in_identify {
            targets.push(EventType::Identify.into());
        }
        if self.in_track {
            targets.push(EventType::Track.into());
        }
        proto::FieldMapping {
            attribute_id: self.attribute_id.clone(),
            privacy: match self.privacy {
                Privacy::Pass => proto::Privacy::Pass,
                Privacy::Hash => proto::Privacy::Hash,
                Privacy::Drop => proto::Privacy::Drop,
            }
            .into(),
            segment_key: self.segment_key.clone(),
            value_type: match self.value_type {
                None => proto::ValueType::Unspecified,
                Some(ValueType::String) => proto::ValueType::String,
                Some(ValueType::Number) => proto::ValueType::Number,
                Some(ValueType::Bool) => proto::ValueType::Bool,
                Some(ValueType::Timestamp) => proto::ValueType::Timestamp,
                Some(ValueType::List) => proto::ValueType::List,
            }
            .into(),
            required: self.required,
            targets,
        }
    }
}

/// All mappings of an integration: no attribute and no key twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mappings {
    list: Vec<FieldMapping>,
    /// Places in the list, in the order of the attribute ids.
    by_attribute: Vec<usize>,
    written_keys: HashSet<Box<str>>,
}

impl Mappings {
    /// Checks mappings alone and against each other.
    pub(super) fn parse(found: &mut Violations, specs: &[proto::FieldMapping]) -> Self {
        let mut mappings = Self::default();
        if specs.len() > MAX_MAPPINGS {
            let rule = format!("at most {MAX_MAPPINGS} mappings");
            found.add("integration.mappings", "TOO_MANY", rule);
            return mappings;
        }
        for (index, spec) in specs.iter().enumerate() {
            let path = format!("integration.mappings[{index}]");
            let mapping = parse(found, &path, spec);
            mappings.push(found, &path, mapping);
        }
        mappings
    }

    fn push(&mut self, found: &mut Violations, path: &str, mapping: FieldMapping) {
        match self.place(&mapping.attribute_id) {
            Ok(_) => found.add(
                format!("{path}.attribute_id"),
                "DUPLICATE",
                "this attribute is mapped already; map each attribute once",
            ),
            Err(place) => self.by_attribute.insert(place, self.list.len()),
        }
        let key = mapping.segment_key.clone().into_boxed_str();
        if mapping.privacy != Privacy::Drop && !self.written_keys.insert(key) {
            found.add(
                format!("{path}.segment_key"),
                "DUPLICATE",
                "another mapping writes this key already; choose another key",
            );
        }
        self.list.push(mapping);
    }

    /// In the order of the specification.
    #[must_use]
    pub fn all(&self) -> &[FieldMapping] {
        &self.list
    }

    /// The mapping of one attribute.
    #[must_use]
    pub fn of(&self, attribute_id: &str) -> Option<&FieldMapping> {
        let place = self.place(attribute_id).ok()?;
        Some(&self.list[self.by_attribute[place]])
    }

    fn place(&self, attribute_id: &str) -> Result<usize, usize> {
        self.by_attribute
            .binary_search_by(|index| self.list[*index].attribute_id.as_str().cmp(attribute_id))
    }

    /// Finds the mappings of attributes whose ids come in ascending order.
    #[must_use]
    pub fn in_order(&self) -> InOrder<'_> {
        InOrder {
            list: &self.list,
            rest: &self.by_attribute,
        }
    }

    /// Whether a mapping sends a value under this key.
    #[must_use]
    pub fn write(&self, key: &str) -> bool {
        self.written_keys.contains(key)
    }
}

/// The mappings from the last attribute on.
pub struct InOrder<'a> {
    list: &'a [FieldMapping],
    rest: &'a [usize],
}

impl<'a> InOrder<'a> {
    /// The mapping of one attribute, whose id is not before that of the last one.
    pub fn of(&mut self, attribute_id: &str) -> Option<&'a FieldMapping> {
        let id = |index: &usize| self.list[*index].attribute_id.as_str();
        // Mostly a capture has all attributes that are mapped, so it is the next one.
        if id(self.rest.first()?) != attribute_id {
            let before = |index: &usize| id(index) < attribute_id;
            self.rest = &self.rest[self.rest.partition_point(before)..];
        }
        let (next, rest) = self.rest.split_first()?;
        if id(next) != attribute_id {
            return None;
        }
        self.rest = rest;
        Some(&self.list[*next])
    }
}

fn parse(found: &mut Violations, path: &str, spec: &proto::FieldMapping) -> FieldMapping {
    let attribute_path = format!("{path}.attribute_id");
    if spec.attribute_id.is_empty() {
        found.add(&attribute_path, "REQUIRED", "give the Jebbit attribute id");
    }
    check_line(found, &attribute_path, &spec.attribute_id, MAX_NAME_CHARS);
    let key_path = format!("{path}.segment_key");
    check_line(found, &key_path, &spec.segment_key, MAX_NAME_CHARS);

    let (in_identify, in_track) = parse_targets(found, path, &spec.targets);
    let mapping = FieldMapping {
        attribute_id: spec.attribute_id.clone(),
        segment_key: if spec.segment_key.is_empty() {
            spec.attribute_id.clone()
        } else {
            spec.segment_key.clone()
        },
        privacy: parse_privacy(found, path, spec.privacy),
        value_type: parse_value_type(found, path, spec.value_type),
        required: spec.required,
        in_identify,
        in_track,
    };
    let writes = mapping.privacy != Privacy::Drop;
    if writes && RELAY_KEYS.contains(&mapping.segment_key.as_str()) {
        found.add(
            &key_path,
            "RESERVED_KEY",
            "the relay writes this key itself; choose another key or drop the attribute",
        );
    } else if let Some(rule) = mapping.reserved().and_then(|kind| misfit(kind, &mapping)) {
        found.add(&key_path, "RESERVED_TRAIT", rule);
    }
    mapping
}

/// Why no value that the mapping lets through could fit the reserved trait.
fn misfit(kind: ReservedTrait, mapping: &FieldMapping) -> Option<&'static str> {
    use ValueType as T;
    let hashed = mapping.privacy == Privacy::Hash;
    let declared = mapping.value_type;
    match kind {
        ReservedTrait::Object => Some(
            "Segment reserves this trait for an object, which no attribute can be; \
             choose another key or target the track event alone",
        ),
        ReservedTrait::Number if hashed || !matches!(declared, None | Some(T::Number)) => Some(
            "Segment reserves this trait for a number; use VALUE_TYPE_NUMBER without PRIVACY_HASH, \
             or another key",
        ),
        ReservedTrait::Date
            if hashed || !matches!(declared, None | Some(T::String | T::Timestamp)) =>
        {
            Some(
                "Segment reserves this trait for a date; use VALUE_TYPE_TIMESTAMP or \
                 VALUE_TYPE_STRING without PRIVACY_HASH, or another key",
            )
        }
        ReservedTrait::String if declared == Some(T::List) => {
            Some("Segment reserves this trait for a string; a list needs another key")
        }
        ReservedTrait::String if !hashed && !matches!(declared, None | Some(T::String)) => {
            Some("Segment reserves this trait for a string; use VALUE_TYPE_STRING or another key")
        }
        _ => None,
    }
}

fn parse_targets(found: &mut Violations, path: &str, targets: &[i32]) -> (bool, bool) {
    if targets.is_empty() {
        return (true, true);
    }
    let (mut in_identify, mut in_track) = (false, false);
    for (index, target) in targets.iter().enumerate() {
        match EventType::try_from(*target) {
            Ok(EventType::Identify) => in_identify = true,
            Ok(EventType::Track) => in_track = true,
            Ok(EventType::Unspecified) | Err(_) => found.add(
                format!("{path}.targets[{index}]"),
                "UNKNOWN_VALUE",
                "EVENT_TYPE_IDENTIFY or EVENT_TYPE_TRACK; leave targets empty for both",
            ),
        }
    }
    (in_identify, in_track)
}

fn parse_privacy(found: &mut Violations, path: &str, value: i32) -> Privacy {
    use proto::Privacy as P;
    match P::try_from(value) {
        Ok(P::Unspecified | P::Pass) => Privacy::Pass,
        Ok(P::Hash) => Privacy::Hash,
        Ok(P::Drop) => Privacy::Drop,
        Err(_) => {
            found.add(
                format!("{path}.privacy"),
                "UNKNOWN_VALUE",
                "PASS, HASH or DROP",
            );
            Privacy::Drop
        }
    }
}

fn parse_value_type(found: &mut Violations, path: &str, value: i32) -> Option<ValueType> {
    use proto::ValueType as P;
    match P::try_from(value) {
        Ok(P::Unspecified) => None,
        Ok(P::String) => Some(ValueType::String),
        Ok(P::Number) => Some(ValueType::Number),
        Ok(P::Bool) => Some(ValueType::Bool),
        Ok(P::Timestamp) => Some(ValueType::Timestamp),
        Ok(P::List) => Some(ValueType::List),
        Err(_) => {
            found.add(
                format!("{path}.value_type"),
                "UNKNOWN_VALUE",
                "STRING, NUMBER, BOOL, TIMESTAMP or LIST; leave it out for any",
            );
            None
        }
    }
}
