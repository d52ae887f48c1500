//! What captures that share a message have of their own: outcome, place, erasure.

use super::*;
use crate::{
    outbox::jetstream::{chunk, wire::ToStore},
    outbox::{
        NewCapture, Selection, Submitted,
        conformance::{id, ids, lane, lease, new_capture, settle, submit, user_of},
    },
    status::{Outcome, State},
    time::UnixMillis,
};

pub(super) const NAME: &str = "acme";

fn accepted(capture_id: &str) -> NewCapture {
    NewCapture {
        user_id: Some(user_of(capture_id)),
        ..new_capture(NAME, capture_id, 0)
    }
}

/// Captures of one call, which share a message.
pub(super) async fn submit_together(outbox: &dyn Outbox, capture_ids: &[&str]) {
    let captures = capture_ids.iter().map(|one| accepted(one)).collect();
    submit(outbox, captures).await;
}

/// Messages of a kind, by their subjects: `c` records, `q` queues, `s` outcomes.
async fn subjects(outbox: &JetStreamOutbox, kind: char) -> Vec<(String, u64)> {
    let shared = &outbox.0;
    let all = shared.layout.all(0, kind, None);
    let found = shared.wire.count(&shared.layout.stream(0), &all).await;
    let mut found = found.expect("counted");
    found.sort();
    found
}

pub(super) async fn count(outbox: &JetStreamOutbox, kind: char) -> u64 {
    let found = subjects(outbox, kind).await;
    found.into_iter().map(|(_, count)| count).sum()
}

async fn state(outbox: &dyn Outbox, capture_id: &str) -> State {
    let found = outbox.find(&id(NAME), capture_id).await.expect("read");
    found.expect("known").track.state
}

pub(super) async fn waiting(outbox: &dyn Outbox) -> u64 {
    outbox.backlog(&id(NAME)).await.expect("counted").events
}

#[tokio::test]
async fn what_is_delivered_at_the_first_try_shares_its_messages() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    submit_together(&outbox, &["a", "b", "c", "d"]).await;
    let queues = subjects(&outbox, 'q').await;
    assert_eq!(queues, [("test.0.q.acme.non_eu.1.l.4".to_owned(), 1)]);
    assert_eq!((count(&outbox, 'c').await, waiting(&outbox).await), (4, 8));

    // Only a part of the message is leased and settled.
    let leased = lease(&outbox, NAME, 4).await;
    assert_eq!(ids(&leased), ["a", "b"]);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert_eq!(
        (count(&outbox, 'c').await, count(&outbox, 's').await),
        (4, 1)
    );
    assert_eq!(waiting(&outbox).await, 4);
    for (capture, delivered) in [("a", true), ("b", true), ("c", false), ("d", false)] {
        let state = state(&outbox, capture).await;
        assert_eq!(
            matches!(state, State::Delivered { .. }),
            delivered,
            "{capture}"
        );
    }
    // A repetition hears the same.
    let again = submit(&outbox, vec![accepted("a")]).await;
    let Submitted::Duplicate(record) = &again[0] else {
        panic!("{again:?}");
    };
    assert!(
        record.is_final() && record.attempts.len() == 1,
        "{record:?}"
    );

    // The rest is another relay's, from the middle of the message on.
    outbox.close().await;
    let outbox = rig.relay().await;
    let leased = lease(&outbox, NAME, 10).await;
    assert_eq!(ids(&leased), ["c", "d"]);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert!(lease(&outbox, NAME, 10).await.is_empty());
    assert_eq!(
        (count(&outbox, 's').await, count(&outbox, 'q').await),
        (2, 0)
    );
    assert_eq!((count(&outbox, 'c').await, waiting(&outbox).await), (4, 0));
}

#[tokio::test]
async fn an_outcome_is_kept_longer_than_the_records_that_it_speaks_for() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let (short, long) = (Duration::from_secs(60), Duration::from_secs(3_600));
    // Accepted by a relay with one setting, settled by one with another.
    for (number, (before, after)) in [(long, short), (short, long)].into_iter().enumerate() {
        let outbox = rig.remembering(before).await;
        let name = format!("acme-{number}");
        submit(&outbox, vec![new_capture(&name, "a", 0)]).await;
        outbox.close().await;
        let outbox = rig.remembering(after).await;
        let leased = lease(&outbox, &name, 2).await;
        settle(&outbox, leased, |_, _| Outcome::Delivered).await;
        let shared = &outbox.0;
        let (stream, lane) = (shared.layout.stream(0), lane(&name));
        let record = shared.layout.record(&id(&name), "a");
        let (record, headers) = shared
            .wire
            .last(&stream, &record)
            .await
            .expect("read")
            .expect("there");
        let (message, headers) = if after == short {
            // The record stays for as long as it was meant to, and so does the outcome.
            let outcome = shared.layout.all_outcomes(&lane, record.sequence + 1);
            let found = shared.wire.last(&stream, &outcome).await.expect("read");
            found.expect("there")
        } else {
            // It would go too soon, so there is a new one.
            (record, headers)
        };
        let kept = headers.get("Nats-TTL").expect("a time").as_str();
        let kept: u64 = kept.trim_end_matches('s').parse().expect("seconds");
        assert!(kept >= 3_600, "{kept} s for {}", message.subject);
        let found = outbox.find(&id(&name), "a").await.expect("read");
        assert!(found.expect("known").is_final());
    }
}

#[tokio::test]
async fn captures_of_one_message_go_their_own_ways() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    submit_together(&outbox, &["a", "b", "c", "d", "e"]).await;
    let retry = Outcome::Retry {
        reason: DeliveryReason::Timeout,
        next_attempt: UnixMillis(0),
    };
    let dead = Outcome::DeadLetter {
        reason: DeliveryReason::Expired,
    };
    let leased = lease(&outbox, NAME, 8).await;
    settle(&outbox, leased, |capture, _| match capture {
        "b" => retry,
        "c" => dead,
        _ => Outcome::Delivered,
    })
    .await;
    // a is passed; c and d are through behind b.
    assert_eq!(waiting(&outbox).await, 4);
    let found = [
        state(&outbox, "a").await,
        state(&outbox, "b").await,
        state(&outbox, "c").await,
        state(&outbox, "d").await,
        state(&outbox, "e").await,
    ];
    assert!(
        matches!(
            found,
            [
                State::Delivered { .. },
                State::Retrying { .. },
                State::DeadLettered { .. },
                State::Delivered { .. },
                State::Queued
            ]
        ),
        "{found:?}"
    );
    outbox.close().await;
    let outbox = rig.relay().await;
    assert_eq!(waiting(&outbox).await, 4);
    // The dead letter comes back behind, although its message is still there.
    let replayed = outbox.replay(
        Selection::Filter(DeadLetterFilter::default()),
        UnixMillis::now(),
    );
    assert_eq!(replayed.await, Ok(Ok(2)));
    assert_eq!(waiting(&outbox).await, 6);
    let leased = lease(&outbox, NAME, 10).await;
    let mut sent = ids(&leased);
    sent.sort_unstable();
    assert_eq!(sent, ["b", "c", "e"]);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    // What was replayed is passed over: it was sent from its old place.
    assert!(lease(&outbox, NAME, 10).await.is_empty());
    assert_eq!((waiting(&outbox).await, count(&outbox, 'q').await), (0, 0));
}

async fn erase(outbox: &dyn Outbox, person: &str) -> ErasureReceipt {
    try_erase(outbox, person).await.expect("erased")
}

pub(super) async fn try_erase(
    outbox: &dyn Outbox,
    person: &str,
) -> Result<ErasureReceipt, OutboxError> {
    let subject = SubjectQuery {
        user_ids: vec![user_of(person)],
        integration_id: None,
    };
    conformance::try_erase(outbox, subject).await
}

/// Whether any message of the queues has a payload of this capture.
pub(super) async fn has_payload(outbox: &JetStreamOutbox, capture_id: &str) -> bool {
    let shared = &outbox.0;
    let all = shared.layout.all(0, 'q', None);
    let stream = shared.layout.stream(0);
    let read = shared.wire.read(&stream, &all, 1, (100, 1 << 20));
    let read = read.await.expect("read");
    let captures = read
        .into_iter()
        .flat_map(|one| chunk::unpack(one.payload).expect("sound"));
    captures
        .filter_map(|one| one.track)
        .any(|payload| String::from_utf8_lossy(&payload.bytes).contains(capture_id))
}

#[tokio::test]
async fn an_erasure_takes_a_person_out_of_a_message_and_leaves_the_others_in_their_places() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    submit_together(&outbox, &["ann-1", "bob-1", "cid-1", "bob-2", "dan-1"]).await;
    // One is delivered, and its payload is in the message still.
    let leased = lease(&outbox, NAME, 2).await;
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert!(has_payload(&outbox, "ann-1").await);
    let receipt = erase(&outbox, "ann").await;
    assert_eq!((receipt.waiting_event_count, receipt.attempt_count), (0, 1));
    assert!(!has_payload(&outbox, "ann-1").await);
    // Two of one person, in a message that was changed before.
    let receipt = erase(&outbox, "bob").await;
    assert_eq!((receipt.waiting_event_count, receipt.payload_count), (4, 4));
    for (capture, there) in [
        ("bob-1", false),
        ("bob-2", false),
        ("cid-1", true),
        ("dan-1", true),
    ] {
        assert_eq!(has_payload(&outbox, capture).await, there, "{capture}");
    }
    let queues = subjects(&outbox, 'q').await;
    assert!(
        matches!(&queues[..], [(subject, 1)] if subject.ends_with(".l.6.5")),
        "one message, in the place of another: {queues:?}"
    );
    assert_eq!(waiting(&outbox).await, 4);
    outbox.close().await;
    let outbox = rig.relay().await;
    let leased = lease(&outbox, NAME, 10).await;
    assert_eq!(ids(&leased), ["cid-1", "dan-1"]);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert_eq!((waiting(&outbox).await, count(&outbox, 'q').await), (0, 0));
    let again = erase(&outbox, "bob").await;
    assert_eq!((again.payload_count, again.attempt_count), (0, 0));
}

#[tokio::test]
async fn an_erasure_that_was_interrupted_is_finished_by_the_next_holder_of_the_lane() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let outbox = rig.relay().await;
    submit_together(&outbox, &["ann-1", "bob-1"]).await;
    let shared = &outbox.0;
    let (stream, lane) = (shared.layout.stream(0), lane(NAME));
    let before = shared
        .wire
        .at(&stream, 3)
        .await
        .expect("read")
        .expect("there");
    erase(&outbox, "ann").await;
    outbox.close().await;
    // As if the relay had died before it removed the message: both are there.
    let outbox = rig.relay().await;
    let shared = &outbox.0;
    let mut captures = chunk::unpack(before.payload).expect("sound");
    let again = ToStore {
        subject: before.subject.clone(),
        payload: chunk::pack(captures.clone()),
        expected: None,
        keep: None,
    };
    let sequence = shared.wire.store(vec![again]).await.expect("stored");
    captures[0].identify = None;
    captures[0].track = None;
    let changed = ToStore {
        subject: shared.layout.replaced(&lane, 0, sequence, captures.len()),
        payload: chunk::pack(captures),
        expected: None,
        keep: None,
    };
    shared.wire.store(vec![changed]).await.expect("stored");
    assert!(has_payload(&outbox, "ann-1").await);
    let leased = lease(&outbox, NAME, 10).await;
    assert_eq!(ids(&leased), ["bob-1"]);
    assert!(!has_payload(&outbox, "ann-1").await);
}
