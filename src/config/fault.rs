//! What is wrong in a configuration, and where.

use std::{fmt, sync::Arc};

use crate::text::first_chars;

/// How many faults are kept and printed; the others are counted.
pub const MAX_FAULTS: usize = 100;

/// Longest piece of a configured text in a fault, in characters.
const MAX_QUOTED_CHARS: usize = 64;

/// Where a setting was given.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In a file.
    File {
        /// The file's name, as it was given.
        name: Arc<str>,
        /// Line and column (in characters), both from 1. `None` where the whole
        /// file is meant.
        at: Option<(usize, usize)>,
    },
    /// In the environment.
    Environment {
        /// The variable's name.
        variable: String,
    },
}

impl Place {
    /// A file as a whole.
    pub(super) fn file(name: &str) -> Self {
        Self::File {
            name: name.into(),
            at: None,
        }
    }

    /// A variable of the environment.
    pub(super) fn variable(name: &str) -> Self {
        Self::Environment {
            variable: name.to_owned(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { name, at: None } => f.write_str(name),
            Self::File {
                name,
                at: Some((line, column)),
            } => write!(f, "{name}:{line}:{column}"),
            Self::Environment { variable } => write!(f, "environment {}", named(variable)),
        }
    }
}

/// One thing that is wrong. Never holds the value of a secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// Where it is.
    pub place: Place,
    /// The setting, e.g. `server.listen` or `integrations[0].mappings[2].privacy`.
    /// Empty where it is not about one.
    pub key: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A variable's name tells the setting already.
        if self.key.is_empty() || matches!(self.place, Place::Environment { .. }) {
            write!(f, "{}: {}", self.place, self.message)
        } else {
            write!(f, "{}: {}: {}", self.place, self.key, self.message)
        }
    }
}

/// Everything that is wrong in a configuration, up to [`MAX_FAULTS`].
#[derive(Debug, Default)]
pub struct Faults {
    found: Vec<Fault>,
    left_out: usize,
}

impl Faults {
    /// The faults that were kept: those of files first, by name and line, then
    /// those of the environment by name.
    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.found.iter()
    }

    /// How many there are, also those that were not kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.found.len() + self.left_out
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Whether further faults are only counted.
    pub(super) fn is_full(&self) -> bool {
        self.found.len() >= MAX_FAULTS
    }

    /// Whether something was noted about this very key.
    pub(super) fn names(&self, key: &str) -> bool {
        self.found.iter().any(|fault| fault.key == key)
    }

    pub(super) fn add(&mut self, place: Place, key: impl Into<String>, message: impl Into<String>) {
        if self.is_full() {
            self.left_out += 1;
            return;
        }
        self.found.push(Fault {
            place,
            key: key.into(),
            message: message.into(),
        });
    }

    /// Puts them into the order of [`iter`](Self::iter).
    pub(super) fn sort(&mut self) {
        self.found.sort();
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.len() == 1 { "" } else { "s" };
        write!(f, "{} fault{plural} in the configuration:", self.len())?;
        for fault in &self.found {
            write!(f, "\n  {fault}")?;
        }
        if self.left_out > 0 {
            write!(f, "\n  … and {} more", self.left_out)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// `text` in quotes, escaped and cut to a bounded length.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", escaped(text))
}

/// `name` as it is where that is plain to read, in quotes otherwise.
pub(super) fn named(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if !name.is_empty() && name.len() <= MAX_QUOTED_CHARS && name.chars().all(plain) {
        name.to_owned()
    } else {
        quoted(name)
    }
}

/// The first line of `text`, escaped and cut to a bounded length. A string with
/// a forgotten end may hold other lines of the file, and secrets in them.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for (index, c) in text.chars().enumerate() {
        if index == MAX_QUOTED_CHARS || c == '\n' {
            out.push('…');
            break;
        }
        out.extend(c.escape_debug());
    }
    out
}

/// The known name that `name` is probably meant to be: a similar one, or one that
/// only adds a unit.
pub(super) fn nearest<'k>(name: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    // Bounded, since the distance takes the product of both lengths.
    let name = first_chars(name, MAX_QUOTED_CHARS);
    let close_enough = (name.chars().count() / 3).max(1);
    let distance = |known: &str| match known.strip_prefix(name) {
        Some(rest) if rest.starts_with('_') => 0,
        _ => strsim::damerau_levenshtein(name, known),
    };
    known
        .map(|known| (distance(known), known))
        .filter(|(distance, _)| *distance <= close_enough)
        .min()
        .map(|(_, known)| known)
}

/// `unknown`, with the name that was probably meant.
pub(super) fn unknown(meant: Option<&str>) -> String {
    match meant {
        Some(meant) => format!("unknown; did you mean {meant}?"),
        None => "unknown".to_owned(),
    }
}
