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
    if has_control(text) {
        found.add(
            field,
            "CONTROL_CHARACTER",
            "control characters are not allowed; remove them",
        );
    }
}

/// Whether a text holds a control character.
fn has_control(text: &str) -> bool {
    // Most texts are plain ASCII, which needs no decoding.
    !is_printable_ascii(text) && text.chars().any(char::is_control)
}

/// Whether each character is printable ASCII.
fn is_printable_ascii(text: &str) -> bool {
    // Without an early end, so that many bytes are looked at together.
    let odd = |byte: u8| !(0x20..0x7f).contains(&byte);
    !text.bytes().fold(false, |found, byte| found | odd(byte))
}

/// Lower-case hex digits of bytes.
#[must_use]
pub fn hex_digits(bytes: &[u8]) -> String {
    let mut text = Vec::with_capacity(2 * bytes.len());
    push_hex(&mut text, bytes);
    // Digits are always UTF-8.
    String::from_utf8(text).unwrap_or_default()
}

/// Appends the lower-case hex digits of bytes.
pub fn push_hex(out: &mut Vec<u8>, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |half: u8| DIGITS[usize::from(half)];
    out.extend(
        bytes
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]),
    );
}

/// Whether an answer holds a control character other than tab and line ends.
#[must_use]
pub fn has_control_beyond_line_ends(text: &str) -> bool {
    !is_printable_ascii(text)
        && text
            .chars()
            .any(|c| c.is_control() && !matches!(c, '\t' | '\n' | '\r'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_way_finds_the_same_control_characters_as_the_long_one() {
        for code in 0..0x0800_u32 {
            let Some(character) = char::from_u32(code) else {
                continue;
            };
            for text in [character.to_string(), format!("plain{character}and on")] {
                assert_eq!(has_control(&text), character.is_control(), "{code:#x}");
                let line_end = matches!(character, '\t' | '\n' | '\r');
                assert_eq!(
                    has_control_beyond_line_ends(&text),
                    character.is_control() && !line_end,
                    "{code:#x}"
                );
            }
        }
        assert!(!has_control(""));
    }

    #[test]
    fn hex_digits_are_lower_case_and_padded() {
        assert_eq!(hex_digits(&[0x00, 0x0f, 0xa0, 0xff]), "000fa0ff");
        assert_eq!(hex_digits(&[]), "");
    }
}
