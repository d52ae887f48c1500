mod model;

use std::sync::Arc;

use super::*;
use crate::{
    event::{EventPair, EventType},
    outbox::{Content, Quota, SettledCapture, Submitted},
    proto::DeliveryReason,
    region::Region,
    status::{Attempt, Outcome, State},
    time::UnixMillis,
};

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

fn options(directory: &Path) -> SqliteOptions {
    SqliteOptions {
        directory: directory.to_owned(),
        limits: Limits {
            max_events: 1_000,
            max_bytes: 1_000_000,
            max_integration_events: 100,
            max_integration_bytes: 100_000,
        },
        group_commit_max: 64,
        remember: Duration::from_secs(3_600),
    }
}

fn open(directory: &Path) -> SqliteOutbox {
    SqliteOutbox::open(&options(directory)).expect("opens")
}

fn id(name: &str) -> IntegrationId {
    IntegrationId::new(name).expect("valid")
}

fn lane(name: &str) -> LaneKey {
    LaneKey {
        integration_id: id(name),
        region: Region::NonEu,
        shard: 1,
    }
}

fn new_capture(name: &str, capture_id: &str, content: u8) -> NewCapture {
    let payload = |event: &str| format!("{{\"{event}\":\"{capture_id}\"}}").into_bytes();
    NewCapture {
        integration_id: id(name),
        capture_id: capture_id.to_owned(),
        digest: [content; 16],
        region: Region::NonEu,
        mapping_version: 1,
        accept_time: NOW,
        content: Content::Send {
            shard: 1,
            events: EventPair {
                identify: payload("identify"),
                track: payload("track"),
            },
        },
    }
}

async fn submit(outbox: &SqliteOutbox, captures: Vec<NewCapture>) -> Vec<Submitted> {
    let receipt = outbox.submit(captures).await.expect("queued");
    receipt.wait().await.expect("durable")
}

async fn submit_one(outbox: &SqliteOutbox, name: &str, capture_id: &str) -> Submitted {
    submit(outbox, vec![new_capture(name, capture_id, 0)])
        .await
        .remove(0)
}

async fn lease(outbox: &SqliteOutbox, name: &str, max_events: usize) -> Vec<LeasedCapture> {
    let budget = LeaseBudget {
        max_events,
        max_bytes: 10_000,
    };
    outbox.lease(&lane(name), budget).await.expect("leased")
}

fn ids(leased: &[LeasedCapture]) -> Vec<&str> {
    leased
        .iter()
        .map(|capture| capture.record.capture_id.as_str())
        .collect()
}

/// Settles events of one lease: those that `outcome` names.
async fn settle(
    outbox: &SqliteOutbox,
    leased: Vec<LeasedCapture>,
    outcome: impl Fn(&str, EventType) -> Outcome,
) {
    let lane = lane(leased[0].record.integration_id.as_str());
    let mut captures = Vec::new();
    for capture in leased {
        let mut record = capture.record.clone();
        record.note_attempt(Attempt {
            identify: capture.identify.is_some(),
            track: capture.track.is_some(),
            time: NOW,
            http_status: 200,
            latency: Duration::from_millis(4),
            reason: DeliveryReason::Unspecified,
            error: String::new(),
        });
        let carried = |event: &EventType| capture.payload(*event).is_some();
        let changed: Vec<_> = EventType::ALL.into_iter().filter(carried).collect();
        for event in &changed {
            let outcome = outcome(&capture.record.capture_id, *event);
            record.event_mut(*event).advance(outcome, NOW);
        }
        captures.push(SettledCapture {
            sequence: capture.sequence,
            record,
            changed,
        });
    }
    let settlement = Arc::new(Settlement { lane, captures });
    outbox.settle(settlement).await.expect("settled");
}

fn count(directory: &Path, table: &str) -> i64 {
    let connection = rusqlite::Connection::open(directory.join("relay.db")).expect("opens");
    let sql = format!("SELECT count(*) FROM {table}");
    connection
        .query_row(&sql, [], |row| row.get(0))
        .expect("counted")
}

#[tokio::test]
async fn captures_come_back_in_order_also_after_a_restart_and_go_when_delivered() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    for capture in ["c", "a", "b"] {
        assert!(matches!(
            submit_one(&outbox, "acme", capture).await,
            Submitted::Accepted(_)
        ));
    }
    outbox.close().await;

    let outbox = open(directory.path());
    assert_eq!(outbox.waiting_lanes().await, Ok(vec![lane("acme")]));
    let leased = lease(&outbox, "acme", 4).await;
    assert_eq!(ids(&leased), ["c", "a"]);
    assert_eq!(
        leased[0].identify.as_deref(),
        Some(&b"{\"identify\":\"c\"}"[..])
    );
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert_eq!(ids(&lease(&outbox, "acme", 4).await), ["b"]);
    assert_eq!(outbox.backlog(&id("acme")).await.expect("read").events, 2);
    assert_eq!(
        outbox.backlog(&id("acme")).await.expect("read").oldest,
        Some(NOW)
    );
    let found = outbox
        .find(&id("acme"), "c")
        .await
        .expect("read")
        .expect("remembered");
    assert_eq!(found.track.state, State::Delivered { at: NOW });
    assert_eq!(found.attempts.len(), 1);
    outbox.close().await;
    assert_eq!(count(directory.path(), "queue"), 1);
}

#[tokio::test]
async fn a_capture_id_is_taken_once_also_by_callers_at_the_same_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let calls = (0..20).map(|index| submit(&outbox, vec![new_capture("acme", "c", index % 2)]));
    let answers: Vec<_> = futures_util::future::join_all(calls)
        .await
        .into_iter()
        .flatten()
        .collect();
    let of = |wanted: fn(&Submitted) -> bool| answers.iter().filter(|a| wanted(a)).count();
    assert_eq!(of(|a| matches!(a, Submitted::Accepted(_))), 1);
    assert_eq!(of(|a| matches!(a, Submitted::Duplicate(_))), 9);
    assert_eq!(of(|a| matches!(a, Submitted::Conflict)), 10);
    // Another integration has ids of its own.
    assert!(matches!(
        submit_one(&outbox, "other", "c").await,
        Submitted::Accepted(_)
    ));
    outbox.close().await;
}

#[tokio::test]
async fn a_pair_is_split_only_where_one_event_is_asked_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    submit(
        &outbox,
        vec![new_capture("acme", "a", 0), new_capture("acme", "b", 0)],
    )
    .await;
    assert_eq!(ids(&lease(&outbox, "acme", 3).await), ["a"]);
    let single = lease(&outbox, "acme", 1).await;
    assert!(single[0].identify.is_some() && single[0].track.is_none());
    settle(&outbox, single, |_, _| Outcome::Delivered).await;
    let rest = lease(&outbox, "acme", 1).await;
    assert_eq!(ids(&rest), ["a"]);
    assert!(rest[0].identify.is_none() && rest[0].track.is_some());
    outbox.close().await;
}

#[tokio::test]
async fn a_lease_keeps_to_its_bytes_but_always_makes_progress() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    submit(
        &outbox,
        vec![new_capture("acme", "a", 0), new_capture("acme", "b", 0)],
    )
    .await;
    for (max_bytes, expected) in [(1, 1), (62, 2), (61, 1)] {
        let budget = LeaseBudget {
            max_events: 100,
            max_bytes,
        };
        // {"identify":"a"} and {"track":"a"} with their commas have 31 bytes.
        let leased = outbox.lease(&lane("acme"), budget).await.expect("leased");
        assert_eq!(leased.len(), expected, "{max_bytes}");
    }
    outbox.close().await;
}

#[tokio::test]
async fn dead_letters_keep_their_payload_and_delivered_events_do_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    submit_one(&outbox, "acme", "a").await;
    let leased = lease(&outbox, "acme", 10).await;
    settle(&outbox, leased.clone(), |_, event| match event {
        EventType::Identify => Outcome::Delivered,
        EventType::Track => Outcome::DeadLetter {
            reason: DeliveryReason::PayloadRejected,
        },
    })
    .await;
    // A late answer to the same lease changes nothing.
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    let found = outbox
        .find(&id("acme"), "a")
        .await
        .expect("read")
        .expect("remembered");
    assert!(matches!(found.track.state, State::DeadLettered { .. }));
    assert_eq!(found.identify.attempt_count, 1);
    assert_eq!(outbox.backlog(&id("acme")).await, Ok(Backlog::default()));
    outbox.close().await;
    assert_eq!(
        (
            count(directory.path(), "queue"),
            count(directory.path(), "dead_letter")
        ),
        (0, 1)
    );
}

#[tokio::test]
async fn bounds_refuse_whole_captures_and_a_delivery_makes_room() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let many = (0..51)
        .map(|index| new_capture("acme", &index.to_string(), 0))
        .collect();
    let answers = submit(&outbox, many).await;
    assert!(
        answers[..50]
            .iter()
            .all(|a| matches!(a, Submitted::Accepted(_)))
    );
    assert_eq!(answers[50], Submitted::Full(Quota::IntegrationEvents));
    assert_eq!(outbox.find(&id("acme"), "50").await, Ok(None));
    assert!(matches!(
        submit_one(&outbox, "other", "x").await,
        Submitted::Accepted(_)
    ));
    let leased = lease(&outbox, "acme", 2).await;
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert!(matches!(
        submit_one(&outbox, "acme", "50").await,
        Submitted::Accepted(_)
    ));
    outbox.close().await;
}

#[tokio::test]
async fn what_is_old_and_done_is_forgotten_and_what_waits_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let now = UnixMillis::now();
    let before = UnixMillis(now.0 - 2 * 3_600_000);
    let skipped = |capture: &str, accept_time| NewCapture {
        accept_time,
        content: Content::Skip {
            reason: DeliveryReason::NoEmail,
        },
        ..new_capture("acme", capture, 0)
    };
    let waiting = NewCapture {
        accept_time: before,
        ..new_capture("acme", "waiting", 0)
    };
    let captures = vec![waiting, skipped("old", before), skipped("young", now)];
    submit(&outbox, captures).await;
    outbox.maintain().await.expect("maintained");
    for (capture, kept) in [("waiting", true), ("old", false), ("young", true)] {
        let found = outbox.find(&id("acme"), capture).await.expect("read");
        assert_eq!(found.is_some(), kept, "{capture}");
    }
    outbox.close().await;
}

#[tokio::test]
async fn a_second_relay_an_unknown_version_and_a_foreign_file_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let second = SqliteOutbox::open(&options(directory.path()));
    assert!(matches!(second, Err(OpenError::Locked(_))));
    outbox.close().await;

    let database = directory.path().join("relay.db");
    let connection = rusqlite::Connection::open(&database).expect("opens");
    connection
        .pragma_update(None, "user_version", 999)
        .expect("written");
    drop(connection);
    let newer = SqliteOutbox::open(&options(directory.path()));
    assert!(matches!(newer, Err(OpenError::Version { found: 999, .. })));

    let connection = rusqlite::Connection::open(&database).expect("opens");
    connection
        .pragma_update(None, "application_id", 1)
        .expect("written");
    drop(connection);
    let foreign = SqliteOutbox::open(&options(directory.path()));
    assert!(matches!(foreign, Err(OpenError::Foreign(_))));

    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(directory.path().join(format!("relay.db{suffix}")));
    }
    std::fs::write(
        &database,
        "not a database at all, but long enough to be read as one",
    )
    .expect("written");
    let text = SqliteOutbox::open(&options(directory.path()));
    assert!(matches!(text, Err(OpenError::Foreign(_))), "{text:?}");
}

#[tokio::test]
async fn waiting_callers_and_watchers_hear_of_what_is_durable() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let mut watcher = outbox.signals().watch();
    submit_one(&outbox, "acme", "a").await;
    assert!(outbox.signals().ready_lanes().await.contains(&lane("acme")));
    let expectation = outbox.signals().expect(&id("acme"), "a");
    let change = expectation.next_change();
    let leased = lease(&outbox, "acme", 10).await;
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    change.await;
    let mut seen = Vec::new();
    while let Ok(change) = watcher.try_recv() {
        seen.push((
            change.event,
            change.record.event(change.event).state.to_proto(),
        ));
    }
    use crate::proto::DeliveryState::{Delivered, Queued};
    assert_eq!(
        seen,
        [
            (EventType::Identify, Queued),
            (EventType::Track, Queued),
            (EventType::Identify, Delivered),
            (EventType::Track, Delivered),
        ]
    );
    outbox.close().await;
    assert!(matches!(
        outbox.find(&id("acme"), "a").await,
        Err(OutboxError::Closed)
    ));
}

#[tokio::test]
async fn a_payload_that_the_disk_has_changed_is_found_by_its_checksum() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    for capture in ["a", "b", "c"] {
        submit_one(&outbox, "acme", capture).await;
    }
    let damage = |sql: &str| {
        let connection = rusqlite::Connection::open(directory.path().join("relay.db"));
        connection
            .expect("opens")
            .execute(sql, [])
            .expect("damaged");
    };
    damage("UPDATE queue SET track = x'7b7d' WHERE sequence = 1");
    damage("UPDATE capture SET status = x'ffff' WHERE sequence = 2");
    let leased = lease(&outbox, "acme", 100).await;
    let found: Vec<_> = leased
        .iter()
        .map(|c| (c.record.capture_id.as_str(), c.damaged))
        .collect();
    assert_eq!(found, [("a", true), ("b", true), ("c", false)]);
    // Set aside, they hold nobody up, and their payloads are kept.
    let reason = DeliveryReason::Damaged;
    settle(&outbox, leased[..2].to_vec(), |_, _| Outcome::DeadLetter {
        reason,
    })
    .await;
    assert_eq!(ids(&lease(&outbox, "acme", 100).await), ["c"]);
    let found = outbox
        .find(&id("acme"), "b")
        .await
        .expect("read")
        .expect("remembered");
    assert_eq!(
        found.identify.state,
        State::DeadLettered { reason, at: NOW }
    );
    outbox.close().await;
    assert_eq!(count(directory.path(), "dead_letter"), 4);
}

#[tokio::test]
async fn a_lease_reads_only_what_it_takes_however_much_waits() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let connection = schema::open_for_reading(&directory.path().join("relay.db")).expect("opens");
    let plan = |sql: &str| -> Vec<String> {
        let mut statement = connection
            .prepare(&format!("EXPLAIN QUERY PLAN {sql}"))
            .expect("SQL");
        let columns = statement.parameter_count();
        let values = vec![1_i64; columns];
        let rows = statement.query_map(rusqlite::params_from_iter(values), |row| row.get(3));
        rows.expect("a plan")
            .map(|row| row.expect("a line"))
            .collect()
    };
    let lease = plan(reader::LEASE_SQL);
    assert_eq!(
        lease,
        [
            "SEARCH q USING INDEX queue_by_lane (lane=?)",
            "SEARCH c USING INTEGER PRIMARY KEY (rowid=?)",
        ]
    );
    assert!(
        !plan(reader::LANE_SQL)
            .iter()
            .any(|line| line.contains("SCAN"))
    );
    outbox.close().await;
}
