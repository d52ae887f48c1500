use super::*;
use crate::proto::{Credential, EventType, FieldMapping as MappingSpec};

fn revision() -> Revision {
    Revision {
        etag: "e1".into(),
        mapping_version: 1,
        create_time: UnixMillis(0),
        update_time: UnixMillis(0),
        read_only: false,
        ..Revision::default()
    }
}

fn spec(mappings: Vec<MappingSpec>) -> proto::Integration {
    proto::Integration {
        integration_id: "acme".into(),
        credentials: vec![Credential {
            data_region: DataRegion::NonEu.into(),
            write_key: "key-of-acme-1234".into(),
            write_key_hint: String::new(),
        }],
        mappings,
        ..Default::default()
    }
}

fn mapping(attribute: &str, key: &str, value_type: proto::ValueType) -> MappingSpec {
    MappingSpec {
        attribute_id: attribute.into(),
        segment_key: key.into(),
        value_type: value_type.into(),
        ..Default::default()
    }
}

fn reasons(spec: &proto::Integration) -> Vec<(String, &'static str)> {
    match Integration::new(spec, revision()) {
        Ok(_) => Vec::new(),
        Err(found) => found.into_iter().map(|v| (v.field, v.reason)).collect(),
    }
}

#[test]
fn defaults_are_those_of_the_contract() {
    let integration = Integration::new(
        &spec(vec![mapping("a", "", proto::ValueType::Unspecified)]),
        revision(),
    )
    .expect("valid");
    assert_eq!(integration.event_name, "Survey Completed");
    assert!(integration.enabled);
    assert_eq!(integration.unmapped, Unmapped::Drop);
    assert_eq!(integration.normalization, Normalization::Lowercase);
    let mapped = integration.mappings().of("a").expect("mapped");
    assert_eq!(mapped.segment_key, "a");
    assert!(mapped.in_identify && mapped.in_track);
}

#[test]
fn the_public_form_and_debug_output_hold_no_write_key() {
    let integration = Integration::new(&spec(Vec::new()), revision()).expect("valid");
    let public = integration.to_public();
    assert_eq!(public.credentials[0].write_key, "");
    assert_eq!(public.credentials[0].write_key_hint, "1234");
    assert!(!format!("{integration:?}").contains("key-of-acme"));
    assert_eq!(
        integration.to_spec_with_secrets().credentials[0].write_key,
        "key-of-acme-1234"
    );
}

#[test]
fn all_faults_of_a_specification_are_told_at_once() {
    let mut bad = spec(vec![
        mapping("a", "x", proto::ValueType::Unspecified),
        mapping("a", "x", proto::ValueType::Unspecified),
        mapping("", "", proto::ValueType::Unspecified),
        mapping("b", "email", proto::ValueType::Unspecified),
        mapping("c", &"k".repeat(257), proto::ValueType::Unspecified),
    ]);
    bad.integration_id = "Acme!".into();
    bad.display_name = "line\nbreak".into();
    bad.credentials.push(bad.credentials[0].clone());
    let found = reasons(&bad);
    for expected in [
        ("integration.integration_id", "INVALID_FORMAT"),
        ("integration.display_name", "CONTROL_CHARACTER"),
        ("integration.credentials[1].data_region", "DUPLICATE"),
        ("integration.mappings[1].attribute_id", "DUPLICATE"),
        ("integration.mappings[1].segment_key", "DUPLICATE"),
        ("integration.mappings[2].attribute_id", "REQUIRED"),
        ("integration.mappings[3].segment_key", "RESERVED_KEY"),
        ("integration.mappings[4].segment_key", "TOO_LONG"),
    ] {
        assert!(
            found.iter().any(|(f, r)| (f.as_str(), *r) == expected),
            "{expected:?} is missing in {found:?}"
        );
    }
}

#[test]
fn a_reserved_trait_takes_only_types_that_can_fit_it() {
    use proto::ValueType as T;
    let refused = |key: &str, value_type| {
        reasons(&spec(vec![mapping("a", key, value_type)]))
            .iter()
            .any(|(_, reason)| *reason == "RESERVED_TRAIT")
    };
    for (key, fits) in [
        ("age", vec![T::Unspecified, T::Number]),
        ("birthday", vec![T::Unspecified, T::String, T::Timestamp]),
        ("createdAt", vec![T::Unspecified, T::String, T::Timestamp]),
        ("address", vec![]),
        ("company", vec![]),
        ("firstName", vec![T::Unspecified, T::String]),
        (
            "plan",
            vec![
                T::Unspecified,
                T::String,
                T::Number,
                T::Bool,
                T::Timestamp,
                T::List,
            ],
        ),
    ] {
        for value_type in [
            T::Unspecified,
            T::String,
            T::Number,
            T::Bool,
            T::Timestamp,
            T::List,
        ] {
            assert_eq!(
                refused(key, value_type),
                !fits.contains(&value_type),
                "{key} as {value_type:?}"
            );
        }
    }
}

#[test]
fn a_reserved_key_is_free_in_the_track_event_and_for_dropped_values() {
    let mut track_only = mapping("a", "address", proto::ValueType::String);
    track_only.targets = vec![EventType::Track.into()];
    assert_eq!(reasons(&spec(vec![track_only])), []);
    let mut dropped = mapping("b", "email", proto::ValueType::String);
    dropped.privacy = proto::Privacy::Drop.into();
    assert_eq!(reasons(&spec(vec![dropped])), []);
    let mut hashed = mapping("c", "age", proto::ValueType::Number);
    hashed.privacy = proto::Privacy::Hash.into();
    assert_eq!(reasons(&spec(vec![hashed])).len(), 1);
}

#[test]
fn unknown_enum_values_are_named() {
    let mut bad = spec(vec![MappingSpec {
        attribute_id: "a".into(),
        privacy: 99,
        value_type: 99,
        targets: vec![0, 99],
        ..Default::default()
    }]);
    bad.unmapped_attributes = 99;
    bad.email_normalization = 99;
    bad.credentials[0].data_region = 0;
    assert_eq!(reasons(&bad).len(), 7);
}

#[test]
fn an_update_takes_the_fields_of_its_mask_and_keeps_unnamed_keys() {
    let current = spec(vec![mapping("a", "x", proto::ValueType::String)]);
    let change = proto::Integration {
        display_name: "new".into(),
        event_name: "Other".into(),
        credentials: vec![
            Credential {
                data_region: DataRegion::NonEu.into(),
                ..Default::default()
            },
            Credential {
                data_region: DataRegion::Eu.into(),
                write_key: "eu-key".into(),
                write_key_hint: String::new(),
            },
        ],
        ..Default::default()
    };
    let next = apply_update(
        current.clone(),
        change.clone(),
        &["display_name".into(), "credentials".into()],
    )
    .expect("a fine mask");
    assert_eq!(next.display_name, "new");
    assert_eq!(next.event_name, "");
    assert_eq!(next.mappings, current.mappings);
    assert_eq!(next.credentials[0].write_key, "key-of-acme-1234");
    assert_eq!(next.credentials[1].write_key, "eu-key");

    let all_set = apply_update(current.clone(), change.clone(), &[]).expect("no mask");
    assert_eq!(all_set.event_name, "Other");
    assert_eq!(all_set.mappings, current.mappings);

    let found = apply_update(current, change, &["etag".into()]).expect_err("not updatable");
    assert_eq!(found[0].field, "update_mask.paths[0]");
}

#[test]
fn an_id_is_a_name_and_its_incarnation() {
    let first = IntegrationId::new("acme-2").expect("valid");
    assert_eq!((first.name(), first.incarnation()), ("acme-2", 1));
    let third = first.of_incarnation(3);
    assert_eq!(third.as_str(), "acme-2@3");
    assert_eq!((third.name(), third.incarnation()), ("acme-2", 3));
    assert_eq!(third.to_string(), "acme-2");
    for id in [&first, &third] {
        assert_eq!(IntegrationId::stored(id.as_str()).as_ref(), Some(id));
        assert_eq!(id.of_incarnation(1), first);
    }
    // No caller names another incarnation.
    assert_eq!(IntegrationId::new("acme-2@3"), None);
    for damaged in [
        "acme@", "acme@1", "acme@0", "acme@x", "@2", "acme@2@3", "Acme",
    ] {
        assert_eq!(IntegrationId::stored(damaged), None, "{damaged}");
    }
}

#[test]
fn a_removed_integration_is_overdue_after_the_maximum_age() {
    let age = Duration::from_secs(60);
    let removed = UnixMillis(1_000_000);
    let made = |removal_time| {
        let revision = Revision {
            removal_time,
            ..revision()
        };
        Integration::new(&spec(Vec::new()), revision).expect("valid")
    };
    let last = removed.plus(age);
    assert!(!made(Some(removed)).is_overdue(last, age));
    assert!(made(Some(removed)).is_overdue(UnixMillis(last.0 + 1), age));
    assert!(!made(None).is_overdue(UnixMillis(i64::MAX), age));
}
