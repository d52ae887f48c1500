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

/// A text, or so many of its characters as it begins with.
#[must_use]
pub fn first_chars(text: &str, most: usize) -> &str {
    let end = text.char_indices().nth(most);
    &text[..end.map_or(text.len(), |(end, _)| end)]
}

/// Whether a text holds a control character.
fn has_control(text: &str) -> bool {
    // Most texts are plain ASCII, which needs no decoding.
    !is_printable_ascii(text) && text.chars().any(char::is_control)
}

/// Whether each character is printable ASCII.
fn is_printable_ascii(text: &str) -> bool {
    !any_word(text, |word| {
        let beyond_ascii = word & HIGH;
        let delete = ((word & !HIGH) + LOW) & HIGH;
        below_space(word) | delete | beyond_ascii
    })
}

/// Whether JSON has another form for one of the characters (RFC 8259, 7).
#[must_use]
pub fn needs_json_escape(text: &str) -> bool {
    any_word(text, |word| {
        below_space(word) | zero(word ^ (LOW * 0x22)) | zero(word ^ (LOW * 0x5c))
    })
}

/// One in each byte of a word.
const LOW: u64 = 0x0101_0101_0101_0101;
/// The highest bit of each byte of a word.
const HIGH: u64 = 0x80 * LOW;

/// Not 0 where a byte of the word is below 0x20.
fn below_space(word: u64) -> u64 {
    word.wrapping_sub(LOW * 0x20) & !word & HIGH
}

/// Not 0 where a byte of the word is.
fn zero(word: u64) -> u64 {
    word.wrapping_sub(LOW) & !word & HIGH
}

/// Whether `odd` gives anything but 0 for eight bytes of a text. Most texts are short: bytes
/// in words are looked at sooner than the loops that a compiler makes of single ones.
#[inline]
fn any_word(text: &str, odd: impl Fn(u64) -> u64) -> bool {
    let (words, rest) = text.as_bytes().as_chunks::<8>();
    let word = |bytes: &[u8; 8]| odd(u64::from_le_bytes(*bytes));
    // Without an early end, so that many words are looked at together.
    let found = words.iter().fold(0, |found, bytes| found | word(bytes));
    // The last bytes, some of them once more; or, of a text that is shorter than a word, with
    // spaces before them.
    let last = match text.as_bytes().last_chunk() {
        _ if rest.is_empty() => 0,
        Some(last) => word(last),
        None => odd(rest
            .iter()
            .fold(LOW * 0x20, |last, byte| last << 8 | u64::from(*byte))),
    };
    (found | last) != 0
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
    // Computed, which takes less time than a table for each byte.
    let digit = |half: u8| half + if half < 10 { b'0' } else { b'a' - 10 };
    let start = out.len();
    out.resize(start + 2 * bytes.len(), 0);
    let (pairs, _) = out[start..].as_chunks_mut();
    for (pair, byte) in pairs.iter_mut().zip(bytes) {
        *pair = [digit(byte >> 4), digit(byte & 15)];
    }
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
    fn a_text_is_cut_between_characters() {
        for (most, kept) in [(0, ""), (1, "ä"), (2, "äb"), (3, "äb€"), (4, "äb€")] {
            assert_eq!(first_chars("äb€", most), kept, "{most}");
        }
    }

    #[test]
    fn what_is_looked_at_in_words_is_seen_wherever_it_stands() {
        for length in 0..=40 {
            for place in 0..length {
                for code in 0..=0xff_u32 {
                    let mut text: Vec<char> = vec!['x'; length];
                    text[place] = char::from_u32(code).expect("a character");
                    let text = String::from_iter(text);
                    let printable = text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
                    assert_eq!(is_printable_ascii(&text), printable, "{text:?}");
                    let escaped = serde_json::to_string(&text).expect("JSON").len();
                    assert_eq!(
                        needs_json_escape(&text),
                        escaped > text.len() + 2,
                        "{text:?}"
                    );
                }
            }
        }
        assert!(is_printable_ascii("") && !needs_json_escape(""));
    }

    #[test]
    fn hex_digits_are_lower_case_and_padded() {
        assert_eq!(hex_digits(&[0x00, 0x0f, 0xa0, 0xff]), "000fa0ff");
        assert_eq!(hex_digits(&[]), "");
    }
}
