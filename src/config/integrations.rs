//! `[[integrations]]`: the file's form of the schema's `Integration`.
//!
//! Only the form is checked here, and where the write keys come from; what makes
//! an integration work is told by the caller's `validate`, whose field paths are
//! mapped back onto the file.

use std::collections::BTreeMap;

use crate::proto::{
    Credential, DataRegion, EmailNormalization, EventType, FieldMapping, Integration, Privacy,
    UnmappedAttributes, ValueType,
};

use super::{
    Outside,
    entry::{Entry, write_key},
    fault::quoted,
    reader::Reader,
    value::{boolean, list, text, word},
};

/// Reads all integrations of the file.
pub(super) fn take(from: &mut Reader<'_>, outside: &Outside<'_>) -> Vec<Integration> {
    let Some(document) = from.file_alone("integrations") else {
        return Vec::new();
    };
    let root = Entry::root(document);
    let mut ids = BTreeMap::new();
    let mut integrations = Vec::new();
    for mut entry in root.tables("integrations", &mut from.faults) {
        let integration = integration(&mut entry, from, outside);
        for violation in (outside.validate)(&integration) {
            let (path, place) = entry.locate(&violation.field);
            // A value that could not be read looks missing to the validation.
            if !from.faults.names(&path) {
                from.faults.add(place, path, violation.description);
            }
        }
        let (path, place) = entry.locate("integration.integration_id");
        let id = &integration.integration_id;
        match ids.get(id) {
            Some(first) if !id.is_empty() => {
                let message = format!("{} is taken already, at {first}", quoted(id));
                from.faults.add(place, path, message);
            }
            _ => {
                ids.insert(id.clone(), place);
            }
        }
        integrations.push(integration);
    }
    integrations
}

fn integration(entry: &mut Entry<'_>, from: &mut Reader<'_>, outside: &Outside<'_>) -> Integration {
    let faults = &mut from.faults;
    let mut integration = Integration {
        integration_id: entry.take("integration_id", text, faults),
        display_name: entry.take("display_name", text, faults),
        event_name: entry.take("event_name", text, faults),
        enabled: entry.take("enabled", |raw| boolean(raw).map(Some), faults),
        paused: entry.take("paused", |raw| boolean(raw).map(Some), faults),
        unmapped_attributes: entry.take(
            "unmapped_attributes",
            word(UnmappedAttributes::as_str_name),
            faults,
        ),
        email_normalization: entry.take(
            "email_normalization",
            word(EmailNormalization::as_str_name),
            faults,
        ),
        ..Integration::default()
    };
    entry.known.extend(["mappings", "credentials"]);
    for mut mapping in entry.tables("mappings", faults) {
        integration.mappings.push(FieldMapping {
            attribute_id: mapping.take("attribute_id", text, faults),
            segment_key: mapping.take("segment_key", text, faults),
            value_type: mapping.take("value_type", word(ValueType::as_str_name), faults),
            required: mapping.take("required", boolean, faults),
            privacy: mapping.take("privacy", word(Privacy::as_str_name), faults),
            targets: mapping.take("targets", list(word(EventType::as_str_name)), faults),
        });
        mapping.find_unknown(faults);
    }
    entry.find_unknown(faults);
    for mut credential in entry.tables("credentials", faults) {
        // A key in the wrong line is not to be shown either.
        credential.holds_secrets = true;
        let region = word(DataRegion::as_str_name);
        integration.credentials.push(Credential {
            data_region: credential.take("data_region", region, &mut from.faults),
            write_key: write_key(&mut credential, from, outside),
            ..Credential::default()
        });
        credential.find_unknown(&mut from.faults);
    }
    integration
}
