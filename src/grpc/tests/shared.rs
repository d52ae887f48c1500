//! Integrations that another relay changes.

use tokio_stream::StreamExt;
use tonic::Code;

use super::{world::*, *};
use crate::{
    grpc::integrations::Integrations,
    integration::IntegrationId,
    outbox::OutboxError,
    proto::{
        CreateIntegrationRequest, GetCaptureRequest, GetIntegrationRequest,
        ListIntegrationsRequest, PreviewCaptureRequest, WatchDeliveriesRequest,
        server::integration_service_server::IntegrationService,
    },
};

#[tokio::test]
async fn a_change_holds_for_the_next_capture() {
    let world = World::new().await;
    let before = world.capture("before").await.expect("accepted");
    assert_ne!(states(&before), skipped());
    world.disable().await;
    let after = world.capture("after").await.expect("accepted");
    assert_eq!(states(&after), skipped());
    assert_eq!(world.outbox.calls("submit"), 3);
}

#[tokio::test]
async fn a_change_holds_for_the_next_batch() {
    let world = World::new().await;
    world.disable().await;
    let invalid = proto::Capture {
        email: "nobody".into(),
        ..capture("b")
    };
    let results = world
        .batch(vec![capture("a"), invalid, capture("c")])
        .await
        .expect("answered");
    let ids: Vec<_> = results.iter().map(|one| one.capture_id.as_str()).collect();
    assert_eq!(ids, ["a", "b", "c"]);
    assert_eq!(word(&results[1]), "INVALID_CAPTURE");
    assert_eq!(states(&results[0]), skipped());
    assert_eq!(states(&results[2]), skipped());
    assert_eq!(world.outbox.calls("submit"), 2);
}

#[tokio::test]
async fn a_change_holds_for_the_next_capture_of_a_stream() {
    let world = World::new().await;
    world.disable().await;
    let answers = world.stream(vec![capture("a"), capture("b")]).await;
    assert_eq!(answers.len(), 2);
    for answer in answers {
        let result = answer.result.expect("a result");
        assert_eq!(result.capture_id, answer.correlation_id);
        assert_eq!(states(&result), skipped());
    }
}

#[tokio::test]
async fn a_later_integration_of_the_name_takes_the_next_captures() {
    for way in 0..3 {
        let world = World::new().await;
        world.delete().await;
        let created = world
            .one
            .create_integration(request(CreateIntegrationRequest {
                integration: Some(acme()),
            }));
        let created = created.await.expect("created").into_inner();
        assert_eq!(created.integration.map(|one| one.incarnation), Some(2));
        // The second relay knows the former one alone.
        assert_eq!(world.capture_in(way, capture("a")).await, "");
        world.disable().await;
        assert_eq!(world.capture_in(way, capture("b")).await, "");
        let ids: Vec<_> = world.waiting().await;
        assert_eq!(ids, [("a".to_owned(), 1)]);
        let lanes = world.outbox.waiting_lanes().await.expect("read");
        assert_eq!(lanes[0].integration_id.as_str(), "acme@2");
    }
}

/// A capture of a region whose write key is not known yet.
fn european(id: &str) -> proto::Capture {
    proto::Capture {
        data_region: DataRegion::Eu.into(),
        ..capture(id)
    }
}

#[tokio::test]
async fn a_change_holds_for_captures_that_broke_rules_before() {
    for way in 0..3 {
        let world = World::new().await;
        let refused = world.capture_in(way, european("a")).await;
        assert_eq!(refused, "REGION_NOT_CONFIGURED");
        world.add_region().await;
        assert_eq!(world.capture_in(way, european("a")).await, "");
        // What breaks the rules of all of them is refused as before.
        let nobody = proto::Capture {
            email: "nobody".into(),
            ..european("b")
        };
        assert_eq!(world.capture_in(way, nobody).await, "INVALID_CAPTURE");
        assert_eq!(world.outbox.calls("submit"), 1);
        world.delete().await;
        let nobody = proto::Capture {
            email: "nobody".into(),
            ..european("c")
        };
        let gone = world.capture_in(way, nobody).await;
        assert_eq!(gone, "INTEGRATION_NOT_FOUND");
    }
}

#[tokio::test]
async fn a_stream_keeps_its_order_over_changes() {
    let world = World::new().await;
    // The other relay changes it before every second group or so.
    world.keep_changing(4);
    let ids: Vec<_> = (0..45)
        .map(|number| format!("capture-{number:02}"))
        .collect();
    let answers = world
        .stream(ids.iter().map(|id| capture(id)).collect())
        .await;
    assert_eq!(answers.len(), ids.len());
    for answer in &answers {
        assert_eq!(word(answer.result.as_ref().expect("a result")), "");
    }
    let waiting = world.waiting().await;
    let order: Vec<_> = waiting.iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(order, ids);
    assert!(waiting.is_sorted_by_key(|(_, version)| *version));
}

#[tokio::test]
async fn a_stream_submits_nothing_past_what_may_be_stale() {
    let world = World::new().await;
    world.rename_event().await;
    let release = world.outbox.hold();
    let (captures, messages) = tokio::sync::mpsc::channel(8);
    let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
    let mut client = world.client();
    let answers = client.capture_stream(request(messages)).await;
    let answers = answers.expect("a stream").into_inner();
    captures.send(message(capture("a"))).await.expect("sent");
    while world.outbox.calls("submit") == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // From now on this relay maps with the new one.
    world.other.registry.confirm(&id()).await.expect("read");
    captures.send(message(capture("b"))).await.expect("sent");
    drop(captures);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(world.outbox.calls("submit"), 1);
    drop(release);
    assert_eq!(answers.collect::<Vec<_>>().await.len(), 2);
    assert_eq!(world.outbox.calls("submit"), 3);
    let both = [("a".to_owned(), 2), ("b".to_owned(), 2)];
    assert_eq!(world.waiting().await, both);
}

#[tokio::test]
async fn one_that_never_ends_is_told() {
    let world = World::new().await;
    world.keep_changing(6);
    let refused = world.capture("a").await.expect_err("refused");
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(reason(&refused), "INTEGRATION_CHANGING");
    assert_eq!(world.outbox.calls("submit"), 6);
    world.keep_changing(6);
    let results = world.batch(vec![capture("a"), capture("b")]).await;
    for result in results.expect("answered") {
        assert_eq!(word(&result), "INTEGRATION_CHANGING");
    }
    world.keep_changing(6);
    for answer in world.stream(vec![capture("a")]).await {
        let result = answer.result.expect("a result");
        assert_eq!(word(&result), "INTEGRATION_CHANGING");
    }
    world.keep_changing(5);
    world.capture("a").await.expect("accepted in the end");
}

#[tokio::test]
async fn a_deletion_holds_for_the_next_capture() {
    for way in 0..3 {
        let world = World::new().await;
        world.delete().await;
        let word = match way {
            0 => {
                let refused = world.capture("a").await.expect_err("refused");
                assert_eq!(refused.code(), Code::NotFound);
                reason(&refused)
            }
            way => world.capture_in(way, capture("a")).await,
        };
        assert_eq!(word, "INTEGRATION_NOT_FOUND");
        assert!(world.other.registry.get(&id()).is_none());
    }
}

fn id() -> IntegrationId {
    IntegrationId::new("acme").expect("valid")
}

#[tokio::test]
async fn a_failed_look_up_is_the_captures_error() {
    let world = World::new().await;
    world.disable().await;
    world.outbox.fail("integration", OutboxError::Closed);
    let refused = world.capture("a").await.expect_err("refused");
    assert_eq!(reason(&refused), "OUTBOX_UNAVAILABLE");
    // The second submission fails.
    world.disable().await;
    world.outbox.pass("submit");
    let lost = OutboxError::OutcomeUnknown("timed out".into());
    world.outbox.fail("submit", lost);
    let results = world.batch(vec![capture("a"), capture("b")]).await;
    for result in results.expect("answered") {
        assert_eq!(word(&result), "OUTCOME_UNKNOWN");
    }
}

#[tokio::test]
async fn an_unknown_outcome_is_told() {
    let world = World::new().await;
    let lost = || OutboxError::OutcomeUnknown("timed out".into());
    world.outbox.fail("submit", lost());
    let refused = world.capture("a").await.expect_err("refused");
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(reason(&refused), "OUTCOME_UNKNOWN");
    world.outbox.fail("submit", lost());
    let refused = world.batch(vec![capture("a")]).await.expect_err("refused");
    assert_eq!(reason(&refused), "OUTCOME_UNKNOWN");
    world.outbox.fail("submit", lost());
    let answers = world.stream(vec![capture("a")]).await;
    let result = answers[0].result.as_ref().expect("a result");
    assert_eq!(word(result), "OUTCOME_UNKNOWN");
}

/// Relays of which the second one has heard nothing of `acme`.
async fn unheard_of() -> World {
    let world = World::new().await;
    let other = relay(&world.outbox, Audit::new()).await;
    world.delete().await;
    other.registry.refresh().await.expect("read");
    let message = CreateIntegrationRequest {
        integration: Some(acme()),
    };
    let created = world.one.create_integration(request(message)).await;
    created.expect("created");
    assert!(other.registry.get(&id()).is_none());
    World { other, ..world }
}

#[tokio::test]
async fn a_creation_holds_for_every_call() {
    let world = unheard_of().await;
    world.capture("a").await.expect("accepted");
    let world = unheard_of().await;
    world.batch(vec![capture("a")]).await.expect("accepted");
    let world = unheard_of().await;
    let answers = world.stream(vec![capture("a")]).await;
    assert_eq!(word(answers[0].result.as_ref().expect("a result")), "");

    let world = unheard_of().await;
    let message = PreviewCaptureRequest {
        integration_id: "acme".into(),
        capture: Some(capture("a")),
    };
    let previewed = world.client().preview_capture(request(message)).await;
    assert_eq!(previewed.expect("answered").into_inner().events.len(), 2);
    let world = unheard_of().await;
    let message = GetCaptureRequest {
        integration_id: "acme".into(),
        capture_id: "a".into(),
    };
    let missing = world.client().get_capture(request(message)).await;
    let missing = missing.expect_err("there is no such capture");
    assert_eq!(reason(&missing), "CAPTURE_NOT_FOUND");
    let world = unheard_of().await;
    let message = WatchDeliveriesRequest {
        integration_id: "acme".into(),
        ..WatchDeliveriesRequest::default()
    };
    let watched = world.client().watch_deliveries(request(message)).await;
    watched.expect("watched");
}

#[tokio::test]
async fn integrations_are_shown_as_they_are_stored() {
    let world = unheard_of().await;
    let other = Integrations(world.other.clone());
    let message = ListIntegrationsRequest::default();
    let listed = other.list_integrations(request(message)).await;
    assert_eq!(listed.expect("listed").into_inner().integrations.len(), 1);
    world.disable().await;
    let get = || {
        request(GetIntegrationRequest {
            integration_id: "acme".into(),
        })
    };
    let shown = other.get_integration(get()).await.expect("shown");
    let shown = shown.into_inner().integration.expect("an integration");
    assert_eq!(shown.enabled, Some(false));
    world.delete().await;
    let missing = other.get_integration(get()).await.expect_err("gone");
    assert_eq!(reason(&missing), "INTEGRATION_NOT_FOUND");
    world.outbox.fail("integration", OutboxError::Closed);
    let refused = other.get_integration(get()).await.expect_err("away");
    assert_eq!(refused.code(), Code::Unavailable);
}
