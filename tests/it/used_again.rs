//! Names and ids that are used a second time.

use segment_relay::{
    proto::{
        Capture, CaptureBatchRequest, CaptureResult, CaptureStreamRequest, DataRegion, DeadLetter,
        DeliveryReason, DeliveryState, DiscardDeadLettersRequest, Integration,
        ReplayDeadLettersRequest, dead_letter_service_client::DeadLetterServiceClient,
        erase_subject_request::Subject,
    },
    sandbox::{Outcome, Rule},
};

use crate::{
    capture::set_enabled,
    harness::{PATIENCE, World, acme, credential, numbered, reason, states, worked_example},
    integrations::{delete, letters, update},
    privacy::erase,
};

/// The integration of another owner.
fn of_another() -> Integration {
    Integration {
        credentials: vec![credential(DataRegion::NonEu, "another-owners-key-0002")],
        ..acme()
    }
}

async fn accept(world: &World, captures: Vec<Capture>) -> Vec<CaptureResult> {
    let request = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures,
        ..CaptureBatchRequest::default()
    };
    let answer = world.relay().capture_batch(request).await;
    answer.expect("accepted").into_inner().results
}

async fn wait_for_letters(world: &World, count: usize) -> Vec<DeadLetter> {
    let enough = async {
        loop {
            match letters(world).await {
                letters if letters.len() == count => return letters,
                _ => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            }
        }
    };
    let enough = tokio::time::timeout(PATIENCE, enough).await;
    enough.expect("in time")
}

/// Hints of the keys with which events of a person were taken.
fn keys(world: &World, capture: &Capture) -> Vec<String> {
    use sha2::{Digest, Sha256};
    let user = hex::encode(Sha256::digest(&capture.email));
    let entries = world.sandbox.entries();
    let own = entries.iter().filter(|entry| {
        entry.outcome == Outcome::Accepted && entry.event()["userId"] == user.as_str()
    });
    own.map(|entry| entry.request.write_key_hint.clone())
        .collect()
}

#[tokio::test]
async fn what_is_under_way_at_a_deletion_is_the_former_owners_and_goes_with_its_key_or_not_at_all()
{
    let mut world = World::start().await;
    world.create(acme()).await;
    // One request waits for its answer; what comes meanwhile waits behind it.
    world.misbehave(Rule {
        delay_ms: Some(700),
        count: Some(1),
        ..Rule::default()
    });
    let flying = numbered(1);
    world.accept(flying.clone()).await;
    world.request_under_way().await;
    let waiting: Vec<Capture> = (2..12).map(numbered).collect();
    accept(&world, waiting.clone()).await;
    delete(&world, "acme", true, "").await.expect("deleted");
    let created = world.create(of_another()).await;
    assert_eq!(created.incarnation, 2);
    // The new owner's captures of the same ids and people, at once.
    for capture in std::iter::once(&flying).chain(&waiting) {
        let result = world.deliver(capture.clone()).await;
        assert!(!result.duplicate, "{}", capture.capture_id);
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
    for round in 0..2 {
        for capture in std::iter::once(&flying).chain(&waiting) {
            let keys = keys(&world, capture);
            let own = keys.iter().filter(|key| *key == "0002").count();
            assert_eq!(own, 2, "{round} {}: {keys:?}", capture.capture_id);
            let status = world.status(&capture.capture_id).await.expect("found");
            let events = status.result.expect("a result").events;
            assert_eq!(states(&events), [DeliveryState::Delivered; 2]);
            assert_eq!(events[0].attempt_count, 1);
        }
        world.restart().await;
    }
    world.stop().await;
}

#[tokio::test]
async fn a_former_owners_dead_letters_are_discarded_by_id_but_not_replayed_and_are_erased() {
    let mut world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(500),
        ..Rule::default()
    });
    accept(&world, (1..5).map(numbered).collect()).await;
    delete(&world, "acme", true, "").await.expect("deleted");
    world.create(of_another()).await;
    world.behave();
    let former = wait_for_letters(&world, 8).await;
    assert!(former.iter().all(|letter| letter.former));
    let mut client = DeadLetterServiceClient::new(world.channel.clone());
    let replay = ReplayDeadLettersRequest {
        dead_letter_ids: former.iter().map(|it| it.dead_letter_id.clone()).collect(),
        ..ReplayDeadLettersRequest::default()
    };
    // Refused or not found: nothing is sent.
    match client.replay_dead_letters(replay).await {
        Ok(answer) => assert_eq!(answer.into_inner().event_count, 0),
        Err(status) => panic!("{status} {}", reason(&status)),
    }
    world.restart().await;
    assert_eq!(letters(&world).await.len(), 8);
    // The new owner has dead letters of the same capture, which are no former's.
    world.dead_letter("acme", numbered(1), 400).await;
    world.behave();
    let all = letters(&world).await;
    assert_eq!(all.iter().filter(|letter| letter.former).count(), 8);
    assert_eq!(all.len(), 10);
    let mut client = DeadLetterServiceClient::new(world.channel.clone());
    let of_second = former
        .iter()
        .filter(|letter| letter.capture_id == "capture-2");
    let discard = DiscardDeadLettersRequest {
        dead_letter_ids: of_second.map(|it| it.dead_letter_id.clone()).collect(),
        ..DiscardDeadLettersRequest::default()
    };
    let discarded = client.discard_dead_letters(discard).await.expect("done");
    assert_eq!(discarded.into_inner().event_count, 2);
    // Erased under the name: of both owners.
    let receipt = erase(&world, Subject::Email(numbered(1).email), "acme").await;
    assert_eq!(receipt.dead_letter_count, 4);
    let receipt = erase(&world, Subject::Email(numbered(3).email), "").await;
    assert_eq!(receipt.dead_letter_count, 2);
    let left = letters(&world).await;
    let left: Vec<&str> = left.iter().map(|it| it.capture_id.as_str()).collect();
    assert_eq!(left, ["capture-4"; 2]);
    // A third owner: both are former now.
    delete(&world, "acme", true, "").await.expect("deleted");
    assert_eq!(world.create(acme()).await.incarnation, 3);
    let result = world.deliver(numbered(4)).await;
    assert!(!result.duplicate);
    assert!(letters(&world).await.iter().all(|letter| letter.former));
    for number in 1..4 {
        assert_eq!(keys(&world, &numbered(number)), [""; 0]);
    }
    world.stop().await;
}

#[tokio::test]
async fn a_skipped_session_is_taken_with_its_address_in_every_kind_of_call() {
    let world = World::start().await;
    world.create(acme()).await;
    // The id is derived from campaign and session.
    let session = |number: usize, email: &str| Capture {
        session_id: format!("session-{number}"),
        email: email.into(),
        ..worked_example()
    };
    let stream = async |captures: Vec<Capture>| {
        let requests = captures.into_iter().map(|capture| CaptureStreamRequest {
            correlation_id: capture.session_id.clone(),
            integration_id: "acme".into(),
            capture: Some(capture),
        });
        let requests: Vec<_> = requests.collect();
        let answers = world
            .relay()
            .capture_stream(tokio_stream::iter(requests))
            .await;
        let mut answers = answers.expect("opened").into_inner();
        let mut results = Vec::new();
        while let Some(answer) = answers.message().await.expect("no error") {
            results.push(answer.result.expect("a result"));
        }
        results
    };
    let without = || (0..3).map(|number| session(number, "")).collect::<Vec<_>>();
    let skipped = |results: &[CaptureResult]| {
        for result in results {
            assert!(result.error.is_none(), "{result:?}");
            assert_eq!(states(&result.events), [DeliveryState::Skipped; 2]);
            assert_eq!(result.events[0].reason(), DeliveryReason::NoEmail);
        }
    };
    skipped(&accept(&world, without()).await);
    skipped(&stream(without()).await);
    // Each kind of call takes one of them, with another address each.
    let first = world.deliver(session(0, "ann@example.com")).await;
    let second = accept(&world, vec![session(1, "bob@example.com")]).await;
    let third = stream(vec![session(2, "eve@example.com")]).await;
    for result in [&first, &second[0], &third[0]] {
        assert!(!result.duplicate && result.error.is_none(), "{result:?}");
    }
    for (number, email) in [(1, "bob@example.com"), (2, "eve@example.com")] {
        let sent = world.settled(session(number, email)).await;
        assert_eq!(states(&sent.events), [DeliveryState::Delivered; 2]);
    }
    // From now on the ids are taken.
    for result in accept(&world, without()).await {
        let error = result.error.expect("refused");
        assert_eq!(error.reason, "CAPTURE_ID_REUSED");
    }

    // The same while the integration is disabled, also within one call.
    set_enabled(&world, false).await;
    let twice = vec![numbered(1), numbered(1), numbered(2)];
    for result in [accept(&world, twice.clone()).await, stream(twice).await].concat() {
        assert_eq!(states(&result.events), [DeliveryState::Skipped; 2]);
    }
    set_enabled(&world, true).await;
    let batch = accept(&world, vec![numbered(1), numbered(1)]).await;
    let stream = stream(vec![numbered(2)]).await;
    let duplicates = [&batch[0], &batch[1], &stream[0]].map(|result| result.duplicate);
    assert_eq!(duplicates, [false, true, false]);
    for number in 1..3 {
        let sent = world.settled(numbered(number)).await;
        assert_eq!(states(&sent.events), [DeliveryState::Delivered; 2]);
    }
    world.stop().await;
}

#[tokio::test]
async fn a_pause_by_its_mask_alone_is_audited_and_shown_and_holds_replays() {
    let directory = tempfile::tempdir().expect("a directory");
    let audit = directory.path().join("audit.jsonl");
    let settings = format!("[log]\naudit_file = \"{}\"\n", audit.display());
    let world = World::with(&settings).await;
    let before = world.create(acme()).await;
    world.dead_letter("acme", numbered(1), 400).await;
    world.behave();
    let paused = |paused: bool| Integration {
        integration_id: "acme".into(),
        display_name: "not to be changed".into(),
        paused: Some(paused),
        ..Integration::default()
    };
    let changed = update(&world, paused(true), &["paused"]).await;
    let changed = changed.expect("updated");
    assert_eq!(changed.display_name, before.display_name);
    assert_eq!(changed.mapping_version, before.mapping_version);
    assert_eq!(changed.paused, Some(true));
    let requests = world.sandbox.stats().requests;
    let mut client = DeadLetterServiceClient::new(world.channel.clone());
    let replay = ReplayDeadLettersRequest {
        filter: Some(segment_relay::proto::DeadLetterFilter::default()),
        ..ReplayDeadLettersRequest::default()
    };
    let replayed = client.replay_dead_letters(replay).await.expect("replayed");
    assert_eq!(replayed.into_inner().event_count, 2);
    world.accept(numbered(2)).await;
    let noted = std::fs::read_to_string(&audit).expect("written");
    assert!(
        noted
            .lines()
            .any(|line| line.contains("integration.updated") && line.contains("paused")),
        "{noted}"
    );
    assert_eq!(world.sandbox.stats().requests, requests);
    update(&world, paused(false), &["paused"])
        .await
        .expect("updated");
    for number in 1..3 {
        let sent = world.settled(numbered(number)).await;
        assert_eq!(states(&sent.events), [DeliveryState::Delivered; 2]);
    }
    world.stop().await;
}

#[tokio::test]
async fn an_integration_that_has_left_the_file_leaves_nothing_to_a_later_one_of_its_name() {
    let filed = |key: &str| {
        format!(
            "[delivery]\nretry_base_ms = 10\nretry_max_ms = 50\n[[integrations]]\n\
             integration_id = \"acme\"\n[[integrations.credentials]]\n\
             data_region = \"non_eu\"\nwrite_key = \"{key}\"\n"
        )
    };
    let without = "[delivery]\nretry_base_ms = 10\nretry_max_ms = 50\n";
    let mut world = World::with(&filed("key-of-the-file-0001")).await;
    let bare = || Capture {
        attributes: std::collections::BTreeMap::new(),
        ..numbered(1)
    };
    assert!(!world.deliver(bare()).await.duplicate);
    for hint in ["0002", "0003"] {
        world = world.restart_with(without).await;
        if hint == "0002" {
            world.create(of_another()).await;
        } else {
            world = world.restart_with(&filed("key-of-the-file-0003")).await;
        }
        let result = world.deliver(bare()).await;
        assert!(!result.duplicate, "{hint}");
        assert_eq!(keys(&world, &bare()).last().map(String::as_str), Some(hint));
        if hint == "0002" {
            delete(&world, "acme", true, "").await.expect("deleted");
        }
    }
    assert_eq!(keys(&world, &bare()).len(), 6);
    world.stop().await;
}
