//! Judges one event: what Segment's ingestion would do with it after the 200.
//!
//! Where an event has several faults, the first in the order of [`DropReason`]
//! (from `EventTooLarge` on) is told.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::entry::{DropReason, Dropped};
use super::light::{Light, LightSeed};

/// Largest event, in bytes.
pub(super) const MAX_EVENT_BYTES: usize = 32_768;
/// A `messageId` has fewer characters than this.
pub(super) const MESSAGE_ID_CHARS: usize = 100;
/// Most members of `properties` that Segment keeps.
const MAX_PROPERTIES: usize = 10_000;

/// What there is to say about one event.
#[derive(Debug)]
pub(super) struct CheckedEvent<'a> {
    /// The event as received.
    pub(super) text: &'a str,
    pub(super) verdict: Result<(), Dropped>,
    pub(super) message_id: Option<Cow<'a, str>>,
    pub(super) warnings: Vec<&'static str>,
}

/// Judges the JSON text of one event.
pub(super) fn check_event(text: &str) -> CheckedEvent<'_> {
    let mut warnings = Vec::new();
    let (mut verdict, message_id) = match Fields::read(text, &mut warnings) {
        Ok(fields) => (fields.verdict(&mut warnings), fields.message_id()),
        Err(error) => {
            let detail = if error.is_data() {
                "the event is not an object"
            } else {
                "the event has a number out of range or half a surrogate pair"
            };
            let reason = DropReason::TypeNotSupported;
            (Err(Dropped { reason, detail }), None)
        }
    };
    if text.len() > MAX_EVENT_BYTES {
        verdict = Err(DropReason::EventTooLarge.into());
    }
    CheckedEvent {
        text,
        verdict,
        message_id,
        warnings,
    }
}

/// Whether Segment would understand the time.
pub(super) fn is_iso_8601(text: &str) -> bool {
    // What jiff takes beyond ISO-8601: zone annotations and a blank for the T.
    if text.contains(['[', ' ', '_']) {
        return false;
    }
    text.parse::<jiff::Timestamp>().is_ok()
        || text.parse::<jiff::civil::DateTime>().is_ok()
        || text.parse::<jiff::civil::Date>().is_ok()
}

/// The form that the API asks for, `2021-03-12T00:00:00.000Z`, of a valid time.
fn is_utc_millis(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 24 && bytes.ends_with(b"Z") && bytes.get(19) == Some(&b'.')
}

/// The fields that matter, each `None` where missing.
#[derive(Default)]
struct Fields<'a> {
    kind: Option<Light<'a>>,
    user_id: Option<Light<'a>>,
    anonymous_id: Option<Light<'a>>,
    event: Option<Light<'a>>,
    properties: Option<Light<'a>>,
    traits: Option<Light<'a>>,
    timestamp: Option<Light<'a>>,
    message_id: Option<Light<'a>>,
    context: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "camelCase")]
enum Field {
    Type,
    UserId,
    AnonymousId,
    Event,
    Properties,
    Traits,
    Timestamp,
    MessageId,
    Context,
    #[serde(other)]
    Other,
}

impl<'a> Fields<'a> {
    fn read(text: &'a str, warnings: &mut Vec<&'static str>) -> serde_json::Result<Self> {
        let mut deserializer = serde_json::Deserializer::from_str(text);
        deserializer.deserialize_map(FieldsVisitor { warnings })
    }

    fn message_id(self) -> Option<Cow<'a, str>> {
        match self.message_id {
            Some(Light::Text(id)) if !id.is_empty() => Some(id),
            _ => None,
        }
    }

    fn verdict(&self, warnings: &mut Vec<&'static str>) -> Result<(), Dropped> {
        // Each check runs, so that none of the warnings is missed.
        let consent = check_consent(self.context, warnings);
        let times = self.check_timestamp(warnings);
        let message_id = self.check_message_id(warnings);
        self.check_kind()
            .and(self.check_ids())
            .and(self.check_name())
            .and(self.check_objects())
            .and(consent)
            .and(times)
            .and(message_id)
    }

    fn is_track(&self) -> bool {
        matches!(&self.kind, Some(Light::Text(kind)) if kind == "track")
    }

    fn check_kind(&self) -> Result<(), Dropped> {
        match &self.kind {
            Some(Light::Text(kind)) if kind == "identify" || kind == "track" => Ok(()),
            _ => Err(DropReason::TypeNotSupported.into()),
        }
    }

    fn check_ids(&self) -> Result<(), Dropped> {
        let mut found = false;
        for id in [&self.user_id, &self.anonymous_id] {
            match id {
                None | Some(Light::Null) => {}
                Some(Light::Text(text)) if !text.is_empty() => found = true,
                Some(_) => return Err(DropReason::IdNotString.into()),
            }
        }
        if found {
            Ok(())
        } else {
            Err(DropReason::NoUserAnonId.into())
        }
    }

    fn check_name(&self) -> Result<(), Dropped> {
        if !self.is_track() {
            return Ok(());
        }
        match &self.event {
            None | Some(Light::Null) => Err(DropReason::EventNotDefined.into()),
            Some(Light::Text(name)) if name.is_empty() => Err(DropReason::EventNotDefined.into()),
            Some(Light::Text(_)) => Ok(()),
            Some(_) => Err(DropReason::EventNotString.into()),
        }
    }

    fn check_objects(&self) -> Result<(), Dropped> {
        let is_object = |value: &Option<Light<'_>>| matches!(value, None | Some(Light::Object(_)));
        if !is_object(&self.properties) {
            return Err(DropReason::PropertiesNotObject.into());
        }
        if !is_object(&self.traits) {
            return Err(DropReason::TraitsNotObject.into());
        }
        Ok(())
    }

    fn check_timestamp(&self, warnings: &mut Vec<&'static str>) -> Result<(), Dropped> {
        match &self.timestamp {
            None => warnings.push("no_timestamp"),
            Some(Light::Text(time)) if is_iso_8601(time) => {
                if !is_utc_millis(time) {
                    warnings.push("timestamp_not_utc_millis");
                }
            }
            Some(_) => return Err(DropReason::TimestampInvalid.into()),
        }
        Ok(())
    }

    fn check_message_id(&self, warnings: &mut Vec<&'static str>) -> Result<(), Dropped> {
        match &self.message_id {
            None | Some(Light::Null) => warnings.push("no_message_id"),
            Some(Light::Text(id)) if id.is_empty() => warnings.push("no_message_id"),
            Some(Light::Text(id)) if id.chars().count() >= MESSAGE_ID_CHARS => {
                return Err(DropReason::MessageIdTooLong.into());
            }
            Some(Light::Text(_)) => {}
            Some(_) => warnings.push("message_id_not_string"),
        }
        Ok(())
    }
}

struct FieldsVisitor<'w> {
    warnings: &'w mut Vec<&'static str>,
}

impl<'de> Visitor<'de> for FieldsVisitor<'_> {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an event object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Fields::default();
        let mut repeated = false;
        while let Some(field) = map.next_key::<Field>()? {
            // Of a field that occurs twice the last counts, as with most parsers.
            let place = match field {
                Field::Type => &mut fields.kind,
                Field::UserId => &mut fields.user_id,
                Field::AnonymousId => &mut fields.anonymous_id,
                Field::Event => &mut fields.event,
                Field::Timestamp => &mut fields.timestamp,
                Field::MessageId => &mut fields.message_id,
                Field::Properties | Field::Traits => {
                    let is_traits = matches!(field, Field::Traits);
                    let value = read_members(&mut map, is_traits, self.warnings)?;
                    let place = if is_traits {
                        &mut fields.traits
                    } else {
                        &mut fields.properties
                    };
                    repeated |= place.replace(value).is_some();
                    continue;
                }
                Field::Context => {
                    repeated |= fields.context.replace(map.next_value()?).is_some();
                    continue;
                }
                Field::Other => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            repeated |= place.replace(map.next_value()?).is_some();
        }
        if repeated {
            self.warnings.push("repeated_field");
        }
        Ok(fields)
    }
}

/// Reads `properties` or `traits`, with the values of the reserved traits.
fn read_members<'de, A: MapAccess<'de>>(
    map: &mut A,
    is_traits: bool,
    warnings: &mut Vec<&'static str>,
) -> Result<Light<'de>, A::Error> {
    let mut on_member = |key: &str, value: &Light<'_>| {
        if is_traits {
            warnings.extend(check_trait(key, value));
        }
    };
    let value = map.next_value_seed(LightSeed {
        depth: 1,
        on_member: Some(&mut on_member),
    })?;
    if let Light::Object(members) = &value {
        if members.repeated {
            warnings.push("repeated_field_in_properties_or_traits");
        }
        if members.count > MAX_PROPERTIES {
            warnings.push("properties_truncated");
        }
    }
    Ok(value)
}

/// Fails where `context.consent` is there and not what Segment understands.
fn check_consent(
    context: Option<&RawValue>,
    warnings: &mut Vec<&'static str>,
) -> Result<(), Dropped> {
    #[derive(Deserialize)]
    struct Context<'a> {
        #[serde(borrow)]
        consent: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Consent<'a> {
        #[serde(borrow, default, deserialize_with = "null_is_a_value")]
        category_preferences: Option<&'a RawValue>,
    }
    let not_valid = |_error: serde_json::Error| Dropped::from(DropReason::ConsentNotValid);

    let Some(context) = context else {
        return Ok(());
    };
    // Told by the first character, since serde reads structs from arrays too.
    if !context.get().starts_with('{') {
        warnings.push("context_not_object");
        return Ok(());
    }
    let context: Context<'_> = serde_json::from_str(context.get()).map_err(not_valid)?;
    let Some(consent) = context.consent else {
        return Ok(());
    };
    if !consent.get().starts_with('{') {
        return Err(DropReason::ConsentNotValid.into());
    }
    let consent: Consent<'_> = serde_json::from_str(consent.get()).map_err(not_valid)?;
    let Some(categories) = consent.category_preferences else {
        warnings.push("consent_without_category_preferences");
        return Ok(());
    };
    serde_json::from_str::<HashMap<String, bool>>(categories.get()).map_err(not_valid)?;
    Ok(())
}

fn null_is_a_value<'de, D: Deserializer<'de>>(from: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

/// The warning about a reserved trait of the wrong type; `null` unsets a trait.
fn check_trait(name: &str, value: &Light<'_>) -> Option<&'static str> {
    let is_date = matches!(value, Light::Text(text) if is_iso_8601(text));
    let is_object = matches!(value, Light::Object(_));
    let is_text = matches!(value, Light::Text(_));
    let (fits, warning) = match name {
        "age" => (
            matches!(value, Light::Number),
            "trait_type: age is a number",
        ),
        "birthday" => (is_date, "trait_type: birthday is a date"),
        "createdAt" => (is_date, "trait_type: createdAt is a date"),
        "address" => (is_object, "trait_type: address is an object"),
        "company" => (is_object, "trait_type: company is an object"),
        "avatar" => (is_text, "trait_type: avatar is a string"),
        "description" => (is_text, "trait_type: description is a string"),
        "email" => (is_text, "trait_type: email is a string"),
        "firstName" => (is_text, "trait_type: firstName is a string"),
        "gender" => (is_text, "trait_type: gender is a string"),
        "id" => (is_text, "trait_type: id is a string"),
        "lastName" => (is_text, "trait_type: lastName is a string"),
        "name" => (is_text, "trait_type: name is a string"),
        "phone" => (is_text, "trait_type: phone is a string"),
        "title" => (is_text, "trait_type: title is a string"),
        "username" => (is_text, "trait_type: username is a string"),
        "website" => (is_text, "trait_type: website is a string"),
        _ => return None,
    };
    let fine = fits || matches!(value, Light::Null);
    (!fine).then_some(warning)
}

#[cfg(test)]
mod tests;
