//! `[[integrations]]`: the file's form of the schema's `Integration`.
//!
//! Only the form is checked here, and where the write keys come from; what makes
//! an integration work is told by the caller's `validate`, whose field paths are
//! mapped back onto the file.

use std::{collections::BTreeMap, path::Path};

use toml::de::{DeTable, DeValue};

use crate::proto::{
    Credential, DataRegion, EmailNormalization, EventType, FieldMapping, Integration, Privacy,
    UnmappedAttributes, ValueType,
};

use super::{
    Outside,
    document::Document,
    fault::{Faults, Place, named, nearest, quoted, unknown},
    reader::Reader,
    value::{Parsed, Raw, boolean, list, text, word},
};

/// The ways to give a write key.
const KEY_SOURCES: [&str; 3] = ["write_key", "write_key_env", "write_key_file"];

/// Reads all integrations of the file.
pub(super) fn take(from: &mut Reader<'_>, outside: &Outside<'_>) -> Vec<Integration> {
    let Some(document) = from.file_alone("integrations") else {
        return Vec::new();
    };
    let root = Entry {
        document,
        table: document.table(),
        path: String::new(),
        place: document.place(0),
        known: Vec::new(),
        holds_secrets: false,
    };
    let mut ids = BTreeMap::new();
    let mut integrations = Vec::new();
    for mut entry in root.tables("integrations", &mut from.faults) {
        let integration = integration(&mut entry, from, outside);
        for violation in (outside.validate)(&integration) {
            let (path, place) = entry.locate(&violation.field);
            // A value that could not be read looks missing to the validation.
            if !from.faults.names(&path) {
                from.faults.add(place, path, violation.description);
            }
        }
        let (path, place) = entry.locate("integration.integration_id");
        let id = &integration.integration_id;
        match ids.get(id) {
            Some(first) if !id.is_empty() => {
                let message = format!("{} is taken already, at {first}", quoted(id));
                from.faults.add(place, path, message);
            }
            _ => {
                ids.insert(id.clone(), place);
            }
        }
        integrations.push(integration);
    }
    integrations
}

fn integration(entry: &mut Entry<'_>, from: &mut Reader<'_>, outside: &Outside<'_>) -> Integration {
    let faults = &mut from.faults;
    let mut integration = Integration {
        integration_id: entry.take("integration_id", text, faults),
        display_name: entry.take("display_name", text, faults),
        event_name: entry.take("event_name", text, faults),
        enabled: entry.take("enabled", |raw| boolean(raw).map(Some), faults),
        unmapped_attributes: entry.take(
            "unmapped_attributes",
            word(UnmappedAttributes::as_str_name),
            faults,
        ),
        email_normalization: entry.take(
            "email_normalization",
            word(EmailNormalization::as_str_name),
            faults,
        ),
        ..Integration::default()
    };
    entry.known.extend(["mappings", "credentials"]);
    for mut mapping in entry.tables("mappings", faults) {
        integration.mappings.push(FieldMapping {
            attribute_id: mapping.take("attribute_id", text, faults),
            segment_key: mapping.take("segment_key", text, faults),
            value_type: mapping.take("value_type", word(ValueType::as_str_name), faults),
            required: mapping.take("required", boolean, faults),
            privacy: mapping.take("privacy", word(Privacy::as_str_name), faults),
            targets: mapping.take("targets", list(word(EventType::as_str_name)), faults),
        });
        mapping.find_unknown(faults);
    }
    entry.find_unknown(faults);
    for mut credential in entry.tables("credentials", faults) {
        // A key in the wrong line is not to be shown either.
        credential.holds_secrets = true;
        let region = word(DataRegion::as_str_name);
        integration.credentials.push(Credential {
            data_region: credential.take("data_region", region, &mut from.faults),
            write_key: write_key(&mut credential, from, outside),
            ..Credential::default()
        });
        credential.find_unknown(&mut from.faults);
    }
    integration
}

/// The write key, out of the one place that is named for it. Empty, and noted,
/// where it could not be had.
fn write_key(entry: &mut Entry<'_>, from: &mut Reader<'_>, outside: &Outside<'_>) -> String {
    entry.known.extend(KEY_SOURCES);
    let path = entry.path_of("write_key");
    let given: Vec<_> = KEY_SOURCES
        .into_iter()
        .filter_map(|name| Some((name, entry.table.get_key_value(name)?)))
        .collect();
    let [(name, (key, value))] = given.as_slice() else {
        let message = format!("give exactly one of {}", KEY_SOURCES.join(", "));
        from.faults.add(entry.place.clone(), path, message);
        return String::new();
    };
    let found = match value.get_ref() {
        DeValue::String(text) => match *name {
            "write_key_env" => from_variable(text, from),
            "write_key_file" => (outside.read_key_file)(Path::new(text.as_ref()))
                .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
                .map_err(|error| format!("write_key_file cannot be read: {error}")),
            _ => Ok(text.to_string()),
        },
        _ => Err(format!("{name} must be a text")),
    };
    found.unwrap_or_else(|message| {
        let place = entry.document.place(key.span().start);
        from.faults.add(place, path, message);
        String::new()
    })
}

fn from_variable(name: &str, from: &mut Reader<'_>) -> Result<String, String> {
    if let Some(value) = from.refer(name) {
        return Ok(value.to_owned());
    }
    // Somebody may have put the key itself there, and keys mix cases.
    let is_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    let shown = if !name.is_empty() && name.chars().all(is_name) {
        named(name)
    } else {
        "named by write_key_env".to_owned()
    };
    Err(format!("the variable {shown} is not set, or not UTF-8"))
}

/// One table of the file, read key by key.
struct Entry<'a> {
    document: &'a Document<'a>,
    table: &'a DeTable<'a>,
    /// Its path, e.g. `integrations[0].mappings[2]`.
    path: String,
    place: Place,
    known: Vec<&'static str>,
    holds_secrets: bool,
}

impl<'a> Entry<'a> {
    /// The value of `key`, or the default where it is missing or, noted, bad.
    fn take<T: Default>(
        &mut self,
        key: &'static str,
        parse: impl Fn(Raw<'_>) -> Parsed<T>,
        faults: &mut Faults,
    ) -> T {
        self.known.push(key);
        let Some((at, value)) = self.table.get_key_value(key) else {
            return T::default();
        };
        let raw = Raw::Toml(value.get_ref());
        parse(raw).unwrap_or_else(|expected| {
            let expected = if self.holds_secrets {
                expected.hide()
            } else {
                expected
            };
            let place = self.document.place(at.span().start);
            faults.add(place, self.path_of(key), expected.not(raw));
            T::default()
        })
    }

    /// The tables of the array `key`.
    fn tables(&self, key: &'static str, faults: &mut Faults) -> Vec<Entry<'a>> {
        let Some((at, value)) = self.table.get_key_value(key) else {
            return Vec::new();
        };
        let entries = match value.get_ref() {
            DeValue::Array(entries) => entries.as_ref(),
            _ => &[],
        };
        let tables: Vec<_> = entries
            .iter()
            .enumerate()
            .filter_map(|(index, entry)| match entry.get_ref() {
                DeValue::Table(table) => Some(Entry {
                    document: self.document,
                    table,
                    path: format!("{}[{index}]", self.path_of(key)),
                    place: self.document.place(entry.span().start),
                    known: Vec::new(),
                    holds_secrets: self.holds_secrets,
                }),
                _ => None,
            })
            .collect();
        let is_array = matches!(value.get_ref(), DeValue::Array(_));
        if !is_array || tables.len() < entries.len() {
            let parent = self.path.split('[').next().unwrap_or("");
            let header = [parent, key].join(".");
            let place = self.document.place(at.span().start);
            let header = header.trim_start_matches('.');
            let message = format!("must be an array of tables: write [[{header}]]");
            faults.add(place, self.path_of(key), message);
        }
        tables
    }

    /// Notes the keys that were not taken.
    fn find_unknown(&self, faults: &mut Faults) {
        for key in self.table.keys() {
            let name: &str = key.get_ref();
            if self.known.contains(&name) {
                continue;
            }
            let known = self.known.iter().copied().filter(|_| !faults.is_full());
            let meant = nearest(name, known);
            let place = self.document.place(key.span().start);
            faults.add(place, self.path_of(&named(name)), unknown(meant));
        }
    }

    /// Path and place that are nearest to a violation's field, such as
    /// `integration.mappings[2].segment_key`.
    fn locate(&self, field: &str) -> (String, Place) {
        let (_, field) = field.split_once('.').unwrap_or(("", ""));
        if field.is_empty() {
            return (self.path.clone(), self.place.clone());
        }
        let mut place = self.place.clone();
        let mut table = self.table;
        for step in field.split('.') {
            let (name, index) = match step.split_once('[') {
                Some((name, index)) => (name, index.trim_end_matches(']').parse::<usize>().ok()),
                None => (step, None),
            };
            let found = table.get_key_value(name).or_else(|| {
                let sources = KEY_SOURCES.iter().filter(|_| name == "write_key");
                sources.filter_map(|name| table.get_key_value(*name)).next()
            });
            let Some((key, value)) = found else { break };
            place = self.document.place(key.span().start);
            let (DeValue::Array(entries), Some(index)) = (value.get_ref(), index) else {
                break;
            };
            let Some(entry) = entries.get(index) else {
                break;
            };
            place = self.document.place(entry.span().start);
            match entry.get_ref() {
                DeValue::Table(inner) => table = inner,
                _ => break,
            }
        }
        (self.path_of(field), place)
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }
}
