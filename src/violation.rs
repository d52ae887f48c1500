//! Rules that input breaks, collected so that all of them are answered at once.

use crate::proto::FieldViolation;

/// How many violations one answer lists at the most.
pub const MAX_VIOLATIONS: usize = 100;

/// Longest piece of a caller's own text (an attribute id in a path), in characters.
const MAX_QUOTED_CHARS: usize = 64;

/// One rule that one field breaks. Never holds the field's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field in the request, e.g. `capture.attributes["age_group"]`.
    pub field: String,
    /// Stable word for programs.
    pub reason: &'static str,
    /// What is wrong and what would be right, for people.
    pub description: String,
}

impl From<Violation> for FieldViolation {
    fn from(violation: Violation) -> Self {
        Self {
            field: violation.field,
            reason: violation.reason.to_owned(),
            description: violation.description,
        }
    }
}

/// Collects violations up to [`MAX_VIOLATIONS`]; what comes after that is
/// counted and summed up in the last entry.
#[derive(Debug, Default)]
pub struct Violations {
    found: Vec<Violation>,
    left_out: usize,
}

impl Violations {
    /// Notes that `field` breaks a rule.
    pub fn add(
        &mut self,
        field: impl Into<String>,
        reason: &'static str,
        description: impl Into<String>,
    ) {
        if self.found.len() + 1 < MAX_VIOLATIONS {
            self.found.push(Violation {
                field: field.into(),
                reason,
                description: description.into(),
            });
        } else {
            self.left_out += 1;
        }
    }

    /// Whether nothing was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// `Ok(value)` where nothing was found.
    ///
    /// # Errors
    /// Everything that was found, in the order in which it was found.
    pub fn or_ok<T>(mut self, value: T) -> Result<T, Vec<Violation>> {
        if self.found.is_empty() {
            return Ok(value);
        }
        if self.left_out > 0 {
            self.found.push(Violation {
                field: String::new(),
                reason: "MORE_VIOLATIONS",
                description: format!("{} more violations are not listed", self.left_out),
            });
        }
        Err(self.found)
    }
}

/// `parent["key"]`, with the key cut to a bounded length and its control
/// characters and quotes escaped.
#[must_use]
pub fn entry_path(parent: &str, key: &str) -> String {
    let mut path = String::with_capacity(parent.len() + key.len().min(MAX_QUOTED_CHARS) + 4);
    path.push_str(parent);
    path.push_str("[\"");
    for (index, c) in key.chars().enumerate() {
        if index == MAX_QUOTED_CHARS {
            path.push('…');
            break;
        }
        path.extend(c.escape_debug());
    }
    path.push_str("\"]");
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn violations_beyond_the_bound_are_counted_in_the_last_entry() {
        let mut violations = Violations::default();
        for index in 0..MAX_VIOLATIONS + 7 {
            violations.add(format!("f{index}"), "REQUIRED", "set it");
        }
        let found = violations.or_ok(()).expect_err("there were violations");
        assert_eq!(found.len(), MAX_VIOLATIONS);
        assert_eq!(
            found.last().map(|last| last.description.as_str()),
            Some("8 more violations are not listed")
        );
    }

    #[test]
    fn entry_paths_are_bounded_and_escaped() {
        assert_eq!(
            entry_path("capture.attributes", "age_group"),
            r#"capture.attributes["age_group"]"#
        );
        assert_eq!(entry_path("a", "x\n\"y"), r#"a["x\n\"y"]"#);
        assert!(entry_path("a", &"k".repeat(10_000)).chars().count() < 80);
    }
}
