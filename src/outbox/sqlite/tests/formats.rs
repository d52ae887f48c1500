//! Stores of former formats are opened, and upgraded where they are.

use super::*;
use crate::{config::Secrets, outbox::conformance::lane};

/// The key of the stored integrations.
const KEY: &str = "srk1_8s9DbBW/0z9L7As1uDL5Vt0qDp1D0tu0vgyMbBASBXU=";

fn vault() -> Arc<Vault> {
    let secrets = Secrets {
        keys: Some(KEY.into()),
        key_file: "/nowhere".into(),
    };
    Arc::new(Vault::load(&secrets, true).expect("keys"))
}

#[tokio::test]
async fn a_store_of_version_6_is_upgraded_with_all_that_waits_and_what_was_deleted() {
    is_upgraded(include_str!("version_6.sql")).await;
}

#[tokio::test]
async fn a_store_of_version_7_is_upgraded_with_all_that_waits_and_what_was_deleted() {
    is_upgraded(include_str!("version_7.sql")).await;
}

async fn is_upgraded(dump: &str) {
    let directory = tempfile::tempdir().expect("a directory");
    let database = directory.path().join("relay.db");
    let connection = rusqlite::Connection::open(&database).expect("made");
    connection.execute_batch(dump).expect("filled");
    drop(connection);
    // The second time it is a store of the present format.
    for _ in 0..2 {
        let outbox = SqliteOutbox::open(&options(directory.path()), &vault()).expect("opens");
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
        let leased = outbox
            .lease(&lane("kept"), budget, LeaseScope::All)
            .await
            .expect("leased");
        assert_eq!(leased.len(), 1);
        assert!(!leased[0].damaged && leased[0].event_count() == 2);
        let all = || Selection::Filter(DeadLetterFilter::default());
        let counted = outbox.count_dead_letters(all(), UnixMillis(0)).await;
        let counted = counted.expect("counted");
        assert_eq!((counted.events, counted.former), (2, 2));
        assert_eq!(outbox.replay(all(), NOW).await, Ok(Ok(0)));
        outbox.close().await;
    }
    let connection = rusqlite::Connection::open(&database).expect("opened");
    let last = connection.query_row("SELECT last FROM dead_letter_id", [], |row| row.get(0));
    assert_eq!(last, Ok(2), "the ids of what it had are not given again");
}
