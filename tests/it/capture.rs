use std::time::{Duration, Instant};

use segment_relay::{
    proto::{
        Capture, CaptureRequest, DataRegion, DeliveryReason, DeliveryState, PreviewCaptureRequest,
        WaitFor,
    },
    sandbox::{Region, Rule},
};
use tonic::{Code, Request};

use crate::harness::{
    World, acme, credential, numbered, reason, states, text, violations, worked_example,
};

/// The event as text, laid out like the vectors, without its `messageId`.
fn without_message_id(event: &serde_json::Value) -> String {
    let mut event = event.clone();
    event
        .as_object_mut()
        .expect("an object")
        .shift_remove("messageId")
        .expect("a messageId");
    serde_json::to_string_pretty(&event).expect("JSON")
}

#[tokio::test]
async fn the_worked_example_reaches_segment_as_the_vectors_have_it() {
    let world = World::start().await;
    world.create(acme()).await;
    let result = world.deliver(worked_example()).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);

    let entries = world.sandbox.entries();
    assert_eq!(entries.len(), 2);
    for (entry, vector) in entries.iter().zip([
        include_str!("../vectors/identify.json"),
        include_str!("../vectors/track.json"),
    ]) {
        assert_eq!(without_message_id(&entry.event()), vector.trim_end());
        assert!(entry.all_warnings().next().is_none(), "{entry:?}");
    }
    // Identify comes before its track, in the same request.
    assert_eq!(entries[0].request.number, entries[1].request.number);
    for (event, entry) in result.events.iter().zip(&entries) {
        assert_eq!(entry.event()["messageId"], event.message_id.as_str());
        assert_eq!((event.attempt_count, event.last_http_status), (1, 200));
        assert!(event.accept_time.is_some() && event.deliver_time.is_some());
    }
    world.stop().await;
}

#[tokio::test]
async fn an_accepted_capture_is_answered_at_once_and_its_status_follows() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    let result = world.accept(worked_example()).await;
    assert_eq!(states(&result.events), [DeliveryState::Queued; 2]);
    world.behave();
    let settled = world.settled(worked_example()).await;
    assert_eq!(settled.capture_id, result.capture_id);

    let status = world.status(&result.capture_id).await.expect("found");
    let events = status.result.expect("a result").events;
    assert_eq!(events, settled.events);
    let last = status.attempts.last().expect("an attempt");
    assert_eq!((last.http_status, last.error.as_str()), (200, ""));
    assert_eq!(
        status.attempts.len() as u32,
        events[0].attempt_count + events[1].attempt_count
    );
    world.stop().await;
}

#[tokio::test]
async fn a_deadline_that_is_near_is_answered_with_the_state_so_far() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        delay_ms: Some(5_500),
        ..Rule::default()
    });
    let mut request = Request::new(CaptureRequest {
        integration_id: "acme".into(),
        capture: Some(worked_example()),
        wait_for: WaitFor::Delivered.into(),
    });
    // A tenth of it is left for the answer: half a second, also for a machine with much to do.
    request.set_timeout(Duration::from_secs(5));
    let asked = Instant::now();
    let answer = world
        .relay()
        .capture(request)
        .await
        .expect("an answer, not an error");
    assert!(asked.elapsed() < Duration::from_secs(5));
    let events = answer.into_inner().result.expect("a result").events;
    assert_eq!(states(&events), [DeliveryState::Queued; 2]);
    world.stop().await;
}

#[tokio::test]
async fn the_same_capture_again_is_a_duplicate_and_other_content_is_refused() {
    let mut world = World::start().await;
    world.create(acme()).await;
    let first = world.deliver(worked_example()).await;
    assert!(!first.duplicate);
    world.restart().await;
    let again = world.deliver(worked_example()).await;
    assert!(again.duplicate);
    assert_eq!(again.events, first.events);
    // With the derived id named it is still the same capture.
    let named = Capture {
        capture_id: first.capture_id.clone(),
        ..worked_example()
    };
    assert!(world.accept(named).await.duplicate);

    let other = Capture {
        traffic_source: "Other".into(),
        ..worked_example()
    };
    let refused = world
        .capture(other, WaitFor::Accepted)
        .await
        .expect_err("refused");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::AlreadyExists, "CAPTURE_ID_REUSED")
    );
    assert_eq!(world.sandbox.stats().events_accepted, 2);
    assert_eq!(world.sandbox.stats().events_duplicate, 0);
    world.stop().await;
}

#[tokio::test]
async fn bad_input_is_refused_with_every_field_and_changes_nothing() {
    let world = World::start().await;
    world.create(acme()).await;
    let bad = Capture {
        capture_id: "bad".into(),
        email: "nobody".into(),
        session_id: String::new(),
        attributes: [("age".to_owned(), text("old"))].into(),
        ..worked_example()
    };
    let refused = world
        .capture(bad, WaitFor::Delivered)
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::InvalidArgument);
    let violation = |field: &str, reason: &str| (field.to_owned(), reason.to_owned());
    assert_eq!(
        violations(&refused),
        [
            violation("capture.session_id", "REQUIRED"),
            violation("capture.email", "INVALID_EMAIL"),
            violation("capture.attributes[\"age\"]", "RESERVED_TRAIT"),
        ]
    );
    let missing = world.status("bad").await.expect_err("nothing was stored");
    assert_eq!(
        (missing.code(), reason(&missing).as_str()),
        (Code::NotFound, "CAPTURE_NOT_FOUND")
    );
    assert_eq!(world.sandbox.stats().requests, 0);
    world.stop().await;
}

#[tokio::test]
async fn requests_without_integration_or_capture_say_what_is_missing() {
    let world = World::start().await;
    let call = |integration_id: &str, capture, wait_for| {
        let request = CaptureRequest {
            integration_id: integration_id.into(),
            capture,
            wait_for,
        };
        let mut relay = world.relay();
        async move { relay.capture(request).await.expect_err("refused") }
    };
    let no_integration = call("", Some(worked_example()), 0).await;
    assert_eq!(
        violations(&no_integration),
        [("integration_id".into(), "REQUIRED".into())]
    );
    let unknown = call("nobody", Some(worked_example()), 0).await;
    assert_eq!(
        (unknown.code(), reason(&unknown).as_str()),
        (Code::NotFound, "INTEGRATION_NOT_FOUND")
    );
    world.create(acme()).await;
    let no_capture = call("acme", None, 0).await;
    assert_eq!(
        violations(&no_capture),
        [("capture".into(), "REQUIRED".into())]
    );
    let bad_wait = call("acme", Some(worked_example()), 99).await;
    assert_eq!(
        violations(&bad_wait),
        [("wait_for".into(), "UNKNOWN_VALUE".into())]
    );
    world.stop().await;
}

pub(crate) async fn set_enabled(world: &World, enabled: bool) {
    let change = segment_relay::proto::UpdateIntegrationRequest {
        integration: Some(segment_relay::proto::Integration {
            integration_id: "acme".into(),
            enabled: Some(enabled),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["enabled".into()],
        }),
    };
    let updated = world.integrations().update_integration(change).await;
    updated.expect("updated");
}

#[tokio::test]
async fn without_an_address_or_while_disabled_both_events_are_skipped() {
    let world = World::start().await;
    world.create(acme()).await;
    let anonymous = Capture {
        email: String::new(),
        ..numbered(1)
    };
    let skipped = world.deliver(anonymous.clone()).await;
    assert_eq!(states(&skipped.events), [DeliveryState::Skipped; 2]);
    assert_eq!(skipped.events[0].reason(), DeliveryReason::NoEmail);
    assert!(world.deliver(anonymous).await.duplicate);

    set_enabled(&world, false).await;
    let skipped = world.deliver(numbered(2)).await;
    assert_eq!(states(&skipped.events), [DeliveryState::Skipped; 2]);
    assert_eq!(
        skipped.events[1].reason(),
        DeliveryReason::IntegrationDisabled
    );
    assert_eq!(world.sandbox.stats().requests, 0);

    // Neither has taken its id: the session with an address, and the same after enabling.
    set_enabled(&world, true).await;
    for capture in [numbered(1), numbered(2)] {
        let sent = world.deliver(capture.clone()).await;
        assert_eq!(states(&sent.events), [DeliveryState::Delivered; 2]);
        assert!(!sent.duplicate);
        assert!(world.deliver(capture).await.duplicate);
    }
    world.stop().await;
}

#[tokio::test]
async fn data_of_a_region_reaches_its_endpoint_alone() {
    let world = World::start().await;
    let mut both = acme();
    both.credentials
        .push(credential(DataRegion::Eu, "eu-write-key-000001"));
    world.create(both).await;
    let in_region = |number, region: DataRegion| Capture {
        data_region: region.into(),
        ..numbered(number)
    };
    world.deliver(in_region(1, DataRegion::Eu)).await;
    world.deliver(in_region(2, DataRegion::NonEu)).await;
    let seen: Vec<_> = world
        .sandbox
        .entries()
        .iter()
        .map(|entry| (entry.request.region, entry.request.write_key_hint.clone()))
        .collect();
    let (eu, non_eu) = (
        (Region::Eu, "0001".to_owned()),
        (Region::NonEu, "0001".to_owned()),
    );
    assert_eq!(seen, [eu.clone(), eu, non_eu.clone(), non_eu]);

    let unnamed = in_region(3, DataRegion::Unspecified);
    let ambiguous = world
        .capture(unnamed, WaitFor::Accepted)
        .await
        .expect_err("refused");
    assert_eq!(ambiguous.code(), Code::FailedPrecondition);
    assert_eq!(reason(&ambiguous), "REGION_AMBIGUOUS");
    world.stop().await;
}

#[tokio::test]
async fn a_region_without_credentials_is_refused() {
    let world = World::start().await;
    world.create(acme()).await;
    let eu = Capture {
        data_region: DataRegion::Eu.into(),
        ..worked_example()
    };
    let refused = world
        .capture(eu, WaitFor::Accepted)
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(reason(&refused), "REGION_NOT_CONFIGURED");
    world.stop().await;
}

#[tokio::test]
async fn a_preview_is_what_will_be_sent_and_stores_nothing() {
    let world = World::start().await;
    world.create(acme()).await;
    let preview = |capture| {
        let request = PreviewCaptureRequest {
            integration_id: "acme".into(),
            capture: Some(capture),
        };
        let mut relay = world.relay();
        async move {
            relay
                .preview_capture(request)
                .await
                .expect("previewed")
                .into_inner()
        }
    };
    let previewed = preview(worked_example()).await;
    assert!(previewed.violations.is_empty());
    let id = world.accept(worked_example()).await;
    assert!(!id.duplicate, "the preview was stored");
    world.arrived(2).await;
    for (event, entry) in previewed.events.iter().zip(world.sandbox.entries()) {
        assert_eq!(event.json, entry.event_json());
        assert_eq!(entry.event()["messageId"], event.message_id.as_str());
    }

    let bad = preview(Capture {
        email: "nobody".into(),
        ..worked_example()
    })
    .await;
    assert!(bad.events.is_empty());
    assert_eq!(bad.violations[0].field, "capture.email");
    world.stop().await;
}
