//! Callers that go before their change is done.

use std::{collections::BTreeSet, time::Duration};

use segment_relay::proto::{
    CreateIntegrationRequest, EraseSubjectRequest, Integration, ListIntegrationsRequest,
    erase_subject_request::Subject, privacy_service_client::PrivacyServiceClient,
};
use segment_relay::sandbox::Rule;
use serde_json::Value;

use crate::harness::{World, acme, numbered};

/// The integrations or callers of the audit's entries of one action.
fn noted(path: &std::path::Path, action: &str) -> Vec<String> {
    let text = std::fs::read_to_string(path).expect("written");
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
        .filter(|entry| entry["action"] == action)
        .map(|entry| entry["integration"].as_str().unwrap_or("").to_owned())
        .collect()
}

fn audited(directory: &tempfile::TempDir) -> (std::path::PathBuf, String) {
    let path = directory.path().join("audit.jsonl");
    let settings = format!("[log]\naudit_file = \"{}\"\n", path.display());
    (path, settings)
}

#[tokio::test]
async fn what_is_stored_of_a_cancelled_change_is_known_and_noted() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, settings) = audited(&directory);
    let mut world = World::with(&settings).await;
    let known = async |world: &World| -> BTreeSet<String> {
        let request = ListIntegrationsRequest::default();
        let listed = world.integrations().list_integrations(request).await;
        let listed = listed.expect("listed").into_inner().integrations;
        listed.into_iter().map(|one| one.integration_id).collect()
    };
    // The callers go at any moment of the change.
    for number in 0..80_u32 {
        let request = CreateIntegrationRequest {
            integration: Some(Integration {
                integration_id: format!("tenant-{number}"),
                ..acme()
            }),
        };
        let mut integrations = world.integrations();
        let call = integrations.create_integration(request);
        let patience = Duration::from_micros(50) * number;
        let _ = tokio::time::timeout(patience, call).await;
    }
    world.restart().await;
    let stored = known(&world).await;
    assert!(!stored.is_empty(), "no change came through");
    let noted: BTreeSet<_> = noted(&path, "integration.created").into_iter().collect();
    assert_eq!(stored, noted, "stored, and noted in the audit log");
    world.stop().await;
}

#[tokio::test]
async fn an_erasure_whose_caller_has_gone_is_carried_out_and_noted() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, settings) = audited(&directory);
    let world = World::with(&settings).await;
    world.create(acme()).await;
    world.misbehave(Rule {
        delay_ms: Some(400),
        ..Rule::default()
    });
    world.accept(numbered(1)).await;
    world.request_under_way().await;
    let request = EraseSubjectRequest {
        subject: Some(Subject::Email("person-1@example.com".into())),
        integration_id: "acme".into(),
    };
    let mut privacy = PrivacyServiceClient::new(world.channel.clone());
    // It waits for the request that carries the events.
    let call = privacy.erase_subject(request);
    let gone = tokio::time::timeout(Duration::from_millis(150), call).await;
    gone.expect_err("the caller has gone");
    world.stop().await;
    assert_eq!(noted(&path, "subject.erased"), ["acme"]);
}
