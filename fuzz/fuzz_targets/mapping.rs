//! Any capture against any integration is refused without repeating an address, or
//! becomes two events that Segment would not drop.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use segment_relay::{
    event::MAX_EVENT_BYTES,
    intake,
    integration::{Integration, Revision},
    mapping::CaptureFault,
    outbox::Content,
    proto::{Capture, CaptureRequest, UpdateIntegrationRequest},
    time::UnixMillis,
    violation::Violation,
};

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

/// The two halves of the input: its first two bytes say where the second begins.
fn halves(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))
}

fn check(event: &[u8], kind: &str) {
    assert!(event.len() <= MAX_EVENT_BYTES);
    let json: serde_json::Value = serde_json::from_slice(event).expect("JSON");
    let text = |field: &str| json[field].as_str().expect("a text").to_owned();
    assert_eq!(text("type"), kind);
    assert_eq!(text("userId").len(), 64);
    assert!(text("messageId").len() < 100);
    assert!(text("timestamp").ends_with('Z'));
    if kind == "track" {
        assert!(!text("event").is_empty() && json["properties"].is_object());
    } else {
        assert!(json["traits"]["email"].is_string());
    }
}

/// More violations than these may be cut off.
const MAX_COMPARED: usize = 90;

/// What is said of all but the address's white space and whether it is bad: that
/// must not depend on the address.
fn said(found: &[Violation], of_address: bool) -> Vec<&Violation> {
    let wanted = |one: &&Violation| {
        (one.field == "capture.email") == of_address && one.reason != "SURROUNDING_SPACE"
    };
    found.iter().filter(wanted).collect()
}

fn submit(integration: &Integration, capture: Capture) {
    let other = Capture { email: "no address".into(), ..capture.clone() };
    match intake::prepare(integration, (&capture).into(), NOW) {
        Ok(new) => {
            assert!((1..=64).contains(&new.capture_id.chars().count()));
            if let Content::Send { events, .. } = &new.content {
                check(&events.identify, "identify");
                check(&events.track, "track");
            }
        }
        Err(CaptureFault::Invalid(found)) => {
            assert!(!found.is_empty());
            let Err(CaptureFault::Invalid(others)) = intake::prepare(integration, (&other).into(), NOW)
            else {
                panic!("a bad address was taken");
            };
            if found.len().max(others.len()) < MAX_COMPARED {
                let of_address = said(&found, true);
                assert!(of_address.is_empty() || of_address == said(&others, true));
                // Only an event that is too large is found after all others.
                let large = |one: &&Violation| one.reason == "EVENT_TOO_LARGE";
                let rest: Vec<_> = said(&found, false).into_iter().filter(|v| !large(v)).collect();
                assert_eq!(rest, said(&others, false));
            }
        }
        Err(_) => {}
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((integration, capture)) = halves(bytes) else { return };
    let Ok(integration) = UpdateIntegrationRequest::decode(integration) else { return };
    let Ok(capture) = CaptureRequest::decode(capture) else { return };
    let revision = Revision {
        etag: String::new(),
        mapping_version: 1,
        create_time: NOW,
        update_time: NOW,
        read_only: false,
        ..Revision::default()
    };
    let spec = integration.integration.unwrap_or_default();
    if let Ok(integration) = Integration::new(&spec, revision) {
        submit(&integration, capture.capture.unwrap_or_default());
    }
});
