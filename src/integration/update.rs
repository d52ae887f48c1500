//! Updates by field mask (AIP-134).

use super::Integration;
use crate::{proto, region::Region, violation::Violations};

/// The fields that an update may name.
pub const UPDATABLE_FIELDS: [&str; 8] = [
    "display_name",
    "credentials",
    "mappings",
    "unmapped_attributes",
    "email_normalization",
    "event_name",
    "enabled",
    "paused",
];

/// The specification `current` with the fields of `mask` taken from `change`.
/// An empty mask takes every field that `change` sets. A credential without a
/// write key keeps the key that its region has; the result is still to be
/// checked by [`super::Integration::new`].
///
/// # Errors
/// Each path of the mask that can't be updated.
pub fn apply_update(
    current: proto::Integration,
    change: proto::Integration,
    mask: &[String],
) -> Result<proto::Integration, Vec<crate::violation::Violation>> {
    let mut found = Violations::default();
    for (index, path) in mask.iter().enumerate() {
        if !UPDATABLE_FIELDS.contains(&path.as_str()) {
            found.add(
                format!("update_mask.paths[{index}]"),
                "UNKNOWN_FIELD",
                format!(
                    "not a field that can be updated; use {}",
                    UPDATABLE_FIELDS.join(", ")
                ),
            );
        }
    }
    let takes = |field: &str, is_set: bool| {
        if mask.is_empty() {
            is_set
        } else {
            mask.iter().any(|path| path == field)
        }
    };
    let mut next = current;
    if takes("display_name", !change.display_name.is_empty()) {
        next.display_name = change.display_name;
    }
    if takes("mappings", !change.mappings.is_empty()) {
        next.mappings = change.mappings;
    }
    if takes("unmapped_attributes", change.unmapped_attributes != 0) {
        next.unmapped_attributes = change.unmapped_attributes;
    }
    if takes("email_normalization", change.email_normalization != 0) {
        next.email_normalization = change.email_normalization;
    }
    if takes("event_name", !change.event_name.is_empty()) {
        next.event_name = change.event_name;
    }
    if takes("enabled", change.enabled.is_some()) {
        next.enabled = change.enabled;
    }
    if takes("paused", change.paused.is_some()) {
        next.paused = change.paused;
    }
    if takes("credentials", !change.credentials.is_empty()) {
        next.credentials = keep_unnamed_keys(&next.credentials, change.credentials);
    }
    found.or_ok(next)
}

/// The fields in which two versions of an integration differ. Of credentials, the
/// regions whose write key is another.
#[must_use]
pub fn changed_fields(before: &Integration, now: &Integration) -> Vec<String> {
    let mut changed: Vec<String> = Region::ALL
        .into_iter()
        .filter(|region| before.write_key(*region) != now.write_key(*region))
        .map(|region| format!("credentials[{region}]"))
        .collect();
    let (old, new) = (before.to_public(), now.to_public());
    for (field, differs) in [
        ("display_name", old.display_name != new.display_name),
        ("mappings", old.mappings != new.mappings),
        (
            "unmapped_attributes",
            old.unmapped_attributes != new.unmapped_attributes,
        ),
        (
            "email_normalization",
            old.email_normalization != new.email_normalization,
        ),
        ("event_name", old.event_name != new.event_name),
        ("enabled", old.enabled != new.enabled),
        ("paused", old.paused != new.paused),
        ("removal_time", old.removal_time != new.removal_time),
    ] {
        if differs {
            changed.push(field.to_owned());
        }
    }
    changed
}

fn keep_unnamed_keys(
    current: &[proto::Credential],
    mut changed: Vec<proto::Credential>,
) -> Vec<proto::Credential> {
    for credential in changed.iter_mut().filter(|c| c.write_key.is_empty()) {
        let same_region = |c: &&proto::Credential| c.data_region == credential.data_region;
        if let Some(kept) = current.iter().find(same_region) {
            credential.write_key.clone_from(&kept.write_key);
        }
    }
    changed
}
