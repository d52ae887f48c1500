mod admission;
mod check;
mod formats;
mod keys;
mod model;
mod notices;
mod power_loss;
mod tenants;

use std::{path::Path, sync::LazyLock};

use super::*;
use crate::{
    event::{EventPair, EventType},
    metrics::Metrics,
    outbox::{
        BoxFuture, Content, DeadLetterFilter, LaneKey, LeaseBudget, LeaseScope, LeasedCapture,
        NewCapture, Outbox, Quota, Selection, Settlement, Submitted,
        conformance::{
            self, LIMITS, NOW, Rig, id, ids, lease, new_capture, settle, submit, submit_one,
        },
    },
    proto::DeliveryReason,
    region::Region,
    status::{Outcome, State},
    time::UnixMillis,
};

/// An outbox in a directory of its own.
struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }
}

impl Rig for Directory {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Outbox>> {
        Box::pin(async { Arc::new(open(self.0.path())) as Arc<dyn Outbox> })
    }
}

conformance::suite!(Directory::new());

fn options(directory: &Path) -> SqliteOptions {
    SqliteOptions {
        directory: directory.to_owned(),
        limits: LIMITS,
        group_commit_max: 64,
        remember: Duration::from_secs(3_600),
        encrypt_payloads: false,
        metrics: Metrics::off(),
    }
}

/// The key of all tests in this process.
fn vault() -> Arc<Vault> {
    static VAULT: LazyLock<Arc<Vault>> =
        LazyLock::new(|| Arc::new(Vault::forgetful().expect("random")));
    Arc::clone(&VAULT)
}

fn open(directory: &Path) -> SqliteOutbox {
    SqliteOutbox::open(&options(directory), &vault()).expect("opens")
}

fn count(directory: &Path, table: &str) -> i64 {
    let connection = rusqlite::Connection::open(directory.join("relay.db")).expect("opens");
    let sql = format!("SELECT count(*) FROM {table}");
    connection
        .query_row(&sql, [], |row| row.get(0))
        .expect("counted")
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
    outbox.flush().await.expect("flushed");
    outbox.maintain().await.expect("maintained");
    for (capture, kept) in [("waiting", true), ("old", false), ("young", true)] {
        let found = outbox.find(&id("acme"), capture).await.expect("read");
        assert_eq!(found.is_some(), kept, "{capture}");
    }
    outbox.close().await;
}

#[tokio::test]
async fn an_export_holds_the_newest_capture_of_each_id() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let skipped = |content| conformance::skipped("a", content);
    submit(&outbox, vec![skipped(0), skipped(1), skipped(2)]).await;
    outbox.flush().await.expect("flushed");
    submit(&outbox, vec![new_capture("acme", "b", 0)]).await;
    submit(&outbox, vec![new_capture("acme", "a", 3)]).await;
    outbox.close().await;
    assert_eq!(count(directory.path(), "capture"), 5);
    let export = super::export::Export::open(directory.path(), &vault()).expect("opens");
    assert_eq!(export.count().expect("counted"), 2);
    let captures = export.captures(0, 10).expect("read");
    let ids: Vec<_> = captures.iter().map(|one| one.capture_id.as_str()).collect();
    assert_eq!(ids, ["b", "a"]);
}

#[tokio::test]
async fn lanes_that_wait_are_looked_into_now_and_then() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    submit_one(&outbox, "acme", "1").await;
    submit_one(&outbox, "other", "1").await;
    settle(&outbox, lease(&outbox, "other", 2).await, |_, _| {
        Outcome::Delivered
    })
    .await;
    // Delivery hears of them, and forgets them.
    assert_eq!(outbox.signals().ready_lanes().await.len(), 2);
    while outbox.maintain().await.expect("maintained") {}
    let lanes: Vec<_> = outbox.signals().ready_lanes().await.into_iter().collect();
    assert_eq!(lanes, [conformance::lane("acme")]);
    outbox.close().await;
}

#[tokio::test]
async fn a_second_relay_an_unknown_version_and_a_foreign_file_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let second = SqliteOutbox::open(&options(directory.path()), &vault());
    assert!(matches!(second, Err(OpenError::Locked(_))));
    outbox.close().await;

    let database = directory.path().join("relay.db");
    let connection = rusqlite::Connection::open(&database).expect("opens");
    connection
        .pragma_update(None, "user_version", 999)
        .expect("written");
    drop(connection);
    let newer = SqliteOutbox::open(&options(directory.path()), &vault());
    assert!(matches!(newer, Err(OpenError::Version { found: 999, .. })));

    let connection = rusqlite::Connection::open(&database).expect("opens");
    connection
        .pragma_update(None, "application_id", 1)
        .expect("written");
    drop(connection);
    let foreign = SqliteOutbox::open(&options(directory.path()), &vault());
    assert!(matches!(foreign, Err(OpenError::Foreign(_))));

    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(directory.path().join(format!("relay.db{suffix}")));
    }
    std::fs::write(
        &database,
        "not a database at all, but long enough to be read as one",
    )
    .expect("written");
    let text = SqliteOutbox::open(&options(directory.path()), &vault());
    assert!(matches!(text, Err(OpenError::Foreign(_))), "{text:?}");
}

#[cfg(unix)]
#[tokio::test]
async fn the_files_are_for_their_owner_alone_also_in_an_open_directory() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().expect("a directory");
    let open_to_all = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(directory.path(), open_to_all).expect("set");
    let outbox = open(directory.path());
    submit_one(&outbox, "acme", "a").await;
    for file in [
        "relay.db",
        "relay.db-wal",
        "relay.db-shm",
        "relay.journal-0",
        "relay.journal-1",
    ] {
        let mode = std::fs::metadata(directory.path().join(file))
            .expect("a file")
            .permissions();
        assert_eq!(mode.mode() & 0o077, 0, "{file}");
    }
    outbox.close().await;
}

#[tokio::test]
async fn a_payload_that_the_disk_has_changed_is_found_by_its_checksum() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    for capture in ["a", "b", "c"] {
        submit_one(&outbox, "acme", capture).await;
    }
    outbox.flush().await.expect("flushed");
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
    let connection =
        schema::open_for_reading(&directory.path().join("relay.db"), 1_024).expect("opens");
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
            "SEARCH q USING INDEX queue_by_lane (lane=? AND replay=? AND rowid>?)",
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

#[tokio::test]
async fn what_is_settled_out_of_its_turn_does_not_come_back_and_holds_nobody_up() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let late = |millis| UnixMillis(NOW.0 + millis);
    let captures = ["a", "b", "c", "d"].into_iter().zip(0..);
    let captures = captures.map(|(capture_id, millis)| NewCapture {
        accept_time: late(millis),
        ..new_capture("acme", capture_id, 0)
    });
    submit(&outbox, captures.collect()).await;
    // The second and third out of their turn; with the first all three are gone.
    for (settled, left, oldest) in [
        ("c", &["a", "b", "d"][..], late(0)),
        ("b", &["a", "d"][..], late(0)),
        ("a", &["d"][..], late(3)),
    ] {
        let mut leased = lease(&outbox, "acme", 8).await;
        leased.retain(|capture| capture.record.capture_id == settled);
        settle(&outbox, leased, |_, _| Outcome::Delivered).await;
        assert_eq!(ids(&lease(&outbox, "acme", 8).await), left);
        let backlog = outbox.backlog(&id("acme")).await.expect("read");
        assert_eq!(backlog.events, 2 * left.len() as u64);
        assert_eq!(backlog.oldest, Some(oldest));
    }
    outbox.close().await;
    let outbox = open(directory.path());
    assert_eq!(ids(&lease(&outbox, "acme", 8).await), ["d"]);
    outbox.close().await;
}

#[test]
fn a_path_that_can_be_no_directory_is_a_clear_error() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    std::fs::write(&file, "in the way").expect("written");
    let error = SqliteOutbox::open(&options(&file), &vault()).expect_err("refused");
    assert!(matches!(error, OpenError::Directory { .. }));
    assert!(error.to_string().starts_with("[outbox] path "), "{error}");
}

#[tokio::test]
async fn a_delivered_backlog_gives_its_space_back_to_the_disk() {
    const PAYLOAD: usize = 30_000;
    const CAPTURES: usize = 1_500;
    let directory = tempfile::tempdir().expect("a directory");
    let plenty = SqliteOptions {
        limits: Limits {
            max_events: 1_000_000,
            max_bytes: 1 << 40,
            max_integration_events: 1_000_000,
            max_integration_bytes: 1 << 40,
        },
        ..options(directory.path())
    };
    let outbox = SqliteOutbox::open(&plenty, &vault()).expect("opens");
    let size = || {
        let files = std::fs::read_dir(directory.path()).expect("listed");
        files
            .map(|file| file.expect("a file").metadata().expect("known").len())
            .sum::<u64>()
    };
    for first in (0..CAPTURES).step_by(50) {
        let captures = (first..first + 50).map(|number| {
            let payload = || vec![b'x'; PAYLOAD];
            let events = EventPair {
                identify: payload(),
                track: payload(),
            };
            NewCapture {
                content: Content::Send { shard: 1, events },
                ..new_capture("acme", &number.to_string(), 0)
            }
        });
        submit(&outbox, captures.collect()).await;
    }
    let full = size();
    assert!(full > (CAPTURES * 2 * PAYLOAD) as u64);
    loop {
        let budget = LeaseBudget {
            max_events: 100,
            max_bytes: 10_000_000,
        };
        let lane = conformance::lane("acme");
        let leased = outbox
            .lease(&lane, budget, LeaseScope::All)
            .await
            .expect("leased");
        if leased.is_empty() {
            break;
        }
        settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    }
    outbox.flush().await.expect("flushed");
    while outbox.maintain().await.expect("maintained") {}
    outbox.close().await;
    // Some free pages are kept for what comes next.
    assert!(
        size() < 40 * 1024 * 1024,
        "{} of {full} bytes are left",
        size()
    );
}
