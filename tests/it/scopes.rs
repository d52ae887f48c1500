//! Which integrations and regions a caller may touch.

use std::collections::BTreeSet;

use prost::Message;
use segment_relay::proto::{
    self, CaptureBatchRequest, CaptureRequest, CaptureStreamRequest, CreateIntegrationRequest,
    DataRegion, DeadLetterFilter, DeleteIntegrationRequest, DeliveryReason,
    DiscardDeadLettersRequest, EraseSubjectRequest, GetCaptureRequest, GetIntegrationRequest,
    Integration, ListDeadLettersRequest, ListErasureReceiptsRequest, ListIntegrationsRequest,
    PreviewCaptureRequest, ReplayDeadLettersRequest, TestIntegrationRequest,
    UpdateIntegrationRequest, WatchDeliveriesRequest, WatchDeliveriesResponse,
    erase_subject_request::Subject,
};
use tonic::{Code, Streaming};

use crate::auth::{by, call, callers};
use crate::harness::{PATIENCE, World, acme, credential, numbered, reason, worked_example};

/// An rpc with a request that names an integration.
pub(crate) fn naming(id: &str) -> Vec<(&'static str, Vec<u8>)> {
    let integration = Some(Integration {
        integration_id: id.into(),
        ..acme()
    });
    let capture = Some(worked_example());
    let filter = Some(DeadLetterFilter {
        integration_id: id.into(),
        ..Default::default()
    });
    let integration_id = id.to_owned();
    vec![
        (
            "SegmentRelay/Capture",
            CaptureRequest {
                integration_id: id.into(),
                capture: capture.clone(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "SegmentRelay/CaptureBatch",
            CaptureBatchRequest {
                integration_id: id.into(),
                captures: vec![worked_example()],
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "SegmentRelay/PreviewCapture",
            PreviewCaptureRequest {
                integration_id: id.into(),
                capture,
            }
            .encode_to_vec(),
        ),
        (
            "SegmentRelay/GetCapture",
            GetCaptureRequest {
                integration_id: id.into(),
                capture_id: "c".into(),
            }
            .encode_to_vec(),
        ),
        (
            "SegmentRelay/WatchDeliveries",
            WatchDeliveriesRequest {
                integration_id: id.into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/CreateIntegration",
            CreateIntegrationRequest {
                integration: integration.clone(),
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/GetIntegration",
            GetIntegrationRequest {
                integration_id: id.into(),
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/UpdateIntegration",
            UpdateIntegrationRequest {
                integration,
                update_mask: None,
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/DeleteIntegration",
            DeleteIntegrationRequest {
                integration_id: id.into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/TestIntegration",
            TestIntegrationRequest {
                integration_id: id.into(),
            }
            .encode_to_vec(),
        ),
        (
            "DeadLetterService/ListDeadLetters",
            ListDeadLettersRequest {
                integration_id: id.into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "DeadLetterService/ReplayDeadLetters",
            ReplayDeadLettersRequest {
                filter: filter.clone(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "DeadLetterService/DiscardDeadLetters",
            DiscardDeadLettersRequest {
                filter,
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "PrivacyService/EraseSubject",
            EraseSubjectRequest {
                subject: Some(Subject::Email("a@example.com".into())),
                integration_id,
            }
            .encode_to_vec(),
        ),
    ]
}

#[tokio::test]
async fn a_scoped_caller_touches_its_own_integrations_alone() {
    let world = World::with(&callers()).await;
    for id in ["mine", "acme"] {
        let integration = Some(Integration {
            integration_id: id.into(),
            ..acme()
        });
        let request = by("all", CreateIntegrationRequest { integration });
        let created = world.integrations().create_integration(request).await;
        created.expect("created");
    }
    // Also one that does not exist: nobody learns which do.
    for id in ["acme", "nobody"] {
        for (rpc, message) in naming(id) {
            let path = format!("/jebbit.segmentrelay.v1.{rpc}");
            let refused = call(&world, &path, by("scoped", message)).await;
            let refused = refused.expect_err(rpc);
            assert_eq!(refused.code(), Code::PermissionDenied, "{rpc}: {refused:?}");
            assert_eq!(reason(&refused), "INTEGRATION_OUT_OF_SCOPE");
        }
        // A stream goes on; the capture is refused.
        let request = CaptureStreamRequest {
            correlation_id: "1".into(),
            integration_id: id.into(),
            capture: Some(worked_example()),
        };
        let stream = by("scoped", tokio_stream::once(request));
        let mut results = world
            .relay()
            .capture_stream(stream)
            .await
            .expect("begun")
            .into_inner();
        let result = results.message().await.expect("no error").expect("one");
        let error = result
            .result
            .and_then(|result| result.error)
            .expect("refused");
        assert_eq!(error.reason, "INTEGRATION_OUT_OF_SCOPE");
    }
    for (rpc, message) in naming("mine") {
        let path = format!("/jebbit.segmentrelay.v1.{rpc}");
        let answer = call(&world, &path, by("scoped", message)).await;
        let code = answer.err().map(|status| status.code());
        assert_ne!(code, Some(Code::PermissionDenied), "{rpc}");
    }
    // Erasing everywhere is more than its own.
    let everywhere = EraseSubjectRequest {
        subject: Some(Subject::Email("a@example.com".into())),
        integration_id: String::new(),
    };
    let mut privacy =
        proto::privacy_service_client::PrivacyServiceClient::new(world.channel.clone());
    let refused = privacy
        .erase_subject(by("scoped", everywhere.clone()))
        .await;
    assert_eq!(refused.expect_err("refused").code(), Code::PermissionDenied);
    privacy
        .erase_subject(by("all", everywhere))
        .await
        .expect("erased");
    // Lists show what is its own.
    let listed = world
        .integrations()
        .list_integrations(by("scoped", ListIntegrationsRequest::default()))
        .await
        .expect("listed")
        .into_inner();
    assert!(
        listed
            .integrations
            .iter()
            .all(|one| one.integration_id == "mine")
    );
    let receipts = privacy
        .list_erasure_receipts(by("scoped", ListErasureReceiptsRequest::default()))
        .await
        .expect("listed")
        .into_inner();
    let of: Vec<_> = receipts
        .receipts
        .iter()
        .map(|one| one.integration_id.as_str())
        .collect();
    assert_eq!(of, ["mine"]);
    world.stop().await;
}

#[tokio::test]
async fn a_scoped_caller_sees_and_moves_no_dead_letter_and_no_change_of_others() {
    let world = World::with(&callers()).await;
    let mut dead_letters =
        proto::dead_letter_service_client::DeadLetterServiceClient::new(world.channel.clone());
    for id in ["mine", "acme"] {
        let integration = Some(Integration {
            integration_id: id.into(),
            ..acme()
        });
        let request = by("all", CreateIntegrationRequest { integration });
        world
            .integrations()
            .create_integration(request)
            .await
            .expect("created");
    }
    let watch = by("scoped", WatchDeliveriesRequest::default());
    let mut updates = world
        .relay()
        .watch_deliveries(watch)
        .await
        .expect("watches")
        .into_inner();
    world.refuse_person(&numbered(1).email, 400);
    use proto::WaitFor::{Accepted, Delivered};
    for id in ["acme", "mine"] {
        // What is taken of another person shows that it is the event's fault.
        let send = async |number: usize, wait_for: proto::WaitFor| {
            let request = CaptureRequest {
                integration_id: id.into(),
                capture: Some(numbered(number)),
                wait_for: wait_for.into(),
            };
            let answer = world.relay().capture(by("all", request)).await;
            let result = answer.expect("accepted").into_inner().result;
            crate::harness::states(&result.expect("a result").events)
        };
        let mut control = 2;
        while send(1, Accepted).await != [proto::DeliveryState::DeadLettered; 2] {
            send(control, Delivered).await;
            control += 1;
        }
    }
    let first = updates.message().await.expect("no error").expect("one");
    assert_eq!(first.integration_id, "mine");
    let list = |name: &str| by(name, ListDeadLettersRequest::default());
    let all = dead_letters
        .list_dead_letters(list("all"))
        .await
        .expect("listed")
        .into_inner();
    assert_eq!(all.dead_letters.len(), 4);
    let own = dead_letters
        .list_dead_letters(list("scoped"))
        .await
        .expect("listed")
        .into_inner();
    assert_eq!(own.dead_letters.len(), 2);
    // Ids of others are as if they were not there.
    let ids: Vec<_> = all
        .dead_letters
        .iter()
        .map(|one| one.dead_letter_id.clone())
        .collect();
    let discard = DiscardDeadLettersRequest {
        dead_letter_ids: ids,
        ..Default::default()
    };
    let gone = dead_letters
        .discard_dead_letters(by("scoped", discard))
        .await
        .expect("discarded");
    assert_eq!(gone.into_inner().event_count, 2);
    let everything = ReplayDeadLettersRequest {
        filter: Some(DeadLetterFilter::default()),
        ..Default::default()
    };
    let replayed = dead_letters
        .replay_dead_letters(by("scoped", everything))
        .await
        .expect("replayed");
    assert_eq!(replayed.into_inner().event_count, 0);
    let left = dead_letters
        .list_dead_letters(list("all"))
        .await
        .expect("listed")
        .into_inner();
    assert!(
        left.dead_letters
            .iter()
            .all(|one| one.integration_id == "acme")
    );
    assert_eq!(left.dead_letters.len(), 2);
    world.stop().await;
}

#[tokio::test]
async fn eu_data_goes_nowhere_without_eu_credentials() {
    let world = World::start().await;
    world.create(acme()).await;
    let capture = proto::Capture {
        data_region: DataRegion::Eu.into(),
        ..worked_example()
    };
    let refused = world
        .capture(capture.clone(), proto::WaitFor::Accepted)
        .await;
    let refused = refused.expect_err("refused");
    assert_eq!(reason(&refused), "REGION_NOT_CONFIGURED");
    assert_eq!(world.sandbox.stats().requests, 0);

    // Accepted while there were credentials, which then go: it waits, and goes
    // nowhere else.
    let both = Integration {
        integration_id: "acme".into(),
        credentials: vec![
            credential(DataRegion::Eu, "eu-write-key-0001"),
            credential(DataRegion::NonEu, "write-key-of-acme-0001"),
        ],
        ..Integration::default()
    };
    let update = |integration: Integration| UpdateIntegrationRequest {
        integration: Some(integration),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["credentials".into()],
        }),
    };
    let mut integrations = world.integrations();
    integrations
        .update_integration(update(both))
        .await
        .expect("updated");
    let mut relay = world.relay();
    let watch = relay.watch_deliveries(WatchDeliveriesRequest::default());
    let mut updates = watch.await.expect("watches").into_inner();
    // Refused, so that the lane waits until the credentials change: no request is under way
    // while they do, whose answer would be another once the sandbox behaves.
    world.misbehave(segment_relay::sandbox::Rule {
        status: Some(401),
        ..Default::default()
    });
    world.accept(capture.clone()).await;
    waits_because(&mut updates, DeliveryReason::Unauthorized, 2).await;
    integrations
        .update_integration(update(acme()))
        .await
        .expect("updated");
    // The other one waits behind it.
    waits_because(&mut updates, DeliveryReason::RegionNotConfigured, 1).await;
    world.behave();
    world.deliver(numbered(1)).await;
    let arrived = world.sandbox.entries();
    let regions: BTreeSet<_> = arrived
        .iter()
        .filter(|entry| matches!(entry.outcome, segment_relay::sandbox::Outcome::Accepted))
        .map(|entry| entry.request.region)
        .collect();
    assert!(
        !regions.contains(&segment_relay::sandbox::Region::Eu),
        "{regions:?}"
    );
    assert!(world.sandbox.stats().events_accepted == 2);
    world.stop().await;
}

/// Waits until so many events of a capture wait for this reason.
async fn waits_because(
    updates: &mut Streaming<WatchDeliveriesResponse>,
    reason: DeliveryReason,
    mut left: u32,
) {
    while left > 0 {
        let update = tokio::time::timeout(PATIENCE, updates.message()).await;
        let update = update.expect("an update").expect("no error").expect("one");
        let event = update.event.expect("an event");
        assert!(
            event.state() != proto::DeliveryState::Delivered,
            "{event:?}"
        );
        left = left.saturating_sub(u32::from(event.reason() == reason));
    }
}
