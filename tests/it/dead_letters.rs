use segment_relay::{
    proto::{
        DeadLetter, DeadLetterFilter, DeliveryReason, DeliveryState, DiscardDeadLettersRequest,
        ListDeadLettersRequest, ReplayDeadLettersRequest,
        dead_letter_service_client::DeadLetterServiceClient,
    },
    sandbox::Rule,
};
use tonic::{Code, transport::Channel};

use crate::harness::{World, acme, numbered, states, violations};

fn letters(world: &World) -> DeadLetterServiceClient<Channel> {
    DeadLetterServiceClient::new(world.channel.clone())
}

async fn list(world: &World, request: ListDeadLettersRequest) -> (Vec<DeadLetter>, String) {
    let answer = letters(world)
        .list_dead_letters(request)
        .await
        .expect("listed")
        .into_inner();
    (answer.dead_letters, answer.next_page_token)
}

/// A world in which three captures were refused for good.
async fn world_with_dead_letters() -> World {
    let world = World::start().await;
    world.create(acme()).await;
    for number in 0..3 {
        world.dead_letter("acme", numbered(number), 402).await;
    }
    world.behave();
    world
}

#[tokio::test]
async fn dead_letters_are_listed_by_filter_and_page() {
    let world = world_with_dead_letters().await;
    let (first, token) = list(
        &world,
        ListDeadLettersRequest {
            page_size: 4,
            ..Default::default()
        },
    )
    .await;
    assert_eq!((first.len(), token.is_empty()), (4, false));
    let request = ListDeadLettersRequest {
        page_token: token,
        ..Default::default()
    };
    let (rest, token) = list(&world, request).await;
    assert_eq!((rest.len(), token.is_empty()), (2, true));
    let letter = &first[0];
    assert_eq!(
        (letter.integration_id.as_str(), letter.capture_id.as_str()),
        ("acme", "capture-0")
    );
    let event = letter.event.as_ref().expect("an event");
    assert_eq!(event.reason(), DeliveryReason::RequestRejected);
    assert_eq!(
        (event.last_http_status, event.last_error.as_str()),
        (402, "HTTP 402 Payment Required")
    );
    assert!(letter.payload_bytes > 100 && letter.dead_letter_time.is_some());

    let other = ListDeadLettersRequest {
        integration_id: "other".into(),
        ..Default::default()
    };
    assert!(list(&world, other).await.0.is_empty());
    let expired = ListDeadLettersRequest {
        reason: DeliveryReason::Expired.into(),
        ..Default::default()
    };
    assert!(list(&world, expired).await.0.is_empty());
    let bad = ListDeadLettersRequest {
        reason: 99,
        ..Default::default()
    };
    let refused = letters(&world)
        .list_dead_letters(bad)
        .await
        .expect_err("refused");
    assert_eq!(
        violations(&refused),
        [("reason".into(), "UNKNOWN_VALUE".into())]
    );
    world.stop().await;
}

#[tokio::test]
async fn a_replay_sends_the_same_events_again_and_says_beforehand_how_many() {
    let mut world = world_with_dead_letters().await;
    let before = list(&world, ListDeadLettersRequest::default()).await.0;
    let replay = |dry_run| ReplayDeadLettersRequest {
        filter: Some(DeadLetterFilter {
            integration_id: "acme".into(),
            ..Default::default()
        }),
        dry_run,
        ..Default::default()
    };
    let dry = letters(&world)
        .replay_dead_letters(replay(true))
        .await
        .expect("counted")
        .into_inner();
    assert_eq!(
        (dry.event_count, dry.older_than_deduplication_count),
        (6, 0)
    );
    assert_eq!(
        list(&world, ListDeadLettersRequest::default()).await.0,
        before
    );

    world.restart().await;
    let done = letters(&world)
        .replay_dead_letters(replay(false))
        .await
        .expect("replayed");
    assert_eq!(done.into_inner().event_count, 6);
    for number in 0..3 {
        let result = world.settled(numbered(number)).await;
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
        assert!(result.events[0].attempt_count > 1);
    }
    assert!(
        list(&world, ListDeadLettersRequest::default())
            .await
            .0
            .is_empty()
    );
    let ids: Vec<_> = before
        .iter()
        .map(|l| l.event.as_ref().expect("an event").message_id.clone())
        .collect();
    let mut accepted = 0;
    for entry in world.sandbox.entries() {
        let id = entry.event()["messageId"]
            .as_str()
            .expect("an id")
            .to_owned();
        if !ids.contains(&id) {
            continue;
        }
        accepted += usize::from(matches!(
            entry.outcome,
            segment_relay::sandbox::Outcome::Accepted
        ));
        assert_eq!(entry.event()["timestamp"], "2021-03-12T00:00:00.000Z");
    }
    assert_eq!(accepted, 6);
    world.stop().await;
}

#[tokio::test]
async fn chosen_dead_letters_are_replayed_or_discarded_by_id() {
    let world = world_with_dead_letters().await;
    let all = list(&world, ListDeadLettersRequest::default()).await.0;
    let ids = |range: std::ops::Range<usize>| -> Vec<String> {
        all[range]
            .iter()
            .map(|letter| letter.dead_letter_id.clone())
            .collect()
    };
    // The track event of a capture may go alone.
    let replay = ReplayDeadLettersRequest {
        dead_letter_ids: ids(1..2),
        ..Default::default()
    };
    let replayed = letters(&world)
        .replay_dead_letters(replay)
        .await
        .expect("replayed");
    assert_eq!(replayed.into_inner().event_count, 1);
    world.arrived(1).await;
    let discard = DiscardDeadLettersRequest {
        dead_letter_ids: [ids(2..6), ids(2..3)].concat(),
        ..Default::default()
    };
    let discarded = letters(&world)
        .discard_dead_letters(discard)
        .await
        .expect("discarded");
    assert_eq!(discarded.into_inner().event_count, 4);
    let left = list(&world, ListDeadLettersRequest::default()).await.0;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].dead_letter_id, all[0].dead_letter_id);
    // What was discarded is still known.
    let events = world
        .status("capture-2")
        .await
        .expect("known")
        .result
        .expect("a result")
        .events;
    assert_eq!(states(&events), [DeliveryState::DeadLettered; 2]);
    world.stop().await;
}

#[tokio::test]
async fn a_replay_needs_a_filter_or_ids_and_room() {
    let world = World::with("[outbox]\nmax_integration_events = 4\n").await;
    world.create(acme()).await;
    for bad in [
        ReplayDeadLettersRequest::default(),
        ReplayDeadLettersRequest {
            filter: Some(DeadLetterFilter::default()),
            dead_letter_ids: vec!["1".into()],
            ..Default::default()
        },
        ReplayDeadLettersRequest {
            dead_letter_ids: vec!["x".into()],
            ..Default::default()
        },
        ReplayDeadLettersRequest {
            dead_letter_ids: vec!["1".into(); 1_001],
            ..Default::default()
        },
    ] {
        let refused = letters(&world)
            .replay_dead_letters(bad)
            .await
            .expect_err("refused");
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    world.dead_letter("acme", numbered(0), 402).await;
    world.misbehave(Rule {
        status: Some(500),
        ..Rule::default()
    });
    world.accept(numbered(1)).await;
    world.accept(numbered(2)).await;
    let all = || ReplayDeadLettersRequest {
        filter: Some(DeadLetterFilter::default()),
        ..Default::default()
    };
    let full = letters(&world)
        .replay_dead_letters(all())
        .await
        .expect_err("no room");
    assert_eq!(full.code(), Code::ResourceExhausted);
    world.behave();
    for number in [1, 2] {
        world.settled(numbered(number)).await;
    }
    let replayed = letters(&world)
        .replay_dead_letters(all())
        .await
        .expect("replayed")
        .into_inner();
    // One event leaves room for no other, as long as it waits.
    assert!(replayed.event_count >= 1);
    world.stop().await;
}
