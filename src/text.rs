//! Rules that hold for every text of the contract.

use crate::violation::Violations;

/// Longest identifier, name of a key or of an event, in characters.
pub const MAX_NAME_CHARS: usize = 256;

/// Notes what is wrong with a one-line text: more than `max_chars` characters,
/// or a control character (Unicode category Cc).
pub fn check_line(found: &mut Violations, field: &str, text: &str, max_chars: usize) {
    // Bytes bound characters from above, so most texts need no counting.
    if text.len() > max_chars && text.chars().count() > max_chars {
        found.add(field, "TOO_LONG", format!("at most {max_chars} characters"));
    }
    if text.chars().any(char::is_control) {
        found.add(
            field,
            "CONTROL_CHARACTER",
            "control characters are not allowed; remove them",
        );
    }
}

/// Whether an answer holds a control character other than tab and line ends.
#[must_use]
pub fn has_control_beyond_line_ends(text: &str) -> bool {
    text.chars()
        .any(|c| c.is_control() && !matches!(c, '\t' | '\n' | '\r'))
}
