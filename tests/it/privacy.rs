//! A person's data is erased, also while it is on its way.

use std::time::Duration;

use segment_relay::{
    proto::{
        CaptureBatchRequest, DataRegion, DeadLetterFilter, DeliveryReason, DeliveryState,
        EraseSubjectRequest, ErasureReceipt, Integration, ListDeadLettersRequest,
        ListErasureReceiptsRequest, ReplayDeadLettersRequest, WaitFor,
        dead_letter_service_client::DeadLetterServiceClient, erase_subject_request::Subject,
        privacy_service_client::PrivacyServiceClient,
    },
    sandbox::{Outcome, Rule},
};
use tonic::Code;

use crate::{
    harness::{World, acme, credential, numbered, states, violations},
    secrets::files_with,
};

pub(crate) async fn erase(world: &World, subject: Subject, integration: &str) -> ErasureReceipt {
    let request = EraseSubjectRequest {
        subject: Some(subject),
        integration_id: integration.into(),
    };
    let mut privacy = PrivacyServiceClient::new(world.channel.clone());
    let answer = privacy.erase_subject(request).await.expect("erased");
    answer.into_inner().receipt.expect("a receipt")
}

fn email(number: usize) -> Subject {
    // Written in another way than when it was collected.
    Subject::Email(format!(" Person-{number}@Example.com "))
}

#[tokio::test]
async fn what_is_erased_has_left_the_disk_when_the_call_is_answered() {
    let world = World::start().await;
    if !world.is_embedded() {
        return;
    }
    world.create(acme()).await;
    let mut dead = numbered(1);
    dead.capture_id = "dead".into();
    world.dead_letter("acme", dead, 400).await;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    // Waiting ones of one call may share a place on the disk.
    let captures = vec![numbered(3), numbered(1), numbered(4)];
    let request = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures,
        ..CaptureBatchRequest::default()
    };
    world
        .relay()
        .capture_batch(request)
        .await
        .expect("accepted");
    let address = |number: usize| format!("person-{number}@example.com");
    let (own, others) = (address(1), [address(3), address(4)]);
    let on_disk = |text: &str| !files_with(world.outbox(), &[text]).is_empty();
    assert!(on_disk(&own), "before it is erased");

    let receipt = erase(&world, email(1), "").await;
    assert_eq!(
        (receipt.waiting_event_count, receipt.dead_letter_count),
        (2, 2)
    );
    assert_eq!(files_with(world.outbox(), &[&own]), [""; 0]);
    assert!(others.iter().all(|other| on_disk(other)), "{others:?}");
    world.stop().await;
}

#[tokio::test]
async fn waiting_events_dead_letters_and_history_go_and_a_receipt_stays() {
    let mut world = World::start().await;
    world.create(acme()).await;
    world.deliver(numbered(1)).await;
    let mut dead = numbered(1);
    dead.capture_id = "dead".into();
    world.dead_letter("acme", dead.clone(), 400).await;
    let before = world.sandbox.stats().events_accepted;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    let mut waiting = numbered(1);
    waiting.capture_id = "waiting".into();
    world.accept(waiting.clone()).await;
    world.accept(numbered(2)).await;

    let receipt = erase(&world, email(1), "").await;
    assert!(receipt.completed);
    assert_eq!(receipt.caller, "anonymous");
    assert_eq!(receipt.waiting_event_count, 2);
    assert_eq!(receipt.dead_letter_count, 2);
    assert_eq!(receipt.payload_count, 4);
    assert!(receipt.attempt_count >= 2, "{receipt:?}");

    world.behave();
    world.settled(numbered(2)).await;
    let arrived = world.sandbox.stats().events_accepted - before;
    assert_eq!(arrived, 2, "of the other person");
    for (id, state) in [
        ("waiting", DeliveryState::Skipped),
        ("dead", DeliveryState::Skipped),
        ("capture-1", DeliveryState::Delivered),
    ] {
        let status = world.status(id).await.expect("its id is kept");
        assert_eq!(states(&status.result.expect("a result").events), [state; 2]);
        assert_eq!(status.attempts, []);
    }
    let again = world.settled(waiting).await;
    assert_eq!(again.events[0].reason(), DeliveryReason::Erased);
    let mut dead_letters = DeadLetterServiceClient::new(world.channel.clone());
    let left = dead_letters
        .list_dead_letters(ListDeadLettersRequest::default())
        .await;
    assert_eq!(left.expect("listed").into_inner().dead_letters, []);

    world.restart().await;
    let mut privacy = PrivacyServiceClient::new(world.channel.clone());
    let list = ListErasureReceiptsRequest {
        email_sha256: receipt.email_sha256.clone(),
        ..Default::default()
    };
    let kept = privacy
        .list_erasure_receipts(list)
        .await
        .expect("listed")
        .into_inner();
    assert_eq!(kept.receipts, [receipt]);
    world.stop().await;
}

#[tokio::test]
async fn an_erasure_waits_for_the_request_that_carries_the_events() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        delay_ms: Some(300),
        ..Rule::default()
    });
    world.accept(numbered(1)).await;
    world.request_under_way().await;
    let receipt = erase(&world, email(1), "acme").await;
    // It was delivered: nothing of it waited any more.
    assert_eq!(receipt.waiting_event_count, 0);
    assert_eq!(receipt.attempt_count, 1);
    assert_eq!(world.sandbox.stats().events_accepted, 2);
    let status = world.status("capture-1").await.expect("known");
    let result = status.result.expect("a result");
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    world.stop().await;
}

#[tokio::test]
async fn what_is_counted_as_waiting_is_never_sent_however_they_race() {
    let fast = "[delivery]\nmax_events_per_second = 1000000\nburst_events = 1000000\n\
        retry_base_ms = 10\nretry_max_ms = 20\n";
    let world = World::with(fast).await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(503),
        share: Some(0.5),
        delay_ms: Some(2),
        ..Rule::default()
    });
    for round in 0..30 {
        let captures: Vec<_> = (0..8).map(|n| numbered(round * 8 + n)).collect();
        for capture in &captures {
            world.accept(capture.clone()).await;
        }
        let person = round * 8 + round % 8;
        let receipt = erase(&world, email(person), "acme").await;
        // Either it was sent, or it was waiting and never is.
        let id = numbered(person).capture_id;
        let result = world
            .status(&id)
            .await
            .expect("known")
            .result
            .expect("a result");
        let delivered = states(&result.events)
            .iter()
            .filter(|state| **state == DeliveryState::Delivered)
            .count();
        assert_eq!(
            delivered as u64 + receipt.waiting_event_count,
            2,
            "{receipt:?}"
        );
        for capture in captures {
            world.settled(capture).await;
        }
        let sent = world.sandbox.entries();
        let of_person = format!("person-{person}@example.com");
        let user: Vec<_> = sent
            .iter()
            .filter(|one| one.event_json().contains(&of_person))
            .collect();
        let identified = usize::from(states(&result.events)[0] == DeliveryState::Delivered);
        assert!(
            user.len() >= identified && (identified == 1 || user.is_empty()),
            "{result:?}"
        );
    }
    world.stop().await;
}

#[tokio::test]
async fn a_replay_brings_nothing_back_while_a_person_is_erased() {
    let world = World::start().await;
    for (id, key) in [
        ("acme", "write-key-of-acme-0001"),
        ("other", "write-key-of-other-01"),
    ] {
        let credentials = vec![credential(DataRegion::NonEu, key)];
        let integration = Integration {
            integration_id: id.into(),
            credentials,
            ..acme()
        };
        world.create(integration).await;
    }
    // A dead letter in the one, a request under way in the other.
    let rule = |key: &str| Rule {
        write_key: Some(key.into()),
        ..Rule::default()
    };
    world.dead_letter("other", numbered(1), 400).await;
    let accepted = |sandbox: &segment_relay::sandbox::Sandbox| {
        let sent = sandbox.entries();
        let sent = sent.iter().filter(|entry| {
            entry.request.write_key_hint == "r-01" && matches!(entry.outcome, Outcome::Accepted)
        });
        sent.count() as u64
    };
    let before = accepted(&world.sandbox);
    let slow = |key, delay| Rule {
        delay_ms: Some(delay),
        ..rule(key)
    };
    let rules = vec![
        slow("write-key-of-acme-0001", 500),
        slow("write-key-of-other-01", 1_500),
    ];
    world.sandbox.set_rules(rules).expect("fine rules");
    world.accept(numbered(1)).await;
    world.request_under_way().await;
    let erasure = erase(&world, email(1), "");
    let replay = async {
        // The erasure waits for the request by now.
        tokio::time::sleep(Duration::from_millis(150)).await;
        let everything = ReplayDeadLettersRequest {
            filter: Some(DeadLetterFilter::default()),
            ..Default::default()
        };
        let mut dead_letters = DeadLetterServiceClient::new(world.channel.clone());
        dead_letters.replay_dead_letters(everything).await
    };
    let (receipt, replayed) = tokio::join!(erasure, replay);
    replayed.expect("answered");
    // Whichever came first: what the receipt counts is not sent.
    world.behave();
    let sandbox = std::sync::Arc::clone(&world.sandbox);
    world.stop().await;
    let sent = accepted(&sandbox) - before;
    let counted = receipt.dead_letter_count + receipt.waiting_event_count;
    assert_eq!(sent + counted, 2, "{receipt:?}");
}

#[tokio::test]
async fn an_erasure_keeps_to_its_integration_and_names_what_is_wrong() {
    let world = World::start().await;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    for id in ["acme", "other"] {
        world
            .create(Integration {
                integration_id: id.into(),
                ..acme()
            })
            .await;
        let request = segment_relay::proto::CaptureRequest {
            integration_id: id.into(),
            capture: Some(numbered(1)),
            wait_for: WaitFor::Accepted.into(),
        };
        world.relay().capture(request).await.expect("accepted");
    }
    let hash = "not a hash";
    for (subject, integration, field) in [
        (None, "", "subject"),
        (Some(Subject::Email("nobody".into())), "", "email"),
        (Some(Subject::EmailSha256(hash.into())), "", "email_sha256"),
        (Some(email(1)), "Not An Id", "integration_id"),
    ] {
        let request = EraseSubjectRequest {
            subject,
            integration_id: integration.into(),
        };
        let mut privacy = PrivacyServiceClient::new(world.channel.clone());
        let refused = privacy.erase_subject(request).await.expect_err("refused");
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert_eq!(violations(&refused)[0].0, field);
    }
    let user_id = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(
        "person-1@example.com",
    ));
    let one = erase(&world, Subject::EmailSha256(user_id.clone()), "acme").await;
    assert_eq!(one.waiting_event_count, 2);
    let rest = erase(&world, Subject::EmailSha256(user_id), "").await;
    assert_eq!(rest.waiting_event_count, 2);
    world.stop().await;
}
