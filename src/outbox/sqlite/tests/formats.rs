//! Stores of former formats are opened, and upgraded where they are.

use super::*;
use crate::{
    config::Secrets,
    outbox::{
        SHARDS,
        conformance::{lane, taken},
    },
};

/// The key of the stored integrations.
const KEY: &str = "srk1_8s9DbBW/0z9L7As1uDL5Vt0qDp1D0tu0vgyMbBASBXU=";

/// The vault of [`KEY`].
pub(super) fn known_vault() -> Arc<Vault> {
    let secrets = Secrets {
        keys: Some(KEY.into()),
        key_file: "/nowhere".into(),
    };
    Arc::new(Vault::load(&secrets, true).expect("keys"))
}

#[tokio::test]
async fn a_store_of_version_6_is_upgraded_with_all_that_waits_and_what_was_deleted() {
    is_upgraded(include_str!("version_6.sql"), &[], 1).await;
}

#[tokio::test]
async fn a_store_of_version_7_is_upgraded_with_all_that_waits_and_what_was_deleted() {
    let journal = include_bytes!("version_7.journal");
    is_upgraded(include_str!("version_7.sql"), journal, 2).await;
}

/// `waiting`: captures of `kept` that wait.
async fn is_upgraded(dump: &str, journal: &[u8], waiting: usize) {
    let directory = tempfile::tempdir().expect("a directory");
    let database = directory.path().join("relay.db");
    let connection = rusqlite::Connection::open(&database).expect("made");
    connection.execute_batch(dump).expect("filled");
    drop(connection);
    for (name, content) in [("0", journal), ("1", &[]), ("2", &[])] {
        let path = directory.path().join(format!("relay.journal-{name}"));
        std::fs::write(path, content).expect("written");
    }
    // The second time it is a store of the present format.
    for _ in 0..2 {
        let outbox = SqliteOutbox::open(&options(directory.path()), &known_vault()).expect("opens");
        let known = outbox.integrations().await.expect("read");
        let known: Vec<&str> = known
            .iter()
            .map(|one| one.integration_id.as_str())
            .collect();
        assert_eq!(known, ["kept"]);
        for (name, last) in [("kept", 1), ("deleted", 1), ("other", 0)] {
            assert_eq!(outbox.last_incarnation(&id(name)).await, Ok(last), "{name}");
        }
        let budget = LeaseBudget {
            max_events: 10,
            max_bytes: 10_000,
        };
        let mut leased = Vec::new();
        for shard in 0..SHARDS {
            let lane = LaneKey {
                shard,
                ..lane("kept")
            };
            leased.extend(
                outbox
                    .lease(&lane, budget, LeaseScope::All)
                    .await
                    .expect("leased"),
            );
        }
        assert_eq!(leased.len(), waiting);
        let sound = |one: &LeasedCapture| !one.damaged && one.event_count() == 2;
        assert!(leased.iter().all(sound));
        let all = || Selection::Filter(DeadLetterFilter::default());
        let counted = outbox.count_dead_letters(all(), UnixMillis(0)).await;
        let counted = counted.expect("counted");
        assert_eq!((counted.events, counted.former), (2, 2));
        assert_eq!(taken(outbox.replay(all(), NOW).await), 0);
        outbox.close().await;
    }
    let connection = rusqlite::Connection::open(&database).expect("opened");
    let last = connection.query_row("SELECT last FROM dead_letter_id", [], |row| row.get(0));
    assert_eq!(last, Ok(2), "the ids of what it had are not given again");
}
