//! The e-mail address: the person's identity in Segment.

use std::{borrow::Cow, fmt};

use email_address::{EmailAddress, Options};
use sha2::{Digest, Sha256};

use crate::{integration::Normalization, text::hex_digits, violation::Violations};

/// Longest address (RFC 5321, 4.5.3.1.3, without the angle brackets), in bytes.
const MAX_ADDRESS_BYTES: usize = 254;

/// A person with a valid address. Prints without the address.
pub struct Subject<'a> {
    /// The address as it was collected, without surrounding white space.
    pub email: &'a str,
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
/// never a host name or an IP address.
pub(super) fn check<'a>(
    found: &mut Violations,
    collected: &'a str,
    normalization: Normalization,
) -> Option<Subject<'a>> {
    let email = collected.trim();
    if email.is_empty() {
        return None;
    }
    if normalization == Normalization::Exact && email.len() != collected.len() {
        found.add(
            "capture.email",
            "SURROUNDING_SPACE",
            "remove the white space around the address; this integration hashes it exactly as given",
        );
        return None;
    }
    if !is_address(email) {
        found.add(
            "capture.email",
            "INVALID_EMAIL",
            "not an e-mail address as in RFC 5321 (local-part@domain, at most 254 characters); \
             leave it empty if none was collected",
        );
        return None;
    }
    Some(Subject {
        email,
        user_id: user_id(email, normalization),
    })
}

/// Both user ids that an address can have: hashed in lower case, and as it is.
/// `None` where it is no address.
#[must_use]
pub fn user_ids(email: &str) -> Option<[String; 2]> {
    let email = email.trim();
    let both = [Normalization::Lowercase, Normalization::Exact];
    is_address(email).then(|| both.map(|normalization| user_id(email, normalization)))
}

fn is_address(email: &str) -> bool {
    let options = Options::default()
        .with_required_tld()
        .without_domain_literal()
        .without_display_text();
    let fits = email.len() <= MAX_ADDRESS_BYTES && !email.chars().any(char::is_control);
    fits && EmailAddress::parse_with_options(email, options).is_ok()
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
