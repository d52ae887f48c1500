//! What a check finds in a store that was damaged on the disk, and what an accepted damage leaves.

use super::*;
use crate::outbox::sqlite::{CheckReport, Damage, accept_damage, check};

/// A closed store in which `acme` has two captures that wait and one dead letter, and `other` one
/// capture that waits.
async fn store() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    submit_one(&outbox, "acme", "given-up").await;
    let leased = lease(&outbox, "acme", 10).await;
    settle(&outbox, leased, |_, event| match event {
        EventType::Identify => Outcome::Delivered,
        EventType::Track => Outcome::DeadLetter {
            reason: DeliveryReason::PayloadRejected,
        },
    })
    .await;
    submit_one(&outbox, "acme", "first").await;
    submit_one(&outbox, "acme", "second").await;
    submit_one(&outbox, "other", "first").await;
    outbox.close().await;
    directory
}

fn checked(directory: &Path) -> CheckReport {
    check(directory, |_, _| {}).expect("checked")
}

fn damages(directory: &Path) -> Vec<(Option<String>, u64)> {
    let damages = checked(directory).damages.into_iter();
    damages
        .map(
            |Damage {
                 integration_id,
                 events,
                 ..
             }| (integration_id, events),
        )
        .collect()
}

fn execute(directory: &Path, sql: &str) {
    let connection = rusqlite::Connection::open(directory.join("relay.db")).expect("opens");
    connection.execute_batch(sql).expect("done");
}

#[tokio::test]
async fn a_sound_store_is_counted_and_not_changed() {
    let directory = store().await;
    let expected = CheckReport {
        captures: 4,
        waiting: 6,
        dead_letters: 1,
        ..CheckReport::default()
    };
    assert_eq!(checked(directory.path()), expected);
    assert_eq!(checked(directory.path()), expected);
    let outbox = open(directory.path());
    let refused = check(directory.path(), |_, _| {});
    let refused = refused.expect_err("another relay uses it").to_string();
    assert!(refused.contains("another segment-relay"), "{refused}");
    outbox.close().await;
}

#[tokio::test]
async fn damaged_payloads_states_and_counts_are_found_with_whose_they_are() {
    let directory = store().await;
    let path = directory.path();
    let acme = |events| (Some("acme".to_owned()), events);
    execute(path, "UPDATE queue SET identify = x'00' WHERE sequence = 2");
    assert_eq!(damages(path), [acme(1)]);
    execute(path, "UPDATE dead_letter SET payload = x'00'");
    assert_eq!(damages(path), [acme(1), acme(1)]);
    execute(path, "UPDATE capture SET status = x'ff' WHERE sequence = 1");
    assert_eq!(damages(path), [acme(2), acme(1), acme(1)]);
    execute(
        path,
        "UPDATE lane SET waiting_events = 9 WHERE integration_id = 'other'",
    );
    let other = (Some("other".to_owned()), 7);
    assert_eq!(damages(path), [acme(2), acme(1), acme(1), other]);
}

#[tokio::test]
async fn events_that_a_damaged_index_hides_are_found_and_come_back_once_it_is_accepted() {
    let directory = store().await;
    let path = directory.path();
    empty_index(path, "queue_by_lane");
    let acme = |events| (Some("acme".to_owned()), events);
    let found = damages(path);
    assert!(found.contains(&acme(4)), "{found:?}");
    let outbox = open(path);
    let budget = LeaseBudget {
        max_events: 10,
        max_bytes: 10_000,
    };
    let lane = conformance::lane("acme");
    let (found, hidden) = outbox.look_for_hidden(&lane, budget).await.expect("looked");
    assert!(found.is_empty() && hidden);
    assert!(lease(&outbox, "acme", 10).await.is_empty());
    // Where nothing waits, nothing is hidden.
    let (_, hidden) = outbox
        .look_for_hidden(&conformance::lane("none"), budget)
        .await
        .expect("looked");
    assert!(!hidden);
    outbox.close().await;
    accept_damage(path, &vault()).expect("accepted");
    assert_eq!(damages(path), []);
    let outbox = open(path);
    assert_eq!(ids(&lease(&outbox, "acme", 10).await), ["first", "second"]);
    outbox.close().await;
}

/// Makes an index's only page say that it has no entries.
fn empty_index(directory: &Path, index: &str) {
    let database = directory.join("relay.db");
    execute(directory, "PRAGMA wal_checkpoint(TRUNCATE)");
    let connection = rusqlite::Connection::open(&database).expect("opens");
    let root: usize = connection
        .query_row(
            "SELECT rootpage FROM sqlite_schema WHERE name = ?1",
            [index],
            |row| row.get(0),
        )
        .expect("an index");
    let size: usize = connection
        .query_row("PRAGMA page_size", [], |row| row.get(0))
        .expect("a size");
    drop(connection);
    let mut bytes = std::fs::read(&database).expect("read");
    let page = &mut bytes[(root - 1) * size..];
    assert_eq!(page[0], 10, "a leaf of an index");
    // Number of cells; the start of their content.
    page[3..5].fill(0);
    let end = u16::try_from(size % 65_536).expect("small");
    page[5..7].copy_from_slice(&end.to_be_bytes());
    std::fs::write(&database, bytes).expect("written");
}
