//! JSON values read only as far as the checks need: kinds, texts and member counts
//! instead of trees, in one pass and mostly without allocating.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A JSON value without its insides.
#[derive(Debug, PartialEq)]
pub(super) enum Light<'a> {
    Null,
    Bool,
    Number,
    Text(Cow<'a, str>),
    Array,
    Object(Members),
}

/// What is to know about an object's members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Members {
    pub(super) count: usize,
    /// A name occurs twice, here or in an object as deep as was looked.
    pub(super) repeated: bool,
}

/// An object's key, borrowed unless it has escapes.
#[derive(Deserialize)]
pub(super) struct Key<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

/// Told of each member of an object: its key and value.
pub(super) type OnMember<'w> = &'w mut dyn FnMut(&str, &Light<'_>);

/// Reads a [`Light`], and the values of its members too down to `depth` levels.
pub(super) struct LightSeed<'w> {
    pub(super) depth: u8,
    /// Needs a `depth` of at least 1.
    pub(super) on_member: Option<OnMember<'w>>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Light<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seed = LightSeed {
            depth: 0,
            on_member: None,
        };
        seed.deserialize(deserializer)
    }
}

impl<'de> DeserializeSeed<'de> for LightSeed<'_> {
    type Value = Light<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Light<'de>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for LightSeed<'_> {
    type Value = Light<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Light<'de>, E> {
        Ok(Light::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Light<'de>, E> {
        Ok(Light::Bool)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Light<'de>, E> {
        Ok(Light::Number)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Light<'de>, E> {
        Ok(Light::Number)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Light<'de>, E> {
        Ok(Light::Number)
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Light<'de>, E> {
        Ok(Light::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Light<'de>, E> {
        Ok(Light::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Light<'de>, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Light::Array)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Light<'de>, A::Error> {
        let mut names = Vec::new();
        let mut members = Members::default();
        while let Some(Key(key)) = map.next_key()? {
            names.push(fnv_1a(key.as_bytes()));
            let Some(depth) = self.depth.checked_sub(1) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let value = map.next_value_seed(LightSeed {
                depth,
                on_member: None,
            })?;
            if let Light::Object(inner) = &value {
                members.repeated |= inner.repeated;
            }
            if let Some(on_member) = &mut self.on_member {
                on_member(&key, &value);
            }
        }
        members.count = names.len();
        names.sort_unstable();
        members.repeated |= names.windows(2).any(|pair| pair[0] == pair[1]);
        Ok(Light::Object(members))
    }
}

/// 64-bit FNV-1a: tells apart the few names of an object, cheaply.
fn fnv_1a(bytes: &[u8]) -> u64 {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str, depth: u8) -> Light<'_> {
        let mut deserializer = serde_json::Deserializer::from_str(json);
        LightSeed {
            depth,
            on_member: None,
        }
        .deserialize(&mut deserializer)
        .expect("fine JSON")
    }

    #[test]
    fn each_kind_is_told_from_the_others() {
        assert_eq!(read("null", 0), Light::Null);
        assert_eq!(read("true", 0), Light::Bool);
        for number in ["1", "-1", "1.5", "18446744073709551616"] {
            assert_eq!(read(number, 0), Light::Number);
        }
        assert_eq!(read(r#""a""#, 0), Light::Text("a".into()));
        assert_eq!(read(r#""\u0061\n""#, 0), Light::Text("a\n".into()));
        assert_eq!(read("[1,[2],{}]", 0), Light::Array);
        let two = Members {
            count: 2,
            repeated: false,
        };
        assert_eq!(read(r#"{"a":{"x":1},"b":[]}"#, 0), Light::Object(two));
    }

    #[test]
    fn repeated_names_are_found_as_deep_as_asked() {
        let repeated = |json, depth| match read(json, depth) {
            Light::Object(members) => members.repeated,
            other => panic!("{other:?}"),
        };
        assert!(repeated(r#"{"a":1,"b":2,"a":3}"#, 0));
        assert!(repeated(r#"{"a":1,"\u0061":3}"#, 0));
        assert!(!repeated(r#"{"a":1,"A":3}"#, 0));
        assert!(!repeated(r#"{"q":{"a":1,"a":2}}"#, 0));
        assert!(repeated(r#"{"q":{"a":1,"a":2}}"#, 1));
    }
}
