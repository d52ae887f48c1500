//! One TOML text with the places of its keys.

use std::{collections::BTreeSet, sync::Arc};

use toml::de::{DeTable, DeValue};

use super::fault::{Faults, Place};

/// Up to here a column counts characters, and bytes beyond it: a file of one
/// long line is not to be counted through for each of its keys.
const MAX_COUNTED_BYTES: usize = 4096;

/// A parsed TOML text.
pub(super) struct Document<'a> {
    name: Arc<str>,
    text: &'a str,
    /// Offset of each line's first byte.
    line_starts: Vec<usize>,
    table: DeTable<'a>,
    /// Lines (from 1) with a breach of the syntax: their values are guesses.
    broken_lines: BTreeSet<usize>,
}

impl<'a> Document<'a> {
    /// Parses `text` and notes every breach of TOML's syntax.
    pub(super) fn parse(name: &str, text: &'a str, faults: &mut Faults) -> Self {
        let (table, errors) = DeTable::parse_recoverable(text);
        let newlines = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let mut document = Self {
            name: name.into(),
            text,
            line_starts: [0]
                .into_iter()
                .chain(newlines.map(|(index, _)| index + 1))
                .collect(),
            table: table.into_inner(),
            broken_lines: BTreeSet::new(),
        };
        for error in errors {
            let offset = error.span().map_or(text.len(), |span| span.start);
            let (line, _) = document.line_and_column(offset);
            // What follows on a line that is broken already is mostly its echo.
            if document.broken_lines.insert(line) {
                // The message alone: toml's Display quotes the line, which may
                // hold a write key.
                let message = format!("not valid TOML: {}", error.message());
                faults.add(document.place(offset), "", message);
            }
        }
        document
    }

    /// Whether all of the text follows TOML's syntax.
    pub(super) fn is_sound(&self) -> bool {
        self.broken_lines.is_empty()
    }

    /// The root table.
    pub(super) fn table(&self) -> &DeTable<'a> {
        &self.table
    }

    /// Place and value of a setting, `section.name`. None where it is missing,
    /// or where one of its lines breaks the syntax: the value is then a guess,
    /// and may have swallowed other lines.
    pub(super) fn get(&self, key: &str) -> Option<(Place, &DeValue<'a>)> {
        let (sections, name) = key.rsplit_once('.').unwrap_or(("", key));
        let mut table = &self.table;
        for section in sections.split('.').filter(|section| !section.is_empty()) {
            match table.get(section)?.get_ref() {
                DeValue::Table(inner) => table = inner,
                _ => return None,
            }
        }
        let (key, value) = table.get_key_value(name)?;
        let offset = key.span().start;
        let (first, _) = self.line_and_column(offset);
        let (last, _) = self.line_and_column(value.span().end.max(offset));
        let is_broken = self.broken_lines.range(first..=last).next().is_some();
        (!is_broken).then(|| (self.place(offset), value.get_ref()))
    }

    /// The place of the byte at `offset`.
    pub(super) fn place(&self, offset: usize) -> Place {
        Place::File {
            name: Arc::clone(&self.name),
            at: Some(self.line_and_column(offset)),
        }
    }

    fn line_and_column(&self, offset: usize) -> (usize, usize) {
        let line = self.line_starts.partition_point(|start| *start <= offset);
        let start = self.line_starts.get(line - 1).copied().unwrap_or(0);
        let before = match self.text.get(start..offset) {
            Some(before) if before.len() <= MAX_COUNTED_BYTES => before.chars().count(),
            _ => offset - start,
        };
        (line, before + 1)
    }
}
