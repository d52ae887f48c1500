//! Canonical proto JSON of the contract's messages, by their descriptors.

use std::{io::Write, sync::LazyLock};

use prost::Message;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, ReflectMessage, SerializeOptions,
};

use super::failure::ClientError;
use crate::proto;

/// The package of the contract.
const PACKAGE: &str = "jebbit.segmentrelay.v1";

static POOL: LazyLock<Option<DescriptorPool>> =
    LazyLock::new(|| DescriptorPool::decode(proto::FILE_DESCRIPTOR_SET).ok());

/// Why a JSON text is not the message.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct JsonError(String);

fn empty(name: &str) -> Result<DynamicMessage, JsonError> {
    let full = format!("{PACKAGE}.{name}");
    let described = POOL
        .as_ref()
        .and_then(|pool| pool.get_message_by_name(&full));
    described
        .map(DynamicMessage::new)
        .ok_or_else(|| JsonError(format!("no message {full}")))
}

/// A message of the contract as JSON, on one line or laid out. `name` is its
/// name without the package.
///
/// # Errors
/// `name` is not the message's.
pub fn to_json(message: &impl Message, name: &str, pretty: bool) -> Result<String, JsonError> {
    let mut dynamic = empty(name)?;
    dynamic
        .merge(message.encode_to_vec().as_slice())
        .map_err(|error| JsonError(error.to_string()))?;
    let mut text = Vec::new();
    let options = SerializeOptions::new().skip_default_fields(true);
    let written = if pretty {
        dynamic.serialize_with_options(&mut serde_json::Serializer::pretty(&mut text), &options)
    } else {
        dynamic.serialize_with_options(&mut serde_json::Serializer::new(&mut text), &options)
    };
    written.map_err(|error| JsonError(error.to_string()))?;
    String::from_utf8(text).map_err(|error| JsonError(error.to_string()))
}

/// A message of the contract from JSON. Unknown fields are errors.
///
/// # Errors
/// What is wrong with the text, with line and column.
pub fn from_json<M: Message + Default>(text: &str, name: &str) -> Result<M, JsonError> {
    let wrong = |error: &dyn std::fmt::Display| JsonError(error.to_string());
    let descriptor = empty(name)?.descriptor();
    let mut reader = serde_json::Deserializer::from_str(text);
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let dynamic = DynamicMessage::deserialize_with_options(descriptor, &mut reader, &options)
        .map_err(|error| wrong(&error))?;
    reader.end().map_err(|error| wrong(&error))?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(|error| wrong(&error))
}

/// Prints an answer.
pub(super) fn write_json(
    out: &mut impl Write,
    json: Result<String, JsonError>,
) -> Result<(), ClientError> {
    let text = json.map_err(|error| ClientError::Answer(error.to_string()))?;
    Ok(writeln!(out, "{text}")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Capture, attribute_value::Kind};

    #[test]
    fn a_capture_round_trips_by_canonical_json() {
        let text = r#"{"email":"a@example.com","campaignId":"c",
            "occurTime":"2021-03-12T00:00:00Z","dataRegion":"DATA_REGION_EU",
            "attributes":{"n":{"integerValue":"7"},"l":{"listValue":{"values":["x"]}}}}"#;
        let capture: Capture = from_json(text, "Capture").expect("a capture");
        assert_eq!(
            capture.occur_time.map(|time| time.seconds),
            Some(1_615_507_200)
        );
        assert_eq!(capture.attributes["n"].kind, Some(Kind::IntegerValue(7)));
        let back = to_json(&capture, "Capture", false).expect("JSON");
        let again: Capture = from_json(&back, "Capture").expect("a capture");
        assert_eq!(again, capture);
        assert!(back.contains(r#""dataRegion":"DATA_REGION_EU""#), "{back}");
    }

    #[test]
    fn unknown_fields_and_trailing_text_are_errors() {
        for (bad, told) in [
            (r#"{"emial":"x"}"#, "emial"),
            (r#"{"email":1}"#, "line 1"),
            (r#"{} {}"#, "trailing"),
        ] {
            let error = from_json::<Capture>(bad, "Capture")
                .expect_err("wrong")
                .to_string();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn numbers_keep_their_last_digit() {
        let text = r#"{"attributes":{"n":{"numberValue":31.245270191439438}}}"#;
        let capture: Capture = from_json(text, "Capture").expect("a capture");
        let number = capture.attributes["n"].kind.clone();
        assert_eq!(number, Some(Kind::NumberValue(31.245_270_191_439_438)));
    }
}
