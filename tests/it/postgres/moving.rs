//! `segment-relay outbox move`, interrupted again and again.

use std::{collections::HashMap, path::PathBuf, process::Stdio, time::Duration};

use segment_relay::{
    proto::{
        Capture, DeliveryReason, DeliveryState, GetCaptureRequest, WaitFor,
        segment_relay_client::SegmentRelayClient,
    },
    sandbox::Rule,
};

use super::{Fleet, batch, capture_of, create, letters};
use crate::{
    harness::{acme, states, worked_example},
    postgres_server,
    process::Process,
};

const USERS: usize = 7;
const BATCHES: usize = 20;
const BATCH: usize = 200;
const INTERRUPTIONS: usize = 3;
/// What an event holds that Segment refuses for good.
const POISON: &str = "poisoned";

fn captures(batch: usize) -> Vec<Capture> {
    let numbers = batch * BATCH..(batch + 1) * BATCH;
    let capture = |number| capture_of(number % USERS, &format!("c-{number}"));
    numbers.map(capture).collect()
}

/// The embedded relay whose outbox the fleet's `outbox move` takes.
async fn embedded(fleet: &Fleet) -> Process {
    let outbox = fleet.directory.path().join("outbox");
    let relay = Process::start(&outbox, &fleet.endpoints).await;
    create(relay.channel.clone(), acme())
        .await
        .expect("created");
    relay
}

/// Captures in the embedded outbox; `None` while it cannot be read.
fn left(fleet: &Fleet) -> Option<u64> {
    let store = rusqlite::Connection::open(store(fleet)).expect("opens");
    let count = store.query_row("SELECT count(*) FROM capture", [], |row| row.get(0));
    count.ok()
}

fn store(fleet: &Fleet) -> PathBuf {
    fleet.directory.path().join("outbox/relay.db")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_is_moved_in_its_order_however_often_that_is_interrupted() {
    let databases = postgres_server::database().zip(postgres_server::database());
    let Some((first, second)) = databases else {
        return;
    };
    let urls = format!("{} {}", first.url(), second.url());
    let mut fleet = Fleet::start(urls, 0).await;
    let mut embedded = embedded(&fleet).await;
    // Some are delivered, some given up, and most wait.
    let channel = || embedded.channel.clone();
    batch(channel(), captures(0), WaitFor::Delivered).await;
    fleet.misbehave(Rule {
        reject_containing: Some(POISON.into()),
        ..Rule::default()
    });
    let poisoned = (0..10).map(|number| Capture {
        capture_id: format!("p-{number}"),
        campaign_name: POISON.into(),
        ..worked_example()
    });
    batch(channel(), poisoned.collect(), WaitFor::Delivered).await;
    let ids = |letters: Vec<segment_relay::proto::DeadLetter>| -> Vec<String> {
        let events = letters.into_iter().filter_map(|letter| letter.event);
        events.map(|event| event.message_id).collect()
    };
    // The identify event does not name the campaign, and is taken.
    let given_up = ids(letters(channel()).await);
    assert_eq!(given_up.len(), 10);
    fleet.refuse(503);
    let mut waiting: HashMap<usize, Vec<String>> = HashMap::new();
    for number in 1..=BATCHES {
        let results = batch(channel(), captures(number), WaitFor::Accepted).await;
        for (place, result) in (number * BATCH..).zip(results) {
            let ids = result.events.into_iter().map(|event| event.message_id);
            waiting.entry(place % USERS).or_default().extend(ids);
        }
    }
    embedded.kill();

    for _ in 0..INTERRUPTIONS {
        let before = left(&fleet).expect("nobody has it open");
        let child = fleet.command(&["move"]).stdout(Stdio::null()).spawn();
        let mut child = child.expect("starts");
        // In the middle: after the first pieces.
        while left(&fleet).is_none_or(|left| left == before) {
            assert_eq!(child.try_wait().expect("a child"), None);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        child.kill().expect("killed");
        child.wait().expect("ended");
        assert_ne!(left(&fleet), Some(0));
    }
    let moved = fleet.command(&["move"]).output().expect("runs");
    assert!(moved.status.success(), "{moved:?}");
    let said = String::from_utf8_lossy(&moved.stdout);
    assert!(said.contains("is empty now"), "{said}");

    fleet.behave();
    fleet.relays.push(fleet.relay().await);
    fleet.arrived(2 * BATCH + 10 + 2 * BATCHES * BATCH).await;
    let places = fleet.places();
    for (user, events) in &waiting {
        let own: Vec<usize> = events.iter().map(|id| places[id]).collect();
        assert!(
            own.is_sorted(),
            "the events of user {user} came out of order"
        );
    }
    assert_eq!(ids(fleet.letters(0).await), given_up);
    // What was delivered before is known, and a repetition is a duplicate.
    let request = GetCaptureRequest {
        integration_id: "acme".into(),
        capture_id: "c-0".into(),
    };
    let mut client = SegmentRelayClient::new(fleet.channel(0));
    let found = client.get_capture(request).await.expect("known");
    let events = found.into_inner().result.expect("a result").events;
    assert_eq!(states(&events), [DeliveryState::Delivered; 2]);
    for number in [0, BATCHES] {
        let results = fleet.batch(0, captures(number), WaitFor::Delivered).await;
        assert!(results.iter().all(|result| result.duplicate));
    }
    fleet.restart_sends_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_the_old_disk_has_damaged_is_given_up_and_not_sent() {
    let Some(database) = postgres_server::database() else {
        return;
    };
    let mut fleet = Fleet::start(database.url(), 0).await;
    fleet.refuse(503);
    let mut embedded = embedded(&fleet).await;
    let captures = ["damaged", "sound"].map(|id| capture_of(1, id));
    batch(embedded.channel.clone(), captures.into(), WaitFor::Accepted).await;
    embedded.terminate().await;
    let store = rusqlite::Connection::open(store(&fleet)).expect("opens");
    const DAMAGE: &str = "UPDATE queue SET track = zeroblob(length(track))
        WHERE sequence = (SELECT min(sequence) FROM queue)";
    assert_eq!(store.execute(DAMAGE, []), Ok(1));
    store.close().expect("closes");

    let moved = fleet.command(&["move"]).output().expect("runs");
    assert!(moved.status.success(), "{moved:?}");
    fleet.behave();
    fleet.relays.push(fleet.relay().await);
    fleet.arrived(2).await;
    let letters = fleet.letters(0).await;
    let reasons: Vec<_> = letters
        .iter()
        .filter_map(|letter| Some(letter.event.as_ref()?.reason()))
        .collect();
    assert_eq!(reasons, [DeliveryReason::Damaged; 2]);
    fleet.restart_sends_nothing().await;
}
