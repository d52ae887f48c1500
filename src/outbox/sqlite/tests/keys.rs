//! What stands on the disk, under which key, and how a key is changed.

use secrecy::ExposeSecret;

use super::*;
use crate::{
    config::Secrets,
    outbox::{
        Erasure, SubjectQuery, Submitted,
        conformance::{lane, taken},
    },
    proto,
    vault::new_key,
};

conformance::suite!(Encrypted(Directory::new()));

/// The same suite with encrypted payloads.
struct Encrypted(Directory);

impl Rig for Encrypted {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Outbox>> {
        let options = SqliteOptions {
            // What sealing adds to each payload is counted too.
            limits: Limits {
                max_integration_bytes: LIMITS.max_integration_bytes + 100 * 45,
                ..LIMITS
            },
            ..encrypted(self.0.0.path())
        };
        let outbox = SqliteOutbox::open(&options, &vault()).expect("opens");
        Box::pin(async { Arc::new(outbox) as Arc<dyn Outbox> })
    }
}

fn encrypted(directory: &Path) -> SqliteOptions {
    SqliteOptions {
        encrypt_payloads: true,
        ..options(directory)
    }
}

fn keys(lines: &[&str]) -> Arc<Vault> {
    let secrets = Secrets {
        keys: Some(lines.join(" ").into()),
        key_file: "/nowhere".into(),
    };
    Arc::new(Vault::load(&secrets, true).expect("keys"))
}

/// Whether a text stands anywhere in the files of an outbox.
fn on_disk(directory: &Path, planted: &str) -> bool {
    let mut files = std::fs::read_dir(directory).expect("listed");
    files.any(|file| {
        let content = std::fs::read(file.expect("a file").path()).expect("read");
        content
            .windows(planted.len())
            .any(|part| part == planted.as_bytes())
    })
}

fn planted(capture_id: &str) -> NewCapture {
    let payload = || br#"{"email":"planted@example.com"}"#.to_vec();
    NewCapture {
        content: Content::Send {
            shard: 1,
            events: EventPair {
                identify: payload(),
                track: payload(),
            },
        },
        ..new_capture("acme", capture_id, 0)
    }
}

fn spec() -> proto::Integration {
    proto::Integration {
        integration_id: "acme".into(),
        credentials: vec![proto::Credential {
            write_key: "planted-write-key".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[tokio::test]
async fn write_keys_are_never_on_the_disk_and_payloads_only_where_that_is_wanted() {
    for encrypt in [false, true] {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path();
        let options = SqliteOptions {
            encrypt_payloads: encrypt,
            ..options(path)
        };
        let outbox = SqliteOutbox::open(&options, &vault()).expect("opens");
        outbox.put_integration(spec(), None).await.expect("stored");
        submit(&outbox, vec![planted("p-1"), planted("p-2")]).await;
        // One becomes a dead letter.
        let leased = lease(&outbox, "acme", 2).await;
        settle(&outbox, leased, |_, _| Outcome::DeadLetter {
            reason: DeliveryReason::Expired,
        })
        .await;
        assert!(!on_disk(path, "planted-write-key"));
        assert_eq!(on_disk(path, "planted@example.com"), !encrypt);
        // Whose data it is can't be told from a hash that anybody can make.
        assert!(!on_disk(path, &conformance::user_of("p-1")));
        assert_eq!(outbox.integrations().await, Ok(vec![spec()]));
        outbox.close().await;
        assert!(!on_disk(path, "planted-write-key"));
    }
}

#[tokio::test]
async fn an_erased_person_is_in_no_file_when_the_erasure_is_answered() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let outbox = open(path);
    // One in the database, one in the journal alone.
    submit(&outbox, vec![planted("p-1")]).await;
    outbox.flush().await.expect("flushed");
    submit(&outbox, vec![planted("p-2")]).await;
    assert!(on_disk(path, "planted@example.com"));
    let subject = SubjectQuery {
        user_ids: vec![conformance::user_of("p-1")],
        integration_id: None,
    };
    let found = outbox.find_subject(subject.clone()).await.expect("found");
    assert_eq!((found.captures.len(), found.lanes), (2, vec![lane("acme")]));
    let erasure = Erasure {
        subject,
        captures: found.captures,
        receipt: proto::ErasureReceipt::default(),
    };
    let receipt = outbox.erase(erasure).await.expect("erased");
    assert_eq!(receipt.waiting_event_count, 4);
    assert!(!on_disk(path, "planted@example.com"));
    outbox.close().await;
}

#[tokio::test]
async fn a_delivered_payload_is_in_no_file_after_maintenance() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let outbox = open(path);
    submit(&outbox, vec![planted("p-1")]).await;
    outbox.flush().await.expect("flushed");
    submit(&outbox, vec![planted("p-2")]).await;
    let leased = lease(&outbox, "acme", 4).await;
    assert_eq!(leased.len(), 2);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    outbox.flush().await.expect("flushed");
    outbox.maintain().await.expect("maintained");
    // The journal's turn comes by itself, by its own clock.
    let gone = async {
        while on_disk(path, "planted@example.com") {
            tokio::task::yield_now().await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(60), gone).await;
    assert!(in_time.is_ok(), "a delivered payload stays readable");
    outbox.close().await;
}

#[tokio::test]
async fn a_new_key_takes_over_piece_by_piece_and_the_old_one_can_go() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let (old, new) = (new_key().expect("a key"), new_key().expect("a key"));
    let (old, new) = (old.expose_secret(), new.expose_secret());
    let outbox = SqliteOutbox::open(&encrypted(path), &keys(&[old])).expect("opens");
    outbox.put_integration(spec(), None).await.expect("stored");
    submit(&outbox, vec![planted("p-1"), planted("p-2")]).await;
    let leased = lease(&outbox, "acme", 2).await;
    settle(&outbox, leased, |_, _| Outcome::DeadLetter {
        reason: DeliveryReason::Expired,
    })
    .await;
    outbox.close().await;

    let refused = SqliteOutbox::open(&encrypted(path), &keys(&[new])).expect_err("refused");
    assert!(
        refused
            .to_string()
            .contains("is not among those of [secrets]"),
        "{refused}"
    );

    let outbox = SqliteOutbox::open(&encrypted(path), &keys(&[new, old])).expect("opens");
    submit(&outbox, vec![planted("p-3")]).await;
    while outbox.maintain().await.expect("maintained") {}
    outbox.close().await;

    let outbox = SqliteOutbox::open(&encrypted(path), &keys(&[new])).expect("opens without it");
    assert_eq!(outbox.integrations().await, Ok(vec![spec()]));
    let filter = DeadLetterFilter::default();
    let replayed = outbox.replay(Selection::Filter(filter), NOW).await;
    assert_eq!(taken(replayed), 2);
    let leased = lease(&outbox, "acme", 10).await;
    assert_eq!(ids(&leased), ["p-2", "p-3", "p-1"]);
    for capture in &leased {
        assert!(!capture.damaged);
        for payload in [&capture.identify, &capture.track].into_iter().flatten() {
            assert_eq!(payload.as_ref(), br#"{"email":"planted@example.com"}"#);
        }
    }
    // The same capture is known under any key.
    let again = submit(&outbox, vec![planted("p-1")]).await;
    assert!(matches!(again[0], Submitted::Duplicate(_)), "{again:?}");
    outbox.close().await;
}

#[tokio::test]
async fn what_waits_is_encrypted_when_encryption_is_turned_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let outbox = open(path);
    submit(&outbox, vec![planted("p-1"), planted("p-2")]).await;
    let before = outbox.backlog(&id("acme")).await.expect("counted");
    outbox.close().await;
    assert!(on_disk(path, "planted@example.com"));

    let outbox = SqliteOutbox::open(&encrypted(path), &vault()).expect("opens");
    while outbox.maintain().await.expect("maintained") {}
    let after = outbox.backlog(&id("acme")).await.expect("counted");
    assert_eq!(after.events, before.events);
    assert!(after.bytes > before.bytes);
    let leased = lease(&outbox, "acme", 10).await;
    assert!(leased.iter().all(|capture| !capture.damaged));
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    let drained = outbox.backlog(&id("acme")).await.expect("counted");
    assert_eq!((drained.events, drained.bytes), (0, 0));
    outbox.close().await;
    assert!(!on_disk(path, "planted@example.com"));
}

#[tokio::test]
async fn a_payload_that_was_put_in_anothers_place_is_damaged() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let outbox = SqliteOutbox::open(&encrypted(path), &vault()).expect("opens");
    submit(&outbox, vec![planted("p-1"), planted("p-2")]).await;
    outbox.close().await;
    let connection = rusqlite::Connection::open(path.join("relay.db")).expect("opens");
    let put = "UPDATE queue SET (identify, identify_crc) =
        (SELECT identify, identify_crc FROM queue WHERE sequence = 2) WHERE sequence = 1";
    connection.execute(put, []).expect("put there");
    drop(connection);
    let outbox = SqliteOutbox::open(&encrypted(path), &vault()).expect("opens");
    let budget = LeaseBudget {
        max_events: 10,
        max_bytes: 10_000,
    };
    let leased = outbox
        .lease(&lane("acme"), budget, LeaseScope::All)
        .await
        .expect("leased");
    let damaged: Vec<bool> = leased.iter().map(|capture| capture.damaged).collect();
    assert_eq!(damaged, [true, false]);
    outbox.close().await;
}
