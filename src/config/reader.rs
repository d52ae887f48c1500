//! Reads settings from three layers and notes what is wrong in each.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt::Display,
};

use toml::de::{DeTable, DeValue};

use super::{
    document::Document,
    fault::{Faults, Place, named, nearest, unknown},
    removed,
    value::{Parsed, Raw},
};

/// What the variables of the relay's settings begin with.
const PREFIX: &str = "SEGMENT_RELAY__";

/// The variables of the environment that are UTF-8. They may hold secrets, so
/// there is no `Debug`.
pub(super) struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Takes all variables, since an integration may refer to any of them, and
    /// notes those of the relay that are not UTF-8.
    pub(super) fn new<K: Into<OsString>, V: Into<OsString>>(
        variables: impl IntoIterator<Item = (K, V)>,
        faults: &mut Faults,
    ) -> Self {
        let mut known = BTreeMap::new();
        for (name, value) in variables {
            // A lossy name equals no setting's, and so is an unknown one.
            let name = name.into().to_string_lossy().into_owned();
            match value.into().into_string() {
                Ok(value) => {
                    known.insert(name, value);
                }
                Err(_) if name.starts_with(PREFIX) => {
                    faults.add(Place::variable(&name), "", "must be UTF-8");
                }
                Err(_) => {}
            }
        }
        Self(known)
    }

    /// The value of a variable.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

/// One source of a setting's value.
struct Layer<'a> {
    place: Place,
    raw: Raw<'a>,
    is_default: bool,
}

/// The layers.
struct Sources<'a> {
    environment: &'a Environment,
    file: Option<&'a Document<'a>>,
    defaults: &'a Document<'a>,
}

impl<'a> Sources<'a> {
    /// Those that set `key`, the strongest first.
    fn layers(&self, key: &str) -> Vec<Layer<'a>> {
        let variable = variable(key);
        let environment = self.environment.get(&variable).map(|text| Layer {
            place: Place::variable(&variable),
            raw: Raw::Variable(text),
            is_default: false,
        });
        let in_document = |document: &'a Document<'a>, is_default| {
            document.get(key).map(|(place, value)| Layer {
                place,
                raw: Raw::Toml(value),
                is_default,
            })
        };
        let file = self.file.and_then(|file| in_document(file, false));
        let default = in_document(self.defaults, true);
        environment.into_iter().chain(file).chain(default).collect()
    }
}

/// Takes settings one by one. What was not taken in the end is unknown.
pub(super) struct Reader<'a> {
    sources: Sources<'a>,
    /// Settings that exist.
    known: BTreeSet<&'static str>,
    /// Settings with a fault.
    refused: BTreeSet<&'static str>,
    /// Variables that an integration refers to.
    referred: BTreeSet<String>,
    /// What is wrong so far.
    pub(super) faults: Faults,
}

impl<'a> Reader<'a> {
    pub(super) fn new(
        environment: &'a Environment,
        file: Option<&'a Document<'a>>,
        defaults: &'a Document<'a>,
        faults: Faults,
    ) -> Self {
        Self {
            sources: Sources {
                environment,
                file,
                defaults,
            },
            known: BTreeSet::new(),
            refused: BTreeSet::new(),
            referred: BTreeSet::new(),
            faults,
        }
    }

    /// The strongest good value of `key`; a bad one is noted and passed over.
    /// None, noted as well, only where the default is missing or bad, which the
    /// tests rule out.
    pub(super) fn take<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(Raw<'_>) -> Parsed<T>,
    ) -> Option<T> {
        self.known.insert(key);
        let mut strongest = None;
        let mut has_default = false;
        for layer in self.sources.layers(key) {
            has_default |= layer.is_default;
            match parse(layer.raw) {
                Ok(value) => strongest = strongest.or(Some(value)),
                Err(expected) => {
                    self.refused.insert(key);
                    let message = expected.not(layer.raw);
                    self.faults.add(layer.place, key, message);
                }
            }
        }
        if !has_default {
            let place = self.sources.defaults.place(0);
            self.faults.add(place, key, "has no default");
        }
        strongest
    }

    /// Notes a fault where the first setting is greater than the second.
    pub(super) fn at_most<T: PartialOrd + Display>(
        &mut self,
        (low_key, low): (&'static str, T),
        (high_key, high): (&'static str, T),
    ) {
        let message = format!("{low_key} = {low} must be at most {high_key} = {high}");
        self.check(low <= high, [low_key, high_key], &message);
    }

    /// Notes a fault about some settings unless `fits`, or unless one of them has
    /// (or may have, in a broken file) a fault and stands here with a weaker
    /// value.
    pub(super) fn check<const N: usize>(
        &mut self,
        fits: bool,
        keys: [&'static str; N],
        message: &str,
    ) {
        let is_broken = self.sources.file.is_some_and(|file| !file.is_sound());
        if fits || is_broken || keys.iter().any(|key| self.refused.contains(key)) {
            return;
        }
        // Where somebody set one of them, that is the place to look at.
        let blamed = keys
            .into_iter()
            .filter_map(|key| Some((key, self.sources.layers(key).into_iter().next()?)))
            .min_by_key(|(_, layer)| layer.is_default);
        if let Some((key, layer)) = blamed {
            self.faults.add(layer.place, key, message);
        }
    }

    /// The file, for what it alone can hold under `key`. None where its syntax
    /// is broken, since tables may then hold what belongs to others.
    pub(super) fn file_alone(&mut self, key: &'static str) -> Option<&'a Document<'a>> {
        self.known.insert(key);
        self.sources.file.filter(|file| file.is_sound())
    }

    /// The value of a variable that the file refers to.
    pub(super) fn refer(&mut self, variable: &str) -> Option<&'a str> {
        self.referred.insert(variable.to_owned());
        self.sources.environment.get(variable)
    }

    /// Everything that was wrong, in order, with whatever was not taken.
    pub(super) fn finish(mut self) -> Faults {
        let documents = [Some(self.sources.defaults), self.sources.file];
        for document in documents.into_iter().flatten() {
            if document.is_sound() {
                self.find_unknown(document, document.table(), "");
            }
        }
        self.find_unknown_variables();
        self.faults.sort();
        self.faults
    }

    fn find_unknown(&mut self, document: &Document<'_>, table: &DeTable<'_>, section: &str) {
        for (key, value) in table {
            let name: &str = key.get_ref();
            // A quoted key may hold a dot, and then names no setting.
            let path = match section {
                _ if name.contains('.') => named(name),
                "" => name.to_owned(),
                section => format!("{section}.{name}"),
            };
            if self.known.contains(path.as_str()) {
                continue;
            }
            let below = format!("{path}.");
            let is_section = self.known.iter().any(|known| known.starts_with(&below));
            match value.get_ref() {
                DeValue::Table(inner) if is_section => self.find_unknown(document, inner, &path),
                _ => {
                    let message = if is_section {
                        format!("is a section: write [{path}] and its settings below")
                    } else {
                        removed::section(&path)
                            .unwrap_or_else(|| unknown(self.meant(section, name)))
                    };
                    let path = match section {
                        "" => named(name),
                        section => format!("{section}.{}", named(name)),
                    };
                    self.faults
                        .add(document.place(key.span().start), path, message);
                }
            }
        }
    }

    /// The name that `name` in `section` is probably meant to be: a similar one
    /// of this section, or the same of another.
    fn meant(&self, section: &str, name: &str) -> Option<&'static str> {
        if self.faults.is_full() {
            return None;
        }
        let siblings = self.known.iter().filter_map(|known| {
            let rest = match section {
                "" => known,
                section => known.strip_prefix(section)?.strip_prefix('.')?,
            };
            rest.split('.').next()
        });
        nearest(name, siblings).or_else(|| {
            let mut known = self.known.iter().copied();
            known.find(|known| known.rsplit('.').next() == Some(name))
        })
    }

    fn find_unknown_variables(&mut self) {
        let known: BTreeSet<String> = self.known.iter().map(|key| variable(key)).collect();
        let integrations = variable("integrations");
        let given = self.sources.environment.0.keys();
        for name in given.filter(|name| name.starts_with(PREFIX)) {
            if name.starts_with(&integrations) {
                let message = "integrations are taken from the file alone";
                self.faults.add(Place::variable(name), "", message);
            } else if !known.contains(name) && !self.referred.contains(name) {
                let mut words = name.split("__").skip(1);
                let message = words.next().and_then(removed::section);
                let message = message
                    .unwrap_or_else(|| unknown(nearest(name, known.iter().map(String::as_str))));
                self.faults.add(Place::variable(name), "", message);
            }
        }
    }
}

/// The variable that sets `key`.
fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.to_ascii_uppercase().replace('.', "__"))
}
