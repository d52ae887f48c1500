//! Writes the seeds of the corpora: `cargo run --bin make-corpus` in `fuzz/`.

use std::{fs, path::Path};

use prost::Message;
use segment_relay::proto::{
    AttributeValue, Capture, CaptureBatchRequest, CaptureRequest, Credential, FieldMapping,
    Integration, StringList, UpdateIntegrationRequest, attribute_value::Kind,
};

fn write(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join(name), bytes).expect("written");
}

fn value(kind: Kind) -> AttributeValue {
    AttributeValue { kind: Some(kind) }
}

fn worked_example() -> Capture {
    Capture {
        email: "test@aol.com".into(),
        campaign_id: "n3zrik6g".into(),
        campaign_name: "New Quiz".into(),
        session_id: "y2P5ks05mqzGsdkIGjbQ".into(),
        traffic_source: "Owned+Web".into(),
        attributes: [("attribute_id_1".into(), value(Kind::StringValue("attribute_value_1".into())))]
            .into(),
        ..Capture::default()
    }
}

fn captures() -> Vec<(&'static str, Capture)> {
    let mut every_kind = worked_example();
    every_kind.attributes = [
        ("age".into(), value(Kind::IntegerValue(7))),
        ("f".into(), value(Kind::NumberValue(1.5))),
        ("b".into(), value(Kind::BoolValue(true))),
        ("l".into(), value(Kind::ListValue(StringList { values: vec!["x".into(), "\t".into()] }))),
        ("s".into(), value(Kind::StringValue("ü\n\"".into()))),
        ("none".into(), AttributeValue { kind: None }),
    ]
    .into();
    every_kind.consent = [("ads".into(), false)].into();
    let broken = Capture {
        capture_id: "c".repeat(65),
        email: "a-rather-long-text-that-is-no-address".into(),
        session_id: "\u{7}".into(),
        data_region: 9,
        attributes: [("nan".into(), value(Kind::NumberValue(f64::NAN)))].into(),
        ..worked_example()
    };
    let anonymous = Capture { email: String::new(), ..worked_example() };
    vec![
        ("worked-example", worked_example()),
        ("every-kind", every_kind),
        ("broken", broken),
        ("anonymous", anonymous),
    ]
}

fn integrations() -> Vec<(&'static str, Integration)> {
    let plain = Integration {
        integration_id: "acme".into(),
        credentials: vec![Credential {
            data_region: 1,
            write_key: "key-of-acme".into(),
            ..Credential::default()
        }],
        unmapped_attributes: 3,
        ..Integration::default()
    };
    let mut mapped = plain.clone();
    mapped.unmapped_attributes = 2;
    mapped.email_normalization = 2;
    let mapping = |id: &str, privacy, value_type| FieldMapping {
        attribute_id: id.into(),
        privacy,
        value_type,
        ..FieldMapping::default()
    };
    mapped.mappings = vec![
        mapping("age", 1, 2),
        mapping("f", 2, 0),
        mapping("b", 3, 3),
        mapping("l", 2, 5),
        mapping("s", 1, 1),
        mapping("attribute_id_1", 0, 0),
    ];
    vec![("forwarding", plain), ("mapped", mapped)]
}

fn main() {
    for (name, capture) in captures() {
        let request = CaptureRequest {
            integration_id: "acme".into(),
            capture: Some(capture.clone()),
            wait_for: 2,
        };
        write("wire", name, &request.encode_to_vec());
        for (with, integration) in integrations() {
            let first = UpdateIntegrationRequest {
                integration: Some(integration),
                update_mask: None,
            };
            let first = first.encode_to_vec();
            let length = u16::try_from(first.len()).expect("short");
            let bytes = [&length.to_le_bytes()[..], &first, &request.encode_to_vec()].concat();
            write("mapping", &format!("{name}-{with}"), &bytes);
        }
    }
    let batch = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: captures().into_iter().map(|(_, capture)| capture).collect(),
        wait_for: 0,
    };
    write("wire", "batch", &batch.encode_to_vec());
    for (name, record) in segment_relay::outbox::sample_records() {
        write("record", name, &record);
    }
}
