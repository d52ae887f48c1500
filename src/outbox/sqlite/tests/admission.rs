//! Who is refused before the queue.

use std::time::Instant;

use super::*;
use crate::outbox::sqlite::{
    admission::{Admission, Reservation},
    entry::{key_of, stored_key},
};

const FULL: Submitted = Submitted::Full(Quota::IntegrationEvents);

fn new(number: usize) -> NewCapture {
    new_capture("acme", &number.to_string(), 0)
}

/// Two events each, and room for 100: `free` captures find room.
async fn nearly_full(directory: &Path, free: usize) -> SqliteOutbox {
    let outbox = open(directory);
    submit(&outbox, (0..50 - free).map(new).collect()).await;
    let answers = submit(&outbox, (100..=100 + free).map(new).collect()).await;
    assert_eq!(answers[free], FULL);
    if free > 0 {
        let leased = lease(&outbox, "acme", 2 * free).await;
        settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    }
    outbox
}

fn admit(outbox: &SqliteOutbox, captures: &[NewCapture]) -> Admission {
    outbox.shared.admit(&LIMITS, captures)
}

/// What is refused by what memory tells; nothing where that does not suffice.
fn refused(outbox: &SqliteOutbox, captures: &[NewCapture]) -> Option<Vec<Submitted>> {
    match admit(outbox, captures) {
        Admission::Refused { answers, doubtful } if doubtful.is_empty() => Some(answers),
        _ => None,
    }
}

fn reserved(outbox: &SqliteOutbox, captures: &[NewCapture]) -> Reservation {
    match admit(outbox, captures) {
        Admission::Passed(Some(reservation)) => reservation,
        other => panic!("{other:?}"),
    }
}

fn events_reserved(outbox: &SqliteOutbox) -> u64 {
    outbox.shared.lock().reserved.total().events
}

#[tokio::test]
async fn what_finds_no_room_is_refused_before_the_queue_and_what_is_known_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    // Two events each, and room for 100.
    submit(&outbox, (0..50).map(new).collect()).await;
    assert_eq!(refused(&outbox, &[new(50)]), None, "nobody asked yet");
    assert_eq!(outbox.full(&id("acme")), None, "nor here");
    assert_eq!(submit(&outbox, vec![new(50)]).await, [FULL]);

    assert_eq!(
        refused(&outbox, &[new(50), new(51)]),
        Some(vec![FULL, FULL])
    );
    assert_eq!(submit(&outbox, vec![new(50)]).await, [FULL]);
    // A known one among them, or one without events, is a matter for the committer.
    let may_know = |capture: &str| outbox.may_know(&id("acme"), capture);
    assert!(may_know("7") && !may_know("50"));
    assert_eq!(refused(&outbox, &[new(50), new(7)]), None);
    let again = submit(&outbox, vec![new(50), new(7)]).await;
    assert_eq!(again[0], FULL);
    assert!(matches!(again[1], Submitted::Duplicate(_)));
    let skipped = NewCapture {
        content: Content::Skip {
            reason: DeliveryReason::NoEmail,
        },
        ..new(60)
    };
    assert_eq!(refused(&outbox, &[skipped]), None);
    let elsewhere = new_capture("other", "1", 0);
    assert_eq!(refused(&outbox, &[elsewhere]), None);

    settle(&outbox, lease(&outbox, "acme", 10).await, |_, _| {
        Outcome::Delivered
    })
    .await;
    assert_eq!(refused(&outbox, &[new(50)]), None, "there is room");
    outbox.close().await;
}

#[tokio::test]
async fn where_memory_is_in_doubt_the_database_tells_who_is_known() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = nearly_full(directory.path(), 0).await;
    let filter = outbox.shared.filter().expect("a new store has one");
    // The filter is wrong about the second one.
    filter.add(stored_key(key_of(&id("acme"), "201")));
    let captures = [new(200), new(201)];
    assert_eq!(refused(&outbox, &captures), None);
    let Admission::Refused { answers, doubtful } = admit(&outbox, &captures) else {
        panic!("there is no room");
    };
    assert_eq!((answers.as_slice(), doubtful), (&[FULL, FULL][..], vec![1]));
    assert_eq!(
        outbox.admitted(&captures).await.err(),
        Some(vec![FULL, FULL])
    );
    assert_eq!(submit(&outbox, captures.into()).await, [FULL, FULL]);
    // And right about this one, whether the database has it yet or not.
    for _ in 0..2 {
        assert!(outbox.admitted(&[new(200), new(7)]).await.is_ok());
        outbox.flush().await.expect("flushed");
    }
    outbox.close().await;
}

#[tokio::test]
async fn room_is_promised_once_and_given_back() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = nearly_full(directory.path(), 3).await;
    let first = reserved(&outbox, &[new(200)]);
    // The first two of these find room, and the rest is for the committer to refuse.
    assert_eq!(outbox.full(&id("acme")), None);
    let others = reserved(&outbox, &[new(201), new(202), new(203)]);
    assert_eq!(events_reserved(&outbox), 6);
    assert_eq!(outbox.full(&id("acme")), Some(Quota::IntegrationEvents));
    assert_eq!(outbox.full(&id("other")), None);
    assert_eq!(refused(&outbox, &[new(204)]), Some(vec![FULL]));
    assert_eq!(
        events_reserved(&outbox),
        6,
        "what is refused reserves nothing"
    );
    let elsewhere = reserved(&outbox, &[new_capture("other", "1", 0)]);
    drop(others);
    assert_eq!(events_reserved(&outbox), 4);
    let again = reserved(&outbox, &[new(201), new(202)]);
    assert_eq!(refused(&outbox, &[new(204)]), Some(vec![FULL]));
    drop((first, elsewhere, again));
    assert_eq!(events_reserved(&outbox), 0);
    // One that has ended gives nothing back a second time.
    let mut ended = reserved(&outbox, &[new(200)]);
    ended.end(&mut outbox.shared.lock());
    assert_eq!(events_reserved(&outbox), 0);
    let other = reserved(&outbox, &[new(201)]);
    drop(ended);
    assert_eq!(events_reserved(&outbox), 2);
    drop(other);
    // With the answer it is counted as waiting, and no more as reserved.
    for number in 0..3 {
        let answer = submit(&outbox, vec![new(200 + number)]).await;
        assert!(matches!(answer[..], [Submitted::Accepted(_)]), "{number}");
        assert_eq!(events_reserved(&outbox), 0);
    }
    assert_eq!(refused(&outbox, &[new(204)]), Some(vec![FULL]));
    outbox.close().await;
}

#[tokio::test]
async fn bytes_are_reserved_too_and_in_the_whole_relay() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = nearly_full(directory.path(), 1).await;
    let waiting = outbox.backlog(&id("acme")).await.expect("read");
    let one = |name: &str, number: usize| new_capture(name, &number.to_string(), 0);
    let Content::Send { events, .. } = one("acme", 200).content else {
        panic!("it has events");
    };
    let bytes = (events.identify.len() + events.track.len()) as u64;
    let limits = Limits {
        max_integration_bytes: waiting.bytes + 2 * bytes - 1,
        max_integration_events: 1_000,
        ..LIMITS
    };
    let admit = |limits, capture| outbox.shared.admit(&limits, &[capture]);
    let first = admit(limits, one("acme", 200));
    let Admission::Refused { answers, .. } = admit(limits, one("acme", 201)) else {
        panic!("its bytes are reserved");
    };
    assert_eq!(answers, [Submitted::Full(Quota::IntegrationBytes)]);
    // What another integration has reserved counts in all.
    for (limits, quota) in [
        (
            Limits {
                max_bytes: waiting.bytes + 2 * bytes - 1,
                ..LIMITS
            },
            Quota::Bytes,
        ),
        (
            Limits {
                max_events: waiting.events + 2,
                ..LIMITS
            },
            Quota::Events,
        ),
    ] {
        let Admission::Refused { answers, .. } = admit(limits, one("other", 201)) else {
            panic!("{quota:?} are reserved");
        };
        assert_eq!(answers, [Submitted::Full(quota)]);
    }
    drop(first);
    assert!(matches!(
        admit(limits, one("acme", 201)),
        Admission::Passed(Some(_))
    ));
    outbox.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_at_the_same_time_fill_it_to_its_bound_and_leave_nothing_reserved() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = Arc::new(nearly_full(directory.path(), 10).await);
    let calls = (0..100).map(|number| {
        let outbox = Arc::clone(&outbox);
        tokio::spawn(async move { submit(&*outbox, vec![new(200 + number)]).await })
    });
    let mut accepted = 0;
    for call in calls.collect::<Vec<_>>() {
        match call.await.expect("answered").as_slice() {
            [Submitted::Accepted(_)] => accepted += 1,
            other => assert_eq!(other, [FULL]),
        }
    }
    assert_eq!(accepted, 10);
    assert_eq!(events_reserved(&outbox), 0);
    outbox.close().await;
}

#[test]
fn room_is_scarce_for_a_second_after_the_last_refusal() {
    let shared = Shared::default();
    let start = Instant::now();
    let after = |millis| start + Duration::from_millis(millis);
    let scarce_at = |millis| {
        shared.note_room(&shared.lock(), after(millis));
        shared.is_scarce()
    };
    assert!(!scarce_at(0));
    shared.note_refusal(&mut shared.lock(), after(0));
    assert!(scarce_at(500));
    shared.note_refusal(&mut shared.lock(), after(600));
    assert!(scarce_at(1_599));
    assert!(!scarce_at(1_600));
}
