//! Integrations of the file: their form, their faults and their secrets.

use proptest::prelude::*;

use super::*;
use crate::proto::{
    DataRegion, EmailNormalization, EventType, Integration, Privacy, UnmappedAttributes, ValueType,
};

const SECRET: &str = "aBcDeFgHiJkLmNoP";

const ACME: &str = r#"
[[integrations]]
integration_id = "acme"
display_name = "ACME"
event_name = "Done"
enabled = false
paused = true
unmapped_attributes = "Reject"
email_normalization = "EMAIL_NORMALIZATION_EXACT"

[[integrations.credentials]]
data_region = "NON_EU"
write_key = "aBcDeFgHiJkLmNoP"

[[integrations.credentials]]
data_region = "data_region_eu"
write_key_env = "ACME_KEY"

[[integrations.mappings]]
attribute_id = "age"
segment_key = "age"
value_type = "number"
required = true
privacy = "hash"
targets = ["identify", "EVENT_TYPE_TRACK"]

[[integrations.mappings]]
attribute_id = "hair"
"#;

/// Loads `text` with a validation that finds fault with `fields`.
fn load_breaking(text: &str, fields: &[&str]) -> Result<Config, Faults> {
    let outside = Outside {
        validate: &|_| {
            let violation = |field: &&str| Violation {
                field: (*field).to_owned(),
                reason: "REQUIRED",
                description: "set it".to_owned(),
            };
            fields.iter().map(violation).collect()
        },
        read_key_file: &|path| match path.to_str() {
            Some("/run/key") => Ok(format!("{SECRET}\r\n")),
            _ => Err(io::ErrorKind::NotFound.into()),
        },
    };
    Config::load(Some(("f.toml", text)), [("ACME_KEY", SECRET)], &outside)
}

fn faults_breaking(text: &str, fields: &[&str]) -> Vec<String> {
    lines(&load_breaking(text, fields).expect_err("there are faults"))
}

#[test]
fn an_integration_of_the_file_is_the_schemas_message() {
    let config = load_breaking(ACME, &[]).expect("ACME is fine");
    let [acme] = config.integrations.as_slice() else {
        panic!("one integration");
    };
    let credential = |region: DataRegion| proto::Credential {
        data_region: region.into(),
        write_key: SECRET.to_owned(),
        ..proto::Credential::default()
    };
    let age = proto::FieldMapping {
        attribute_id: "age".to_owned(),
        privacy: Privacy::Hash.into(),
        segment_key: "age".to_owned(),
        value_type: ValueType::Number.into(),
        required: true,
        targets: vec![EventType::Identify.into(), EventType::Track.into()],
    };
    let hair = proto::FieldMapping {
        attribute_id: "hair".to_owned(),
        ..proto::FieldMapping::default()
    };
    let expected = Integration {
        integration_id: "acme".to_owned(),
        display_name: "ACME".to_owned(),
        event_name: "Done".to_owned(),
        enabled: Some(false),
        paused: Some(true),
        unmapped_attributes: UnmappedAttributes::Reject.into(),
        email_normalization: EmailNormalization::Exact.into(),
        credentials: vec![credential(DataRegion::NonEu), credential(DataRegion::Eu)],
        mappings: vec![age, hair],
        ..Integration::default()
    };
    assert!(*acme == expected, "another message");
}

#[test]
fn the_example_of_the_default_file_is_an_integration() {
    let example: String = DEFAULT_TOML
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .filter(|line| !line.starts_with(' '))
        .flat_map(|line| [line, "\n"])
        .collect();
    let environment = [("ACME_EU_WRITE_KEY", SECRET)];
    let config = load(&example, &environment).expect("the example is fine");
    assert_eq!(config.integrations.len(), 1);
    assert_eq!(config.integrations[0].mappings.len(), 1);
    assert_eq!(config.integrations[0].credentials[0].write_key, SECRET);
}

#[test]
fn a_key_file_is_taken_without_its_line_end() {
    let file =
        "[[integrations]]\ncredentials = [{ data_region = \"eu\", write_key_file = \"/run/key\" }]";
    let config = load_breaking(file, &[]).expect("the key is there");
    assert_eq!(config.integrations[0].credentials[0].write_key, SECRET);
}

#[test]
fn a_key_file_is_read_from_disk() {
    let directory = tempfile::tempdir().expect("a directory");
    let (key, toml) = (
        directory.path().join("key"),
        directory.path().join("f.toml"),
    );
    let file = format!(
        "[[integrations]]\n[[integrations.credentials]]\nwrite_key_file = '{}'",
        key.display()
    );
    std::fs::write(&toml, file).expect("it is written");
    std::fs::write(&key, format!("{SECRET}\n")).expect("it is written");
    let config = Config::read(Some(&toml), &|_| Vec::new()).expect("all is there");
    assert_eq!(config.integrations[0].credentials[0].write_key, SECRET);

    std::fs::write(&key, "k".repeat(5000)).expect("it is written");
    let faults = Config::read(Some(&toml), &|_| Vec::new()).expect_err("too large");
    assert!(lines(&faults)[0].ends_with("larger than 4096 bytes"));
}

#[test]
fn violations_are_told_at_the_lines_of_their_fields() {
    let fields = [
        "integration.event_name",
        "integration.credentials[0].write_key",
        "integration.credentials[1].write_key",
        "integration.mappings[0].targets[1]",
        "integration.mappings[1].segment_key",
        "integration.mappings[9]",
        "integration.etag",
        "",
    ];
    assert_eq!(
        faults_breaking(ACME, &fields),
        [
            "f.toml:2:1: integrations[0]: set it",
            "f.toml:2:1: integrations[0].etag: set it",
            "f.toml:5:1: integrations[0].event_name: set it",
            "f.toml:13:1: integrations[0].credentials[0].write_key: set it",
            "f.toml:17:1: integrations[0].credentials[1].write_key: set it",
            "f.toml:19:16: integrations[0].mappings[9]: set it",
            "f.toml:25:24: integrations[0].mappings[0].targets[1]: set it",
            "f.toml:27:1: integrations[0].mappings[1].segment_key: set it",
        ]
    );
}

#[test]
fn faults_of_form_are_told_once_and_with_their_lines() {
    let file = "\
[[integrations]]
integration_id = 5
enabled = \"yes\"
unmapped_attributes = \"unspecified\"
etag = \"x\"
credentials = 1
[[integrations.mappings]]
attribute = \"a\"
value_type = \"strin\"
targets = [\"track\", \"page\"]
[[integrations.mappings]]
targets = []
";
    // What could not be read looks missing, and is not told a second time.
    let fields = [
        "integration.integration_id",
        "integration.mappings[0].value_type",
    ];
    assert_eq!(
        faults_breaking(file, &fields),
        [
            "f.toml:2:1: integrations[0].integration_id: must be a text, not 5",
            "f.toml:3:1: integrations[0].enabled: must be true or false, not \"yes\"",
            "f.toml:4:1: integrations[0].unmapped_attributes: must be one of drop, reject, forward, not \"unspecified\"",
            "f.toml:5:1: integrations[0].etag: unknown",
            "f.toml:6:1: integrations[0].credentials: must be an array of tables: write [[integrations.credentials]]",
            "f.toml:8:1: integrations[0].mappings[0].attribute: unknown; did you mean attribute_id?",
            "f.toml:9:1: integrations[0].mappings[0].value_type: must be one of string, number, bool, timestamp, list, not \"strin\"",
            "f.toml:10:1: integrations[0].mappings[0].targets: must be an array, each one of identify, track, not [\"track\", \"page\"]",
            "f.toml:12:1: integrations[0].mappings[1].targets: must be an array of one or more entries, not []",
        ]
    );
    assert_eq!(
        faults("[integrations]\nintegration_id = \"a\"", &[]),
        ["f.toml:1:2: integrations: must be an array of tables: write [[integrations]]"]
    );
}

#[test]
fn an_integration_id_is_taken_once() {
    let file = format!("{ACME}[[integrations]]\nintegration_id = \"acme\"");
    assert_eq!(
        faults_breaking(&file, &[]),
        ["f.toml:30:1: integrations[1].integration_id: \"acme\" is taken already, at f.toml:3:1"]
    );
}

#[test]
fn a_write_key_comes_from_exactly_one_place() {
    let exactly = "f.toml:2:1: integrations[0].credentials[0].write_key: give exactly one of write_key, write_key_env, write_key_file";
    let at_line_3 = "f.toml:3:1: integrations[0].credentials[0].write_key: ";
    for (keys, told) in [
        ("", exactly.to_owned()),
        (
            "write_key = \"k\"\nwrite_key_env = \"K\"",
            exactly.to_owned(),
        ),
        (
            "write_key = 12345678",
            format!("{at_line_3}write_key must be a text"),
        ),
        (
            "write_key_env = \"NO_KEY\"",
            format!("{at_line_3}the variable NO_KEY is not set, or not UTF-8"),
        ),
        (
            "write_key_file = \"/no\"",
            format!("{at_line_3}write_key_file cannot be read: entity not found"),
        ),
    ] {
        let file = format!("[[integrations]]\n[[integrations.credentials]]\n{keys}");
        let fields = ["integration.credentials[0].write_key"];
        assert_eq!(faults_breaking(&file, &fields), [told], "{keys}");
    }
}

#[test]
fn a_variable_that_an_integration_refers_to_is_known() {
    let name = "SEGMENT_RELAY__ACME";
    let file =
        format!("[[integrations]]\n[[integrations.credentials]]\nwrite_key_env = \"{name}\"");
    let config = load(&file, &[(name, SECRET)]).expect("it is no unknown setting");
    assert_eq!(config.integrations[0].credentials[0].write_key, SECRET);
}

#[test]
fn a_write_key_is_not_shown_wherever_it_was_put() {
    for line in [
        "write_key_env = \"aBcDeFgHiJkLmNoP\"",
        "write_key_file = \"aBcDeFgHiJkLmNoP\"",
        "write_key = [\"aBcDeFgHiJkLmNoP\"]",
        "write_key = aBcDeFgHiJkLmNoP",
        "write_key = \"aBcDeFgHiJkLmNoP",
        "write_kye = \"aBcDeFgHiJkLmNoP\"",
        "data_region = \"aBcDeFgHiJkLmNoP\"",
        "data_region = \"\"\"\nwrite_key = \"aBcDeFgHiJkLmNoP\"",
    ] {
        let file = format!("[[integrations]]\n[[integrations.credentials]]\n{line}");
        let faults = load_breaking(&file, &[]).expect_err(line);
        assert!(!faults.to_string().contains(SECRET), "{faults}");
        assert!(!format!("{faults:?}").contains(SECRET), "{faults:?}");
    }
    let config = load_breaking(ACME, &[]).expect("ACME is fine");
    let printed = format!("{config:?} {config:#?}");
    assert!(printed.contains("acme") && !printed.contains(SECRET));
}

proptest! {
    #[test]
    fn no_slip_of_the_pen_shows_a_write_key_or_panics(
        slips in prop::collection::vec((any::<prop::sample::Index>(), 0..40_usize, "[\\[\\]{}\"'#=,.\n a1é]{0,3}"), 1..4)
    ) {
        let mut text: Vec<char> = format!("[log]\nfilter = \"info\"\n{ACME}").chars().collect();
        for (index, removed, put) in slips {
            let start = index.index(text.len());
            // Longer cuts are rare, and a key is not to be cut in two.
            let end = (start + removed / 10).min(text.len());
            text.splice(start..end, put.chars());
        }
        let text: String = text.into_iter().collect();
        if let Err(faults) = load_breaking(&text, &["integration.credentials[0].write_key"]) {
            prop_assert!(!faults.to_string().contains(SECRET), "{text}\n{faults}");
        }
    }
}
