//! The e-mail address: the person's identity in Segment.

use std::{borrow::Cow, fmt};

use email_address::{EmailAddress, Options};
use icu_normalizer::ComposingNormalizerBorrowed;
use icu_properties::{
    CodePointMapData, CodePointSetData,
    props::{DefaultIgnorableCodePoint, GeneralCategory, GeneralCategoryGroup},
};
use sha2::{Digest, Sha256};

use crate::{integration::Normalization, text::hex_digits, violation::Violations};

/// Longest address (RFC 5321, 4.5.3.1.3, without the angle brackets), in bytes.
const MAX_ADDRESS_BYTES: usize = 254;

/// A person with a valid address. Prints without the address.
pub struct Subject<'a> {
    /// The address as it was collected, in composed form (NFC) and without
    /// surrounding white space.
    pub email: Cow<'a, str>,
    /// Lower-case hex SHA-256 of the address: the `userId`.
    pub user_id: String,
}

impl fmt::Debug for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subject").finish_non_exhaustive()
    }
}

/// Checks and hashes an address; `None` where none was collected or it is bad.
///
/// The syntax is RFC 5321's as the `email_address` crate has it, with a domain
/// of at least two labels: an address that a person types into a survey is
/// never a host name or an IP address. Beyond ASCII an address is taken in its
/// composed form (NFC), and refused unless each of its characters [is plain](is_plain).
pub(super) fn check<'a>(
    found: &mut Violations,
    collected: &'a str,
    normalization: Normalization,
) -> Option<Subject<'a>> {
    let trimmed = collected.trim();
    if trimmed.is_empty() {
        return None;
    }
    if normalization == Normalization::Exact && trimmed.len() != collected.len() {
        found.add(
            "capture.email",
            "SURROUNDING_SPACE",
            "remove the white space around the address; this integration hashes it exactly as given",
        );
        return None;
    }
    let Some(email) = parse(trimmed) else {
        found.add(
            "capture.email",
            "INVALID_EMAIL",
            "not an e-mail address as in RFC 5321 (local-part@domain, at most 254 characters); \
             leave it empty if none was collected",
        );
        return None;
    };
    if !email.chars().all(is_plain) {
        found.add(
            "capture.email",
            "INVALID_EMAIL",
            "beyond ASCII only letters, marks and numbers are allowed, no invisible character and \
             no compatibility form such as a full-width letter; send the plain characters",
        );
        return None;
    }
    let user_id = user_id(&email, normalization);
    Some(Subject { email, user_id })
}

/// Each user id that an address can have, first that of its lower case: hashed in lower case
/// and as it is. An address that is not in composed form also has those of the text as it is,
/// under which relays up to 0.1 stored it. `None` where it is no address.
///
/// All characters are allowed, since data that such a relay took has to be found.
#[must_use]
pub fn user_ids(email: &str) -> Option<Vec<String>> {
    let email = email.trim();
    let composed = parse(email)?;
    let mut ids = Vec::with_capacity(4);
    for form in [composed.as_ref(), email] {
        for normalization in [Normalization::Lowercase, Normalization::Exact] {
            let id = user_id(form, normalization);
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
    }
    Some(ids)
}

/// An address in composed form; `None` where it breaks the syntax.
fn parse(email: &str) -> Option<Cow<'_, str>> {
    /// No text of more bytes has a composed form of [`MAX_ADDRESS_BYTES`]: composition shortens
    /// to a third at most (Unicode Standard Annex 15, and a test).
    const MAX_DECOMPOSED_BYTES: usize = 4 * MAX_ADDRESS_BYTES;

    if email.len() > MAX_DECOMPOSED_BYTES {
        return None;
    }
    let email = if email.is_ascii() {
        Cow::Borrowed(email)
    } else {
        ComposingNormalizerBorrowed::new_nfc().normalize(email)
    };
    let options = Options::default()
        .with_required_tld()
        .without_domain_literal()
        .without_display_text();
    let fits = email.len() <= MAX_ADDRESS_BYTES && !email.chars().any(char::is_control);
    (fits && EmailAddress::parse_with_options(&email, options).is_ok()).then_some(email)
}

/// Whether an address may have this character. Beyond ASCII these are letters, marks and
/// numbers, as in an identifier of RFC 8264: no invisible character (default-ignorable, format
/// or space) and no compatibility form of other characters (full-width or mathematical letters,
/// ligatures), since an address with one looks like another person's.
fn is_plain(character: char) -> bool {
    /// Thai SARA AM and Lao AM: compatibility forms, but letters of living orthographies.
    const ORDINARY_LETTERS: [char; 2] = ['\u{0e33}', '\u{0eb3}'];

    if character.is_ascii() || ORDINARY_LETTERS.contains(&character) {
        return true;
    }
    let category = CodePointMapData::<GeneralCategory>::new().get(character);
    let word = GeneralCategoryGroup::Letter
        .union(GeneralCategoryGroup::Mark)
        .union(GeneralCategoryGroup::Number);
    let ignorable = CodePointSetData::new::<DefaultIgnorableCodePoint>();
    let mut bytes = [0; 4];
    let text: &str = character.encode_utf8(&mut bytes);
    word.contains(category)
        && !ignorable.contains(character)
        && ComposingNormalizerBorrowed::new_nfkc().normalize(text) == text
}

fn user_id(email: &str, normalization: Normalization) -> String {
    let hashed = match normalization {
        Normalization::Lowercase if email.is_ascii() => return hash_in_lower_case(email),
        Normalization::Lowercase => Cow::Owned(email.to_lowercase()),
        Normalization::Exact => Cow::Borrowed(email),
    };
    hex_digits(&Sha256::digest(hashed.as_bytes()))
}

/// The hash of an ASCII address, whose lower case is as long as it is.
fn hash_in_lower_case(email: &str) -> String {
    let mut hash = Sha256::new();
    for piece in email.as_bytes().chunks(64) {
        let mut lower = [0; 64];
        let lower = &mut lower[..piece.len()];
        lower.copy_from_slice(piece);
        lower.make_ascii_lowercase();
        hash.update(lower);
    }
    hex_digits(&hash.finalize())
}

#[cfg(test)]
mod tests;
