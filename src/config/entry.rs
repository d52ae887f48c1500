//! Arrays of tables, such as `[[integrations]]`: the file alone has them.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::{
    Outside,
    document::Document,
    fault::{Faults, Place, named, nearest, unknown},
    reader::Reader,
    value::{Parsed, Raw},
};

/// The ways to give a write key.
pub(super) const KEY_SOURCES: [&str; 3] = ["write_key", "write_key_env", "write_key_file"];

/// The write key, out of the one place that is named for it. Empty, and noted,
/// where it could not be had.
pub(super) fn write_key(
    entry: &mut Entry<'_>,
    from: &mut Reader<'_>,
    outside: &Outside<'_>,
) -> String {
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
pub(super) struct Entry<'a> {
    document: &'a Document<'a>,
    table: &'a DeTable<'a>,
    /// Its path, e.g. `integrations[0].mappings[2]`.
    path: String,
    pub(super) place: Place,
    pub(super) known: Vec<&'static str>,
    pub(super) holds_secrets: bool,
}

impl<'a> Entry<'a> {
    /// The whole file.
    pub(super) fn root(document: &'a Document<'a>) -> Self {
        Self {
            document,
            table: document.table(),
            path: String::new(),
            place: document.place(0),
            known: Vec::new(),
            holds_secrets: false,
        }
    }

    /// The value of `key`, or the default where it is missing or, noted, bad.
    pub(super) fn take<T: Default>(
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
    pub(super) fn tables(&self, key: &'static str, faults: &mut Faults) -> Vec<Entry<'a>> {
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
    pub(super) fn find_unknown(&self, faults: &mut Faults) {
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
    pub(super) fn locate(&self, field: &str) -> (String, Place) {
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

    pub(super) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }
}
