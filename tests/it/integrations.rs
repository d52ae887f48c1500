use prost_types::FieldMask;
use segment_relay::{
    proto::{
        CreateIntegrationRequest, DataRegion, DeadLetter, DeadLetterFilter,
        DeleteIntegrationRequest, DeliveryState, DiscardDeadLettersRequest, GetIntegrationRequest,
        Integration, ListDeadLettersRequest, ListIntegrationsRequest, ReplayDeadLettersRequest,
        TestIntegrationRequest, UpdateIntegrationRequest,
        dead_letter_service_client::DeadLetterServiceClient,
    },
    sandbox::{Outcome, Region, Rule},
};
use tonic::{Code, Status};

use crate::harness::{
    World, acme, credential, mapping, numbered, reason, states, violations, worked_example,
};

pub(crate) async fn get(world: &World, id: &str) -> Result<Integration, Status> {
    let request = GetIntegrationRequest {
        integration_id: id.into(),
    };
    let answer = world.integrations().get_integration(request).await?;
    Ok(answer.into_inner().integration.expect("an integration"))
}

pub(crate) async fn update(
    world: &World,
    integration: Integration,
    paths: &[&str],
) -> Result<Integration, Status> {
    let paths = paths.iter().map(|path| (*path).to_owned()).collect();
    let request = UpdateIntegrationRequest {
        integration: Some(integration),
        update_mask: Some(FieldMask { paths }),
    };
    let answer = world.integrations().update_integration(request).await?;
    Ok(answer.into_inner().integration.expect("an integration"))
}

pub(crate) async fn delete(
    world: &World,
    id: &str,
    force: bool,
    etag: &str,
) -> Result<u64, Status> {
    let request = DeleteIntegrationRequest {
        integration_id: id.into(),
        force,
        etag: etag.into(),
    };
    let answer = world.integrations().delete_integration(request).await?;
    Ok(answer.into_inner().dead_lettered_events)
}

#[tokio::test]
async fn an_integration_is_kept_over_a_restart_and_never_shows_its_key() {
    let mut world = World::start().await;
    let created = world
        .create(Integration {
            mappings: vec![mapping("a")],
            ..acme()
        })
        .await;
    assert_eq!(created.mapping_version, 1);
    assert_eq!(created.credentials[0].write_key, "");
    assert_eq!(created.credentials[0].write_key_hint, "0001");
    assert_eq!(created.event_name, "Survey Completed");
    world.restart().await;
    let mut kept = get(&world, "acme").await.expect("kept");
    assert_eq!(kept.health.take().expect("health").waiting_events, 0);
    assert_eq!(kept, created);
    // It still has its key.
    let result = world.deliver(worked_example()).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    assert_eq!(world.sandbox.entries()[0].request.write_key_hint, "0001");
    let health = get(&world, "acme")
        .await
        .expect("kept")
        .health
        .expect("health");
    assert!(health.last_success_time.is_some() && health.last_error.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn a_specification_that_breaks_rules_is_refused_whole() {
    let world = World::start().await;
    let bad = Integration {
        integration_id: "Not Valid".into(),
        credentials: Vec::new(),
        mappings: vec![mapping("a"), mapping("a"), mapping("email")],
        ..Integration::default()
    };
    let request = CreateIntegrationRequest {
        integration: Some(bad),
    };
    let refused = world
        .integrations()
        .create_integration(request)
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::InvalidArgument);
    let fields: Vec<_> = violations(&refused)
        .into_iter()
        .map(|(field, _)| field)
        .collect();
    assert_eq!(
        fields,
        [
            "integration.integration_id",
            "integration.credentials",
            "integration.mappings[1].attribute_id",
            "integration.mappings[1].segment_key",
            "integration.mappings[2].segment_key",
        ]
    );
    world.create(acme()).await;
    let request = CreateIntegrationRequest {
        integration: Some(acme()),
    };
    let again = world
        .integrations()
        .create_integration(request)
        .await
        .expect_err("refused");
    assert_eq!(
        (again.code(), reason(&again).as_str()),
        (Code::AlreadyExists, "INTEGRATION_EXISTS")
    );
    world.stop().await;
}

#[tokio::test]
async fn an_update_changes_what_its_mask_names_and_counts_mapping_versions() {
    let world = World::start().await;
    let created = world.create(acme()).await;
    let change = Integration {
        integration_id: "acme".into(),
        display_name: "ACME".into(),
        event_name: "Not taken".into(),
        etag: created.etag.clone(),
        ..Integration::default()
    };
    let renamed = update(&world, change.clone(), &["display_name"])
        .await
        .expect("updated");
    assert_eq!(
        (renamed.display_name.as_str(), renamed.mapping_version),
        ("ACME", 1)
    );
    assert_eq!(renamed.event_name, "Survey Completed");
    assert_ne!(renamed.etag, created.etag);

    let stale = update(&world, change.clone(), &["event_name"])
        .await
        .expect_err("stale");
    assert_eq!(
        (stale.code(), reason(&stale).as_str()),
        (Code::Aborted, "STALE_ETAG")
    );
    let fresh = Integration {
        etag: renamed.etag,
        ..change
    };
    let named = update(&world, fresh, &["event_name"])
        .await
        .expect("updated");
    assert_eq!(
        (named.event_name.as_str(), named.mapping_version),
        ("Not taken", 2)
    );
    let result = world.deliver(worked_example()).await;
    assert_eq!(result.events[1].mapping_version, 2);
    assert_eq!(world.sandbox.entries()[1].event()["event"], "Not taken");

    let unknown = Integration {
        integration_id: "acme".into(),
        ..Integration::default()
    };
    let refused = update(&world, unknown, &["create_time"])
        .await
        .expect_err("refused");
    assert_eq!(
        violations(&refused),
        [("update_mask.paths[0]".into(), "UNKNOWN_FIELD".into())]
    );
    world.stop().await;
}

#[tokio::test]
async fn of_those_who_change_the_same_version_one_succeeds() {
    let world = World::start().await;
    let created = world.create(acme()).await;
    let changes = (0..20).map(|number| {
        let change = Integration {
            integration_id: "acme".into(),
            display_name: format!("name {number}"),
            etag: created.etag.clone(),
            ..Integration::default()
        };
        update(&world, change, &["display_name"])
    });
    let mut names = Vec::new();
    for answer in futures_util::future::join_all(changes).await {
        match answer {
            Ok(updated) => names.push(updated.display_name),
            Err(stale) => assert_eq!(reason(&stale), "STALE_ETAG"),
        }
    }
    let kept = get(&world, "acme").await.expect("kept");
    assert_eq!(names, [kept.display_name]);
    // A deletion of a version that was changed is refused as well.
    let stale = delete(&world, "acme", false, &created.etag).await;
    assert_eq!(reason(&stale.expect_err("stale")), "STALE_ETAG");
    world.stop().await;
}

#[tokio::test]
async fn integrations_are_listed_by_name_page_by_page() {
    let world = World::start().await;
    for name in ["c", "a", "b"] {
        world
            .create(Integration {
                integration_id: name.into(),
                ..acme()
            })
            .await;
    }
    let page = |page_size, page_token: &str| {
        let request = ListIntegrationsRequest {
            page_size,
            page_token: page_token.into(),
        };
        let mut integrations = world.integrations();
        async move { integrations.list_integrations(request).await }
    };
    let first = page(2, "").await.expect("listed").into_inner();
    let second = page(2, &first.next_page_token)
        .await
        .expect("listed")
        .into_inner();
    let names = |integrations: &[Integration]| -> Vec<String> {
        integrations
            .iter()
            .map(|one| one.integration_id.clone())
            .collect()
    };
    assert_eq!(names(&first.integrations), ["a", "b"]);
    assert_eq!(names(&second.integrations), ["c"]);
    assert_eq!(second.next_page_token, "");
    assert_eq!(
        page(0, "")
            .await
            .expect("listed")
            .into_inner()
            .integrations
            .len(),
        3
    );
    assert_eq!(
        page(-1, "").await.expect_err("refused").code(),
        Code::InvalidArgument
    );
    assert_eq!(
        page(1, "!").await.expect_err("refused").code(),
        Code::InvalidArgument
    );
    world.stop().await;
}

#[tokio::test]
async fn a_deletion_waits_for_the_backlog_or_dead_letters_it_by_force() {
    let world = World::start().await;
    let created = world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(500),
        ..Rule::default()
    });
    world.accept(worked_example()).await;
    let refused = delete(&world, "acme", false, "")
        .await
        .expect_err("events wait");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::FailedPrecondition, "EVENTS_WAITING")
    );
    let health = get(&world, "acme")
        .await
        .expect("there")
        .health
        .expect("health");
    assert_eq!((health.waiting_events, health.lanes), (2, 1));
    assert!(health.oldest_waiting_time.is_some());

    assert_eq!(
        delete(&world, "acme", true, "x")
            .await
            .expect_err("stale")
            .code(),
        Code::Aborted
    );
    assert_eq!(
        delete(&world, "acme", true, &created.etag)
            .await
            .expect("deleted"),
        2
    );
    let gone = get(&world, "acme").await.expect_err("gone");
    assert_eq!(
        (gone.code(), reason(&gone).as_str()),
        (Code::NotFound, "INTEGRATION_NOT_FOUND")
    );
    world.behave();

    world.stop().await;
}

pub(crate) async fn letters(world: &World) -> Vec<DeadLetter> {
    let mut client = DeadLetterServiceClient::new(world.channel.clone());
    let request = ListDeadLettersRequest {
        integration_id: "acme".into(),
        ..Default::default()
    };
    let answer = client.list_dead_letters(request).await.expect("listed");
    answer.into_inner().dead_letters
}

#[tokio::test]
async fn a_new_integration_of_a_name_neither_sends_nor_knows_what_a_former_one_has_left() {
    let mut world = World::start().await;
    let first = world.create(acme()).await;
    let delivered = world.deliver(numbered(1)).await;
    world.misbehave(Rule {
        status: Some(500),
        ..Rule::default()
    });
    let waiting = world.accept(worked_example()).await;
    delete(&world, "acme", true, "").await.expect("deleted");
    world.behave();
    let second = Integration {
        credentials: vec![credential(DataRegion::NonEu, "another-owners-key-0002")],
        ..acme()
    };
    let created = world.create(second).await;
    assert_eq!((first.incarnation, created.incarnation), (1, 2));
    assert_eq!(created.integration_id, "acme");

    // What the former one had accepted, delivered or not, is none of this one's.
    for capture in [&delivered, &waiting] {
        let unknown = world
            .status(&capture.capture_id)
            .await
            .expect_err("unknown");
        assert_eq!(reason(&unknown), "CAPTURE_NOT_FOUND");
    }
    // What waited of it is given up, and is never sent again.
    let former = loop {
        match letters(&world).await {
            letters if letters.len() == 2 => break letters,
            _ => tokio::task::yield_now().await,
        }
    };
    assert!(former.iter().all(|letter| letter.former));
    world.restart().await;
    let mut client = DeadLetterServiceClient::new(world.channel.clone());
    let everything = || Some(DeadLetterFilter::default());
    for dry_run in [true, false] {
        let replay = ReplayDeadLettersRequest {
            filter: everything(),
            dry_run,
            ..Default::default()
        };
        let answer = client.replay_dead_letters(replay).await.expect("replayed");
        let answer = answer.into_inner();
        assert_eq!((answer.event_count, answer.former_count), (0, 2));
    }
    // The same captures are this one's first, with ids of their own.
    for (capture, before) in [(numbered(1), &delivered), (worked_example(), &waiting)] {
        let result = world.deliver(capture).await;
        assert!(!result.duplicate);
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
        assert_eq!(result.capture_id, before.capture_id);
        for (event, former) in result.events.iter().zip(&before.events) {
            assert_ne!(event.message_id, former.message_id);
        }
    }
    assert_eq!(letters(&world).await, former);
    let entries = world.sandbox.entries();
    let keys: Vec<&str> = entries
        .iter()
        .filter(|entry| entry.outcome == Outcome::Accepted)
        .map(|entry| entry.request.write_key_hint.as_str())
        .collect();
    assert_eq!(keys, ["0001", "0001", "0002", "0002", "0002", "0002"]);
    let discard = DiscardDeadLettersRequest {
        filter: everything(),
        ..Default::default()
    };
    let answer = client.discard_dead_letters(discard).await.expect("done");
    assert_eq!(answer.into_inner().event_count, 2);
    world.stop().await;
}

#[tokio::test]
async fn a_test_reaches_every_region_past_the_queue() {
    let world = World::start().await;
    let mut both = acme();
    both.credentials
        .push(credential(DataRegion::Eu, "eu-write-key-000002"));
    world.create(both).await;
    let test = || async {
        let request = TestIntegrationRequest {
            integration_id: "acme".into(),
        };
        let answer = world
            .integrations()
            .test_integration(request)
            .await
            .expect("tested");
        answer.into_inner().results
    };
    let results = test().await;
    let regions: Vec<_> = results
        .iter()
        .map(|r| (r.data_region(), r.http_status))
        .collect();
    assert_eq!(regions, [(DataRegion::NonEu, 200), (DataRegion::Eu, 200)]);
    let entries = world.sandbox.entries();
    assert_eq!(entries.len(), 4);
    for result in &results {
        for (id, mark) in result
            .message_ids
            .iter()
            .zip(["/traits/test", "/properties/questions/test"])
        {
            let arrived: Vec<_> = entries
                .iter()
                .filter(|e| e.event()["messageId"] == id.as_str())
                .collect();
            assert_eq!(arrived.len(), 1);
            let region = match result.data_region() {
                DataRegion::Eu => Region::Eu,
                _ => Region::NonEu,
            };
            assert_eq!(arrived[0].request.region, region);
            assert_eq!(
                arrived[0].event().pointer(mark),
                Some(&serde_json::Value::Bool(true))
            );
        }
    }
    world.misbehave(Rule {
        status: Some(503),
        region: Some(Region::Eu),
        ..Rule::default()
    });
    let results = test().await;
    assert_eq!((results[0].http_status, results[1].http_status), (200, 503));
    assert_eq!(results[1].error, "HTTP 503 Service Unavailable");
    world.stop().await;
}

#[tokio::test]
async fn integrations_of_the_configuration_file_are_read_only_and_count_versions() {
    let file = |key: &str| {
        format!(
            "[[integrations]]\nintegration_id = \"filed\"\n\
             [[integrations.credentials]]\ndata_region = \"eu\"\nwrite_key = \"file-write-key-01\"\n\
             [[integrations.mappings]]\nattribute_id = \"{key}\"\n"
        )
    };
    let world = World::with(&file("a")).await;
    let found = get(&world, "filed").await.expect("configured");
    assert!(found.read_only);
    assert_eq!(found.credentials[0].data_region(), DataRegion::Eu);
    let change = Integration {
        integration_id: "filed".into(),
        ..Integration::default()
    };
    let refused = update(&world, change, &["display_name"])
        .await
        .expect_err("refused");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::FailedPrecondition, "INTEGRATION_READ_ONLY")
    );
    assert_eq!(
        delete(&world, "filed", true, "")
            .await
            .expect_err("refused")
            .code(),
        Code::FailedPrecondition
    );
    let world = world.restart_with(&file("b")).await;
    let changed = get(&world, "filed").await.expect("configured");
    assert_eq!((found.mapping_version, changed.mapping_version), (1, 2));
    let world = world.restart_with("").await;
    assert_eq!(
        get(&world, "filed").await.expect_err("gone").code(),
        Code::NotFound
    );
    world.stop().await;
}
