//! Captures with nothing to send: their ids stay free.

use super::{privacy::erase, *};

pub(crate) fn skipped(capture_id: &str, content: u8) -> NewCapture {
    NewCapture {
        user_id: None,
        content: Content::Skip {
            reason: DeliveryReason::NoEmail,
        },
        ..new_capture("acme", capture_id, content)
    }
}

fn sent(capture_id: &str, content: u8) -> NewCapture {
    new_capture("acme", capture_id, content)
}

/// The answers in short: how each was taken, and the state that it is in.
fn words(answers: &[Submitted]) -> Vec<&'static str> {
    let word = |answer: &Submitted| match answer {
        Submitted::Accepted(record) if record.is_final() => "skipped",
        Submitted::Accepted(_) => "queued",
        Submitted::Duplicate(_) => "duplicate",
        Submitted::Conflict => "conflict",
        Submitted::Full(_) => "full",
        Submitted::Stale => "stale",
    };
    answers.iter().map(word).collect()
}

async fn one(outbox: &dyn Outbox, capture: NewCapture) -> &'static str {
    words(&submit(outbox, vec![capture]).await)[0]
}

async fn state(outbox: &dyn Outbox, capture_id: &str) -> State {
    let found = outbox.find(&id("acme"), capture_id).await.expect("read");
    found.expect("remembered").track.state
}

async fn reopened(rig: &impl Rig, outbox: Arc<dyn Outbox>) -> Arc<dyn Outbox> {
    outbox.close().await;
    rig.open().await
}

pub(crate) async fn a_skipped_capture_leaves_its_id_free(rig: &impl Rig) {
    let mut outbox = rig.open().await;
    assert_eq!(one(&*outbox, skipped("a", 0)).await, "skipped");
    assert_eq!(one(&*outbox, sent("b", 0)).await, "queued");
    assert_eq!(one(&*outbox, skipped("a", 0)).await, "duplicate");
    outbox = reopened(rig, outbox).await;
    assert_eq!(one(&*outbox, skipped("a", 0)).await, "duplicate");
    // Skipped again: the newer content stands.
    assert_eq!(one(&*outbox, skipped("a", 1)).await, "skipped");
    outbox = reopened(rig, outbox).await;
    assert_eq!(one(&*outbox, skipped("a", 1)).await, "duplicate");
    assert_eq!(one(&*outbox, skipped("c", 0)).await, "skipped");
    // Other content, and the same content once it is to be sent.
    assert_eq!(one(&*outbox, sent("a", 2)).await, "queued");
    assert_eq!(one(&*outbox, sent("c", 0)).await, "queued");
    for _ in 0..2 {
        for (capture_id, content) in [("a", 2), ("c", 0)] {
            assert_eq!(state(&*outbox, capture_id).await, State::Queued);
            let (same, other) = (content, content + 1);
            assert_eq!(one(&*outbox, sent(capture_id, same)).await, "duplicate");
            assert_eq!(one(&*outbox, skipped(capture_id, same)).await, "duplicate");
            assert_eq!(one(&*outbox, sent(capture_id, other)).await, "conflict");
            assert_eq!(one(&*outbox, skipped(capture_id, other)).await, "conflict");
        }
        outbox = reopened(rig, outbox).await;
    }
    // Accepted when it was to be sent, and sent once.
    let leased = lease(&*outbox, "acme", 10).await;
    assert_eq!(ids(&leased), ["b", "a", "c"]);
    settle(&*outbox, leased, |_, _| Outcome::Delivered).await;
    outbox = reopened(rig, outbox).await;
    assert_eq!(one(&*outbox, sent("a", 2)).await, "duplicate");
    assert_eq!(one(&*outbox, skipped("a", 3)).await, "conflict");
    assert!(lease(&*outbox, "acme", 10).await.is_empty());
    let backlog = outbox.backlog(&id("acme")).await.expect("counted");
    assert_eq!(backlog.events, 0);
    outbox.close().await;
}

pub(crate) async fn of_a_group_a_skipped_one_gives_way(rig: &impl Rig) {
    let outbox = rig.open().await;
    let group = vec![
        skipped("a", 0),
        skipped("a", 0),
        skipped("a", 1),
        sent("a", 1),
        sent("a", 1),
        skipped("a", 0),
        skipped("b", 0),
        skipped("b", 1),
    ];
    let expected = [
        "skipped",
        "duplicate",
        "skipped",
        "queued",
        "duplicate",
        "conflict",
        "skipped",
        "skipped",
    ];
    assert_eq!(words(&submit(&*outbox, group).await), expected);
    let outbox = reopened(rig, outbox).await;
    assert_eq!(state(&*outbox, "a").await, State::Queued);
    assert_eq!(one(&*outbox, skipped("b", 1)).await, "duplicate");
    // Both of a group against what is stored.
    let group = vec![skipped("a", 1), sent("a", 1), skipped("a", 0), sent("a", 0)];
    let expected = ["duplicate", "duplicate", "conflict", "conflict"];
    assert_eq!(words(&submit(&*outbox, group).await), expected);

    // Callers at the same time: one of them has it sent.
    let calls = (0..20).map(|index| {
        let capture = match index % 2 {
            0 => skipped("c", 0),
            _ => sent("c", 0),
        };
        one(&*outbox, capture)
    });
    let answers = futures_util::future::join_all(calls).await;
    let of = |wanted: &str| answers.iter().filter(|word| **word == wanted).count();
    assert_eq!(of("queued"), 1, "{answers:?}");
    assert_eq!(of("skipped") + of("duplicate"), 19, "{answers:?}");
    assert_eq!(ids(&lease(&*outbox, "acme", 10).await), ["a", "c"]);
    outbox.close().await;
}

pub(crate) async fn a_skipped_capture_stays_where_there_is_no_room_for_the_next(rig: &impl Rig) {
    let outbox = rig.open().await;
    assert_eq!(one(&*outbox, skipped("a", 0)).await, "skipped");
    let many: Vec<_> = (0..50)
        .map(|index| sent(&format!("x-{index}"), 0))
        .collect();
    assert_eq!(words(&submit(&*outbox, many).await), ["queued"; 50]);
    assert_eq!(one(&*outbox, sent("a", 1)).await, "full");
    let group = vec![skipped("b", 0), skipped("b", 1), sent("b", 2)];
    let expected = ["skipped", "skipped", "full"];
    assert_eq!(words(&submit(&*outbox, group).await), expected);
    let outbox = reopened(rig, outbox).await;
    assert_eq!(one(&*outbox, skipped("a", 0)).await, "duplicate");
    assert_eq!(one(&*outbox, skipped("b", 1)).await, "duplicate");
    let leased = lease(&*outbox, "acme", 2).await;
    settle(&*outbox, leased, |_, _| Outcome::Delivered).await;
    assert_eq!(one(&*outbox, sent("a", 1)).await, "queued");
    outbox.close().await;
}

pub(crate) async fn a_skipped_capture_of_an_erased_person_keeps_its_id(rig: &impl Rig) {
    let outbox = rig.open().await;
    let disabled = NewCapture {
        user_id: Some(user_of("ann")),
        content: Content::Skip {
            reason: DeliveryReason::IntegrationDisabled,
        },
        ..sent("ann-1", 0)
    };
    assert_eq!(one(&*outbox, disabled).await, "skipped");
    let ann = SubjectQuery {
        user_ids: vec![user_of("ann")],
        integration_id: None,
    };
    erase(&*outbox, ann).await;
    let outbox = reopened(rig, outbox).await;
    assert_eq!(one(&*outbox, sent("ann-1", 0)).await, "duplicate");
    assert_eq!(one(&*outbox, sent("ann-1", 1)).await, "conflict");
    assert!(lease(&*outbox, "acme", 10).await.is_empty());
    outbox.close().await;
}
