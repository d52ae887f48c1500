//! Validates a capture against its integration and maps its attributes.
//!
//! Pure: the clock is passed in. The result borrows from the request, so that
//! nothing is copied between the wire and the serialised events. Every broken
//! rule is found in one go; a capture that breaks one yields no part of a
//! result.

mod email;
mod value;

use std::borrow::Cow;

use sha2::{Digest, Sha256};

use crate::{
    capture::{Answer, Attribute, Capture},
    integration::{FieldMapping, Integration, Privacy, RELAY_KEYS, Unmapped, reserved_trait},
    proto::DataRegion,
    region::Region,
    text::{MAX_NAME_CHARS, check_line, hex_digits},
    time::UnixMillis,
    violation::{Violation, Violations, entry_path},
};

pub use email::{Subject, user_ids};
pub use value::Value;

/// Longest capture id, in characters.
pub const MAX_CAPTURE_ID_CHARS: usize = 64;
/// Longest campaign name and traffic source, in characters.
const MAX_TITLE_CHARS: usize = 1_024;
/// Most attributes of one capture: far more than a survey asks, and a tenth of
/// the properties that Segment keeps of one event.
pub const MAX_ATTRIBUTES: usize = 1_000;
/// Most consent categories of one capture.
const MAX_CONSENT_CATEGORIES: usize = 100;
/// 2000-01-01T00:00:00Z. Earlier times are mistakes: milliseconds taken for
/// seconds, or an unset clock.
const EARLIEST_OCCUR_TIME: UnixMillis = UnixMillis(946_684_800_000);
/// How far ahead of the relay's clock a capture may lie, in milliseconds: 24 h.
const MAX_AHEAD_MILLIS: i64 = 24 * 3_600 * 1_000;
/// Bytes of the hash that a derived capture id shows.
const DERIVED_ID_BYTES: usize = 16;

/// A capture that breaks no rule, ready to become events.
#[derive(Debug)]
pub struct Mapped<'a> {
    /// Given by the caller, or derived.
    pub capture_id: Cow<'a, str>,
    /// Whose events they are; `None` where no e-mail was collected.
    pub subject: Option<Subject<'a>>,
    /// Whose endpoint gets the events.
    pub region: Region,
    /// When the person answered.
    pub occur_time: UnixMillis,
    /// Name of the track event.
    pub event_name: &'a str,
    /// Sent as `surveyId`.
    pub campaign_id: &'a str,
    /// Sent as `surveyTitle`; left out where empty.
    pub campaign_name: &'a str,
    /// Sent as `surveySessionId`.
    pub session_id: &'a str,
    /// Sent as `trafficSource`; left out where empty.
    pub traffic_source: &'a str,
    /// What the events carry, in the order of the attribute ids.
    pub fields: Vec<Field<'a>>,
    /// Sent as `context.consent.categoryPreferences`; left out where empty.
    pub consent: Vec<(&'a str, bool)>,
}

/// One mapped attribute.
#[derive(Debug)]
pub struct Field<'a> {
    /// Key of the trait and of the question.
    pub key: &'a str,
    /// The value after the mapping's privacy rule.
    pub value: Value<'a>,
    /// Whether the identify event carries it.
    pub in_identify: bool,
    /// Whether the track event carries it.
    pub in_track: bool,
}

/// Why a capture can't be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaptureFault {
    /// It breaks rules of the schema or of the integration's mappings.
    Invalid(Vec<Violation>),
    /// It names a region for which the integration has no write key.
    RegionNotConfigured(Region),
    /// It names no region, and the integration has both.
    RegionAmbiguous,
}

/// Validates `capture` against `integration`. `received` is the time of receipt.
///
/// # Errors
/// Everything that is wrong with it; see [`CaptureFault`].
pub fn map<'a>(
    integration: &'a Integration,
    mut capture: Capture<'a>,
    received: UnixMillis,
) -> Result<Mapped<'a>, CaptureFault> {
    let mut found = Violations::default();
    check_texts(&mut found, &capture);
    let subject = email::check(&mut found, capture.email, integration.normalization);
    let occur_time = check_occur_time(&mut found, capture.occur_time.as_ref(), received);
    check_consent(&mut found, capture.consent());
    let fields = map_attributes(&mut found, integration, capture.take_attributes());
    let region = DataRegion::try_from(capture.data_region);
    if region.is_err() {
        found.add(
            "capture.data_region",
            "UNKNOWN_VALUE",
            "DATA_REGION_NON_EU or DATA_REGION_EU; leave it out for the integration's only region",
        );
    }
    found.or_ok(()).map_err(CaptureFault::Invalid)?;
    Ok(Mapped {
        capture_id: capture_id(&capture),
        subject,
        region: choose_region(integration, region.unwrap_or_default())?,
        occur_time,
        event_name: &integration.event_name,
        campaign_id: capture.campaign_id,
        campaign_name: capture.campaign_name,
        session_id: capture.session_id,
        traffic_source: capture.traffic_source,
        fields,
        consent: capture.take_consent(),
    })
}

/// The caller's capture id, or the one derived from campaign and session.
#[must_use]
pub fn capture_id<'a>(capture: &Capture<'a>) -> Cow<'a, str> {
    if !capture.capture_id.is_empty() {
        return Cow::Borrowed(capture.capture_id);
    }
    let mut hash = Sha256::new();
    hash.update(capture.campaign_id.as_bytes());
    // NUL is a control character, so it can't be part of either.
    hash.update([0]);
    hash.update(capture.session_id.as_bytes());
    Cow::Owned(hex_digits(&hash.finalize()[..DERIVED_ID_BYTES]))
}

fn check_texts(found: &mut Violations, capture: &Capture<'_>) {
    check_line(
        found,
        "capture.capture_id",
        capture.capture_id,
        MAX_CAPTURE_ID_CHARS,
    );
    for (field, text) in [
        ("capture.campaign_id", capture.campaign_id),
        ("capture.session_id", capture.session_id),
    ] {
        if text.is_empty() {
            found.add(field, "REQUIRED", "give it: the track event names it");
        }
        check_line(found, field, text, MAX_NAME_CHARS);
    }
    for (field, text) in [
        ("capture.campaign_name", capture.campaign_name),
        ("capture.traffic_source", capture.traffic_source),
    ] {
        check_line(found, field, text, MAX_TITLE_CHARS);
    }
}

fn check_occur_time(
    found: &mut Violations,
    time: Option<&prost_types::Timestamp>,
    received: UnixMillis,
) -> UnixMillis {
    let Some(time) = time else { return received };
    let latest = UnixMillis(received.0.saturating_add(MAX_AHEAD_MILLIS));
    match UnixMillis::from_proto(time) {
        Some(time) if (EARLIEST_OCCUR_TIME..=latest).contains(&time) => time,
        _ => {
            found.add(
                "capture.occur_time",
                "OUT_OF_RANGE",
                "from 2000-01-01T00:00:00Z to 24 hours from now, in seconds and nanoseconds; \
                 leave it out for the time of receipt",
            );
            received
        }
    }
}

fn check_consent(found: &mut Violations, consent: &[(&str, bool)]) {
    if consent.len() > MAX_CONSENT_CATEGORIES {
        found.add(
            "capture.consent",
            "TOO_MANY",
            format!("at most {MAX_CONSENT_CATEGORIES} categories"),
        );
        return;
    }
    for (category, _) in consent {
        let path = || entry_path("capture.consent", category);
        if category.is_empty() {
            found.add(path(), "REQUIRED", "name the category");
        } else if !is_plain_name(category) {
            check_line(found, &path(), category, MAX_NAME_CHARS);
        }
    }
}

/// Whether a name is so plain that no rule needs a closer look.
fn is_plain_name(name: &str) -> bool {
    (1..=MAX_NAME_CHARS).contains(&name.len()) && name.bytes().all(|c| (0x20..0x7f).contains(&c))
}

fn map_attributes<'a>(
    found: &mut Violations,
    integration: &'a Integration,
    mut attributes: Vec<Attribute<'a>>,
) -> Vec<Field<'a>> {
    if attributes.len() > MAX_ATTRIBUTES {
        found.add(
            "capture.attributes",
            "TOO_MANY",
            format!("{} attributes; at most {MAX_ATTRIBUTES}", attributes.len()),
        );
        return Vec::new();
    }
    let mut fields = Vec::with_capacity(attributes.len());
    let mut mappings = integration.mappings().in_order();
    for attribute in &mut attributes {
        let (id, answer) = (attribute.id, attribute.answer.take());
        let field = match mappings.of(id) {
            Some(mapping) => map_value(found, id, answer, mapping),
            None => map_unmapped(found, integration, id, answer),
        };
        fields.extend(field);
    }
    let has = |id: &str| attributes.binary_search_by(|one| one.id.cmp(id)).is_ok();
    for mapping in integration.mappings().all() {
        if mapping.required && !has(&mapping.attribute_id) {
            found.add(
                entry_path("capture.attributes", &mapping.attribute_id),
                "REQUIRED",
                "the integration's mapping requires this attribute",
            );
        }
    }
    fields
}

fn map_value<'a>(
    found: &mut Violations,
    id: &'a str,
    answer: Option<Answer<'a>>,
    mapping: &'a FieldMapping,
) -> Option<Field<'a>> {
    let value = value::check(found, id, answer, mapping.value_type)?;
    let value = match mapping.privacy {
        Privacy::Drop => return None,
        Privacy::Hash => value.hashed(),
        Privacy::Pass => value,
    };
    if let Some(kind) = mapping.reserved() {
        value::check_reserved(found, id, &value, &mapping.segment_key, kind);
    }
    Some(Field {
        key: &mapping.segment_key,
        value,
        in_identify: mapping.in_identify,
        in_track: mapping.in_track,
    })
}

fn map_unmapped<'a>(
    found: &mut Violations,
    integration: &Integration,
    id: &'a str,
    answer: Option<Answer<'a>>,
) -> Option<Field<'a>> {
    if !is_plain_name(id) {
        let path = entry_path("capture.attributes", id);
        if id.is_empty() {
            found.add(&path, "REQUIRED", "name the attribute");
        }
        check_line(found, &path, id, MAX_NAME_CHARS);
    }
    let value = value::check(found, id, answer, None)?;
    match integration.unmapped {
        Unmapped::Drop => None,
        Unmapped::Reject => {
            found.add(
                entry_path("capture.attributes", id),
                "UNMAPPED_ATTRIBUTE",
                "the integration has no mapping for this attribute and rejects such; \
                 add a mapping or leave the attribute out",
            );
            None
        }
        Unmapped::Forward => {
            if RELAY_KEYS.contains(&id) || integration.mappings().write(id) {
                found.add(
                    entry_path("capture.attributes", id),
                    "KEY_CONFLICT",
                    "the relay or a mapping writes this key already; map the attribute to another",
                );
                return None;
            }
            if let Some(kind) = reserved_trait(id) {
                value::check_reserved(found, id, &value, id, kind);
            }
            Some(Field {
                key: id,
                value,
                in_identify: true,
                in_track: true,
            })
        }
    }
}

fn choose_region(integration: &Integration, asked: DataRegion) -> Result<Region, CaptureFault> {
    match Region::from_proto(asked) {
        Some(region) if integration.write_key(region).is_some() => Ok(region),
        Some(region) => Err(CaptureFault::RegionNotConfigured(region)),
        None => {
            let mut regions = integration.regions();
            match (regions.next(), regions.next()) {
                (Some(only), None) => Ok(only),
                _ => Err(CaptureFault::RegionAmbiguous),
            }
        }
    }
}

#[cfg(test)]
mod tests;
