//! `[[callers]]`: who may call, known by tokens or certificates.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    integration::IntegrationId,
    permission::{Caller, CertificateName, Permission, Scope},
};

use super::{
    entry::Entry,
    reader::Reader,
    value::{Expected, Parsed, Raw, list, text},
};

/// Callers of one file, at the most: each call is compared with all their tokens.
const MAX_CALLERS: usize = 1_000;
/// Longest name of a caller, in characters.
const MAX_NAME_CHARS: usize = 64;

/// A caller of the configuration, and how it proves who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownCaller {
    /// Name and rights.
    pub caller: Caller,
    /// SHA-256 of each of its bearer tokens: two while they are changed.
    pub token_hashes: Vec<[u8; 32]>,
    /// DNS names and URIs (SPIFFE ids) of its client certificates.
    pub certificate_names: Vec<CertificateName>,
}

/// Reads all callers of the file.
pub(super) fn take(from: &mut Reader<'_>) -> Vec<KnownCaller> {
    let Some(document) = from.file_alone("callers") else {
        return Vec::new();
    };
    let root = Entry::root(document);
    let entries = root.tables("callers", &mut from.faults);
    if entries.len() > MAX_CALLERS {
        let message = format!("at most {MAX_CALLERS} callers");
        from.faults.add(document.place(0), "callers", message);
    }
    // What is taken already, and by whom.
    let mut taken = BTreeMap::new();
    let mut callers = Vec::new();
    for mut entry in entries.into_iter().take(MAX_CALLERS) {
        let known = caller(&mut entry, from);
        let hashes = known.token_hashes.iter().map(hex::encode);
        let uses = hashes.map(|hash| ("token_sha256", hash)).chain(
            known
                .certificate_names
                .iter()
                .map(|name| ("certificates", name.as_str().to_owned())),
        );
        let name = &known.caller.name;
        for (key, used) in uses.chain([("name", name.clone())]) {
            if !used.is_empty() && taken.insert((key, used), name.clone()).is_some() {
                let message = "is taken already by another caller";
                from.faults
                    .add(entry.place.clone(), entry.path_of(key), message);
            }
        }
        callers.push(known);
    }
    callers
}

fn caller(entry: &mut Entry<'_>, from: &mut Reader<'_>) -> KnownCaller {
    // Somebody may have put a token where its hash belongs.
    entry.holds_secrets = true;
    let faults = &mut from.faults;
    let name: String = entry.take("name", name, faults);
    let token_hashes: Vec<[u8; 32]> = entry.take("token_sha256", list(sha256), faults);
    let certificate_names: Vec<CertificateName> =
        entry.take("certificates", list(certificate), faults);
    let permissions: BTreeSet<Permission> = entry
        .take("permissions", list(permission), faults)
        .into_iter()
        .collect();
    let integrations: Vec<IntegrationId> = entry.take("integrations", list(integration), faults);
    entry.find_unknown(faults);
    for (key, missing, rule) in [
        ("name", name.is_empty(), "name the caller"),
        (
            "permissions",
            permissions.is_empty(),
            "say what the caller may do",
        ),
        (
            "token_sha256",
            token_hashes.is_empty() && certificate_names.is_empty(),
            "give token_sha256, certificates, or both",
        ),
    ] {
        let path = entry.path_of(key);
        if missing && !faults.names(&path) {
            faults.add(entry.place.clone(), path, rule);
        }
    }
    let scope = if integrations.is_empty() {
        Scope::All
    } else {
        Scope::Only(integrations.into_iter().collect())
    };
    KnownCaller {
        caller: Caller {
            name,
            permissions,
            scope,
        },
        token_hashes,
        certificate_names,
    }
}

fn name(raw: Raw<'_>) -> Parsed<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    text(raw)
        .ok()
        .filter(|name| (1..=MAX_NAME_CHARS).contains(&name.len()) && name.chars().all(fits))
        .ok_or_else(|| {
            Expected::new(format_args!(
                "1 to {MAX_NAME_CHARS} of a-z, A-Z, 0-9, hyphen, underscore and dot"
            ))
        })
}

fn sha256(raw: Raw<'_>) -> Parsed<[u8; 32]> {
    let mut hash = [0; 32];
    let decoded = text(raw).is_ok_and(|text| hex::decode_to_slice(text, &mut hash).is_ok());
    decoded.then_some(hash).ok_or_else(|| {
        Expected::new("64 hex digits, the SHA-256 of a token, as `segment-relay token` prints it")
            .hide()
    })
}

fn certificate(raw: Raw<'_>) -> Parsed<CertificateName> {
    text(raw)
        .ok()
        .filter(|name| (1..=2_048).contains(&name.len()) && name.chars().all(|c| c.is_ascii_graphic()))
        .map(|name| CertificateName::parse(&name))
        .ok_or_else(|| {
            Expected::new("a DNS name or URI in a client certificate, such as capture.internal or spiffe://example.org/capture")
        })
}

fn permission(raw: Raw<'_>) -> Parsed<Permission> {
    let given = text(raw).ok();
    given
        .and_then(|word| Permission::parse(&word))
        .ok_or_else(|| {
            let words = Permission::ALL.map(Permission::as_str).join(", ");
            Expected::new(format_args!("one of {words}"))
        })
}

fn integration(raw: Raw<'_>) -> Parsed<IntegrationId> {
    text(raw)
        .ok()
        .and_then(|id| IntegrationId::new(&id))
        .ok_or_else(|| Expected::new("an integration_id: 1 to 63 of a-z, 0-9 and hyphen"))
}
