//! Callers and integrations beside each other: what one uses leaves room for the others.

use prost::Message;
use segment_relay::{
    proto::{
        CaptureRequest, CreateIntegrationRequest, DeadLetterFilter, DeliveryReason,
        DiscardDeadLettersRequest, FieldMapping, Integration, ListDeadLettersRequest,
        ListIntegrationsRequest, ReplayDeadLettersRequest, TestIntegrationRequest,
        UpdateIntegrationRequest, WaitFor, WatchDeliveriesRequest,
        dead_letter_service_client::DeadLetterServiceClient,
    },
    sandbox::Rule,
};

use crate::{
    auth::{by, callers},
    harness::{PATIENCE, World, acme, numbered, reason, violations},
};

async fn create(world: &World, id: &str) {
    let integration = Some(Integration {
        integration_id: id.into(),
        ..acme()
    });
    let request = by("all", CreateIntegrationRequest { integration });
    let created = world.integrations().create_integration(request).await;
    created.expect("created");
}

#[tokio::test]
async fn one_caller_leaves_half_of_the_watchers_and_calls_to_others() {
    let settings = "[server]\nmax_watchers = 8\nmax_calls_in_flight = 8\n";
    let world = World::with(&format!("{settings}{}", callers())).await;
    create(&world, "acme").await;
    let watch = async |name: &str| {
        let request = by(name, WatchDeliveriesRequest::default());
        world.relay().watch_deliveries(request).await
    };
    let mut watches = Vec::new();
    for _ in 0..4 {
        // Watchers are calls in flight of their caller, too.
        watches.push(watch("all").await.expect("watches"));
    }
    let refused = watch("all").await.expect_err("one more");
    assert_eq!(reason(&refused), "CALLER_LIMIT");
    for _ in 0..4 {
        watches.push(watch("read").await.expect("another caller"));
    }
    let full = watch("scoped").await.expect_err("no place is left");
    assert_eq!(reason(&full), "TOO_MANY_CALLS");
    drop(watches);

    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    let capture = |name: &str, number| {
        let mut request = by(
            name,
            CaptureRequest {
                integration_id: "acme".into(),
                capture: Some(numbered(number)),
                wait_for: WaitFor::Delivered.into(),
            },
        );
        request.set_timeout(PATIENCE);
        let mut relay = world.relay();
        async move { relay.capture(request).await }
    };
    let held: Vec<_> = (0..5)
        .map(|n| tokio::spawn(capture("capture", n)))
        .collect();
    let first = futures_util::future::select_all(held);
    let (refused, _, held) = tokio::time::timeout(PATIENCE, first).await.expect("one");
    let refused = refused.expect("no panic").expect_err("beyond its bound");
    assert_eq!(reason(&refused), "CALLER_LIMIT");
    let request = by(
        "all",
        segment_relay::proto::ListIntegrationsRequest::default(),
    );
    let listed = world.integrations().list_integrations(request).await;
    listed.expect("another caller is served");
    held.iter().for_each(|call| call.abort());
    world.behave();
    world.stop().await;
}

#[tokio::test]
async fn tests_of_integrations_keep_to_the_requests_in_flight() {
    let settings = "[delivery]\nmax_requests_in_flight = 2\n[limits]\ncaller_costly_calls = 1000\n";
    let world = World::with(settings).await;
    world.create(acme()).await;
    let other = Integration {
        integration_id: "other".into(),
        ..acme()
    };
    world.create(other).await;
    world.misbehave(Rule {
        delay_ms: Some(100),
        ..Rule::default()
    });
    let calls = (0..20).map(|number| {
        let mut integrations = world.integrations();
        let id = ["acme", "other"][number % 2];
        async move {
            let request = TestIntegrationRequest {
                integration_id: id.into(),
            };
            integrations.test_integration(request).await
        }
    });
    let calls = futures_util::future::join_all(calls);
    let mut most = 0;
    let watched = async {
        loop {
            most = most.max(world.sandbox.stats().requests_in_flight);
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let answers = tokio::select! {
        answers = calls => answers,
        () = watched => unreachable!("it goes on"),
    };
    for answer in answers {
        let results = answer.expect("tested").into_inner().results;
        assert_eq!(results[0].http_status, 200);
    }
    assert_eq!(most, 2, "requests at once");
    world.stop().await;
}

#[tokio::test]
async fn the_audit_names_whose_dead_letters_were_replayed_and_discarded() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("audit.jsonl");
    let world = World::with(&format!("[log]\naudit_file = \"{}\"\n", path.display())).await;
    for id in ["acme", "other"] {
        let integration = Integration {
            integration_id: id.into(),
            ..acme()
        };
        world.create(integration).await;
        world.dead_letter(id, numbered(1), 402).await;
    }
    let mut letters = DeadLetterServiceClient::new(world.channel.clone());
    let listed = letters.list_dead_letters(ListDeadLettersRequest::default());
    let listed = listed.await.expect("listed").into_inner().dead_letters;
    let ids: Vec<_> = listed
        .iter()
        .map(|one| one.dead_letter_id.clone())
        .collect();
    assert_eq!(listed.len(), 4);
    // One of one integration, and ids of no dead letter.
    let unknown = (0..150).map(|number| (1_000_000 + number).to_string());
    let discard = DiscardDeadLettersRequest {
        dead_letter_ids: ids.iter().take(1).cloned().chain(unknown).collect(),
        ..Default::default()
    };
    letters
        .discard_dead_letters(discard)
        .await
        .expect("discarded");
    let replay = ReplayDeadLettersRequest {
        filter: Some(DeadLetterFilter {
            reason: DeliveryReason::RequestRejected.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    letters
        .replay_dead_letters(replay.clone())
        .await
        .expect("replayed");
    // What is only counted is no change.
    let counted = ReplayDeadLettersRequest {
        dry_run: true,
        ..replay
    };
    letters.replay_dead_letters(counted).await.expect("counted");
    world.stop().await;

    let text = std::fs::read_to_string(&path).expect("written");
    let lines = text.lines().map(|line| {
        let entry: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let field = |name: &str| entry[name].as_str().unwrap_or("").to_owned();
        (field("action"), field("integration"), field("detail"))
    });
    let mut noted = lines.filter(|(action, ..)| action.starts_with("dead_letters."));
    let (action, integration, detail) = noted.next().expect("the discard");
    assert_eq!(
        (action.as_str(), integration.as_str()),
        ("dead_letters.discarded", "acme")
    );
    let begin = format!("1 events; ids: {} 1000000 ", ids[0]);
    assert!(detail.starts_with(&begin), "{detail}");
    assert!(
        detail.ends_with(" and 51 more, of all integrations"),
        "{detail}"
    );
    let (action, integration, detail) = noted.next().expect("the replay");
    assert_eq!(
        (action.as_str(), integration.as_str()),
        ("dead_letters.replayed", "")
    );
    let begin = "3 events (acme 1, other 2); filter: all integrations, \
        reason DELIVERY_REASON_REQUEST_REJECTED, from any to ";
    assert!(detail.starts_with(begin), "{detail}");
    assert!(noted.next().is_none());
}

/// An integration of about `bytes` bytes.
fn large(id: &str, bytes: usize) -> Integration {
    let mapping = |number| FieldMapping {
        attribute_id: format!("attribute-{number:0>90}"),
        segment_key: format!("key-{number:0>90}"),
        ..FieldMapping::default()
    };
    Integration {
        integration_id: id.into(),
        mappings: (0..bytes / 210).map(mapping).collect(),
        ..acme()
    }
}

#[tokio::test]
async fn stored_integrations_and_the_pages_that_list_them_are_bounded() {
    let limits = "[limits]\nmax_integrations = 12\nmax_integration_size = 190000\nrequest_bytes_in_flight = 4194304\n";
    let world = World::with(limits).await;
    let mut integrations = world.integrations();
    let create = |integration| CreateIntegrationRequest {
        integration: Some(integration),
    };
    let refused = integrations
        .create_integration(create(large("huge", 207_000)))
        .await;
    let refused = refused.expect_err("too large");
    assert_eq!(
        violations(&refused),
        [("integration".into(), "TOO_LARGE".into())]
    );
    for number in 0..12 {
        world
            .create(large(&format!("large-{number:02}"), 180_000))
            .await;
    }
    let refused = integrations.create_integration(create(acme())).await;
    let refused = refused.expect_err("one more");
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    assert_eq!(reason(&refused), "TOO_MANY_INTEGRATIONS");
    // Also one that grows by an update.
    let update = UpdateIntegrationRequest {
        integration: Some(large("large-00", 207_000)),
        update_mask: None,
    };
    let refused = integrations
        .update_integration(update)
        .await
        .expect_err("too large");
    assert_eq!(
        violations(&refused),
        [("integration".into(), "TOO_LARGE".into())]
    );

    let (mut listed, mut pages, mut token) = (Vec::new(), 0, String::new());
    loop {
        let request = ListIntegrationsRequest {
            page_size: 1_000,
            page_token: token,
        };
        let page = integrations
            .list_integrations(request)
            .await
            .expect("listed")
            .into_inner();
        assert!(page.encoded_len() < 1_200_000, "{}", page.encoded_len());
        listed.extend(page.integrations.into_iter().map(|one| one.integration_id));
        (pages, token) = (pages + 1, page.next_page_token);
        if token.is_empty() {
            break;
        }
    }
    let expected: Vec<_> = (0..12).map(|number| format!("large-{number:02}")).collect();
    assert_eq!(listed, expected);
    assert!(pages > 1, "{pages}");

    // Answers count in the room of all requests.
    let lists = (0..40).map(|_| {
        let mut integrations = world.integrations();
        async move {
            let request = ListIntegrationsRequest::default();
            integrations.list_integrations(request).await
        }
    });
    for answer in futures_util::future::join_all(lists).await {
        if let Err(refused) = answer {
            assert_eq!(reason(&refused), "RELAY_LIMIT", "{refused:?}");
        }
    }
    world.stop().await;
}
