//! An integration: how one customer's captures become events in that
//! customer's Segment workspace.
//!
//! An [`Integration`] can only be made from a specification that breaks no
//! rule, so whoever holds one may rely on: at least one region has a write key;
//! no attribute and no key is mapped twice; no mapping writes a key that the
//! relay writes itself; none gives a reserved trait a type that can't fit it.

mod field_mapping;
mod update;

use std::{borrow::Borrow, fmt, sync::Arc, time::Duration};

use twox_hash::XxHash3_64;

use crate::{
    proto::{self, DataRegion},
    region::{PerRegion, Region},
    secret::WriteKey,
    text::{MAX_NAME_CHARS, check_line},
    time::UnixMillis,
    violation::{Violation, Violations},
};

pub use field_mapping::{
    FieldMapping, Mappings, Privacy, RELAY_KEYS, ReservedTrait, ValueType, reserved_trait,
};
pub use update::{UPDATABLE_FIELDS, apply_update, changed_fields};

/// The event's name where the integration gives none.
pub const DEFAULT_EVENT_NAME: &str = "Survey Completed";
/// Longest integration id, in bytes: the length of a DNS label (RFC 1035).
const MAX_ID_BYTES: usize = 63;

/// An integration's id: a name, `[a-z0-9-]{1,63}`, and its incarnation, which counts the
/// integrations that were created under that name. All that is stored, blinded or sent under
/// an id belongs to one incarnation. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IntegrationId(Arc<str>);

/// Stands between name and incarnation where it is stored; the first one is the name alone.
const INCARNATION_MARK: char = '@';

impl IntegrationId {
    /// The first incarnation of a name. Checks the form of the name.
    ///
    /// # Errors
    /// `None` where the form is wrong.
    #[must_use]
    pub fn new(id: &str) -> Option<Self> {
        let fits = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let valid = !id.is_empty() && id.len() <= MAX_ID_BYTES && id.bytes().all(fits);
        valid.then(|| Self(id.into()))
    }

    /// An id as [`IntegrationId::as_str`] gives it.
    ///
    /// # Errors
    /// `None` where the form is wrong.
    #[must_use]
    pub fn stored(id: &str) -> Option<Self> {
        let Some((name, number)) = id.split_once(INCARNATION_MARK) else {
            return Self::new(id);
        };
        let number = number.parse().ok().filter(|number| *number > 1)?;
        let id = Self::new(name)?.of_incarnation(number);
        Some(id)
    }

    /// Another incarnation of the name; 0 is taken for the first.
    #[must_use]
    pub fn of_incarnation(&self, number: u32) -> Self {
        match number {
            0 | 1 => Self(self.name().into()),
            _ => Self(format!("{}{INCARNATION_MARK}{number}", self.name()).into()),
        }
    }

    /// Which of its name it is, from 1.
    #[must_use]
    pub fn incarnation(&self) -> u32 {
        let number = self.0.split_once(INCARNATION_MARK);
        number.map_or(1, |(_, number)| number.parse().unwrap_or(1))
    }

    /// The name, as callers know it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.split(INCARNATION_MARK).next().unwrap_or_default()
    }

    /// Name and incarnation, for the store and for hashes.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Compared as its text is, so that it is found by that.
impl Borrow<str> for IntegrationId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Shows the name.
impl fmt::Display for IntegrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What becomes of attributes without a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmapped {
    /// Neither stored nor sent.
    Drop,
    /// The capture is refused.
    Reject,
    /// Sent in both events under the attribute id.
    Forward,
}

/// Which form of the address is hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalization {
    /// Trimmed and in lower case.
    Lowercase,
    /// As it was collected.
    Exact,
}

/// What the store adds to a specification: counted and stamped by the registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revision {
    /// Changes with every write.
    pub etag: String,
    /// Counts up from 1 with every change of what forms the events.
    pub mapping_version: u64,
    /// When the integration was created.
    pub create_time: UnixMillis,
    /// When it was last written.
    pub update_time: UnixMillis,
    /// Whether it comes from the configuration file.
    pub read_only: bool,
    /// Which of its name it is, from 1.
    pub incarnation: u32,
    /// When deliveries went on after the last pause.
    pub resume_time: Option<UnixMillis>,
    /// When it was removed from the configuration file, while events waited.
    pub removal_time: Option<UnixMillis>,
}

impl Revision {
    /// A number in the place of the etag, for comparisons in bulk.
    #[must_use]
    pub fn number(&self) -> u64 {
        revision_number(&self.etag)
    }
}

/// [`Revision::number`] of an etag.
#[must_use]
pub fn revision_number(etag: &str) -> u64 {
    XxHash3_64::oneshot(etag.as_bytes())
}

/// A valid integration.
#[derive(Clone, Debug)]
pub struct Integration {
    id: IntegrationId,
    /// Name for people.
    pub display_name: String,
    credentials: PerRegion<Option<WriteKey>>,
    mappings: Mappings,
    /// What becomes of attributes without a mapping.
    pub unmapped: Unmapped,
    /// Which form of the address is hashed.
    pub normalization: Normalization,
    /// Name of the track event.
    pub event_name: String,
    /// Whether new captures are sent.
    pub enabled: bool,
    /// Whether deliveries are held.
    pub paused: bool,
    /// What the store adds.
    pub revision: Revision,
}

impl Integration {
    /// Makes an integration from its specification. Output-only fields of
    /// `spec` are ignored.
    ///
    /// # Errors
    /// Every rule that the specification breaks, with paths from `integration`.
    pub fn new(spec: &proto::Integration, revision: Revision) -> Result<Self, Vec<Violation>> {
        let mut found = Violations::default();
        let id = IntegrationId::new(&spec.integration_id);
        if id.is_none() {
            found.add(
                "integration.integration_id",
                "INVALID_FORMAT",
                "1 to 63 characters of a-z, 0-9 and hyphen",
            );
        }
        check_line(
            &mut found,
            "integration.display_name",
            &spec.display_name,
            MAX_NAME_CHARS,
        );
        check_line(
            &mut found,
            "integration.event_name",
            &spec.event_name,
            MAX_NAME_CHARS,
        );
        let credentials = parse_credentials(&mut found, &spec.credentials);
        let unmapped = parse_unmapped(&mut found, spec.unmapped_attributes);
        let normalization = parse_normalization(&mut found, spec.email_normalization);
        let mappings = Mappings::parse(&mut found, &spec.mappings);
        let event_name = if spec.event_name.is_empty() {
            DEFAULT_EVENT_NAME.to_owned()
        } else {
            spec.event_name.clone()
        };
        let Some(id) = id else {
            return Err(found.or_ok(()).err().unwrap_or_default());
        };
        found.or_ok(Self {
            id: id.of_incarnation(revision.incarnation),
            display_name: spec.display_name.clone(),
            credentials,
            mappings,
            unmapped,
            normalization,
            event_name,
            enabled: spec.enabled.unwrap_or(true),
            paused: spec.paused.unwrap_or(false),
            revision,
        })
    }

    /// The id.
    #[must_use]
    pub fn id(&self) -> &IntegrationId {
        &self.id
    }

    /// The write key of one region, if it is configured.
    #[must_use]
    pub fn write_key(&self, region: Region) -> Option<&WriteKey> {
        self.credentials.get(region).as_ref()
    }

    /// The regions that are configured: one or two.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        Region::ALL
            .into_iter()
            .filter(|region| self.write_key(*region).is_some())
    }

    /// What is sent under which key.
    #[must_use]
    pub fn mappings(&self) -> &Mappings {
        &self.mappings
    }

    /// The specification, with the write keys in clear: for the store alone.
    #[must_use]
    pub fn to_spec_with_secrets(&self) -> proto::Integration {
        let credentials = self.regions().filter_map(|region| {
            self.write_key(region).map(|key| proto::Credential {
                data_region: region.to_proto().into(),
                write_key: key.expose().to_owned(),
                write_key_hint: String::new(),
            })
        });
        let mut spec = self.to_public();
        spec.credentials = credentials.collect();
        spec
    }

    /// The integration as callers see it: without write keys and health.
    #[must_use]
    pub fn to_public(&self) -> proto::Integration {
        let credentials = self.regions().filter_map(|region| {
            self.write_key(region).map(|key| proto::Credential {
                data_region: region.to_proto().into(),
                write_key: String::new(),
                write_key_hint: key.hint().to_owned(),
            })
        });
        proto::Integration {
            integration_id: self.id.name().to_owned(),
            display_name: self.display_name.clone(),
            credentials: credentials.collect(),
            mappings: self
                .mappings
                .all()
                .iter()
                .map(FieldMapping::to_proto)
                .collect(),
            unmapped_attributes: match self.unmapped {
                Unmapped::Drop => proto::UnmappedAttributes::Drop,
                Unmapped::Reject => proto::UnmappedAttributes::Reject,
                Unmapped::Forward => proto::UnmappedAttributes::Forward,
            }
            .into(),
            email_normalization: match self.normalization {
                Normalization::Lowercase => proto::EmailNormalization::Lowercase,
                Normalization::Exact => proto::EmailNormalization::Exact,
            }
            .into(),
            event_name: self.event_name.clone(),
            enabled: Some(self.enabled),
            etag: self.revision.etag.clone(),
            mapping_version: self.revision.mapping_version,
            create_time: Some(self.revision.create_time.to_proto()),
            update_time: Some(self.revision.update_time.to_proto()),
            health: None,
            read_only: self.revision.read_only,
            incarnation: self.id.incarnation(),
            paused: Some(self.paused),
            resume_time: self.revision.resume_time.map(UnixMillis::to_proto),
            removal_time: self.revision.removal_time.map(UnixMillis::to_proto),
        }
    }

    /// Whether it was removed from the configuration file so long ago that what still waits
    /// is given up.
    #[must_use]
    pub fn is_overdue(&self, now: UnixMillis, max_age: Duration) -> bool {
        let removed = self.revision.removal_time;
        removed.is_some_and(|removed| now.since(removed) > max_age)
    }

    /// Whether both form the same events from the same capture.
    #[must_use]
    pub fn forms_same_events(&self, other: &Self) -> bool {
        self.mappings == other.mappings
            && self.unmapped == other.unmapped
            && self.normalization == other.normalization
            && self.event_name == other.event_name
    }
}

fn parse_credentials(
    found: &mut Violations,
    credentials: &[proto::Credential],
) -> PerRegion<Option<WriteKey>> {
    let mut parsed: PerRegion<Option<WriteKey>> = PerRegion::default();
    if credentials.is_empty() {
        found.add(
            "integration.credentials",
            "REQUIRED",
            "give the write key of at least one region",
        );
    }
    for (index, credential) in credentials.iter().enumerate() {
        let path = format!("integration.credentials[{index}]");
        let region = DataRegion::try_from(credential.data_region)
            .ok()
            .and_then(Region::from_proto);
        if region.is_none() {
            found.add(
                format!("{path}.data_region"),
                "REQUIRED",
                "DATA_REGION_NON_EU or DATA_REGION_EU: a write key belongs to one region",
            );
        }
        let key = match WriteKey::new(credential.write_key.as_str()) {
            Ok(key) => Some(key),
            Err(rule) => {
                found.add(format!("{path}.write_key"), "INVALID_FORMAT", rule);
                None
            }
        };
        if let (Some(region), Some(key)) = (region, key)
            && parsed.get_mut(region).replace(key).is_some()
        {
            found.add(
                format!("{path}.data_region"),
                "DUPLICATE",
                format!("the {region} region has a write key already; give one for each region"),
            );
        }
    }
    parsed
}

fn parse_unmapped(found: &mut Violations, value: i32) -> Unmapped {
    use proto::UnmappedAttributes as P;
    match P::try_from(value) {
        Ok(P::Unspecified | P::Drop) => Unmapped::Drop,
        Ok(P::Reject) => Unmapped::Reject,
        Ok(P::Forward) => Unmapped::Forward,
        Err(_) => {
            found.add(
                "integration.unmapped_attributes",
                "UNKNOWN_VALUE",
                "DROP, REJECT or FORWARD",
            );
            Unmapped::Drop
        }
    }
}

fn parse_normalization(found: &mut Violations, value: i32) -> Normalization {
    use proto::EmailNormalization as P;
    match P::try_from(value) {
        Ok(P::Unspecified | P::Lowercase) => Normalization::Lowercase,
        Ok(P::Exact) => Normalization::Exact,
        Err(_) => {
            found.add(
                "integration.email_normalization",
                "UNKNOWN_VALUE",
                "LOWERCASE or EXACT",
            );
            Normalization::Lowercase
        }
    }
}

#[cfg(test)]
mod tests;
