//! `segment-relay outbox move`, interrupted again and again.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use segment_relay::proto::{
    Capture, CaptureBatchRequest, DeliveryReason, DeliveryState, GetCaptureRequest,
    ListDeadLettersRequest, WaitFor, dead_letter_service_client::DeadLetterServiceClient,
    segment_relay_client::SegmentRelayClient,
};
use tonic::transport::Channel;

use super::{
    outage::{capture, create},
    proof::dead_letters,
    relays::{POISON, Watched, process, process_with},
};
use crate::{
    harness::{init_streams, states, worked_example},
    nats_server::Server,
    process::Process,
};

const USERS: usize = 7;
const BATCHES: usize = 20;
const BATCH: usize = 200;
/// How long the end may take.
const END_TIMEOUT: Duration = Duration::from_secs(60);

fn captures(batch: usize) -> Vec<Capture> {
    let numbers = batch * BATCH..(batch + 1) * BATCH;
    numbers
        .map(|number| Capture {
            capture_id: format!("c-{number}"),
            email: format!("user-{}@example.com", number % USERS),
            ..worked_example()
        })
        .collect()
}

/// Sends a batch; returns for each capture its user and message ids.
async fn send(channel: &Channel, batch: usize) -> Vec<(usize, [String; 2])> {
    let request = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: captures(batch),
        ..CaptureBatchRequest::default()
    };
    let mut client = SegmentRelayClient::new(channel.clone());
    let answer = client
        .capture_batch(request)
        .await
        .expect("answered")
        .into_inner();
    let of = |(number, result): (usize, segment_relay::proto::CaptureResult)| {
        assert!(result.error.is_none(), "{result:?}");
        let id = |place: usize| result.events[place].message_id.clone();
        (number % USERS, [id(0), id(1)])
    };
    (batch * BATCH..).zip(answer.results).map(of).collect()
}

/// Captures whose events are refused; returns their ids once they are given up.
async fn poisoned(channel: &Channel) -> HashSet<String> {
    let mut client = SegmentRelayClient::new(channel.clone());
    let captures = (0..10).map(|number| Capture {
        capture_id: format!("p-{number}"),
        campaign_name: POISON.into(),
        ..worked_example()
    });
    let request = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: captures.collect(),
        wait_for: WaitFor::Delivered.into(),
    };
    let answer = client
        .capture_batch(request)
        .await
        .expect("answered")
        .into_inner();
    let events = answer.results.into_iter().flat_map(|one| one.events);
    // The identify event does not name the campaign, and is taken.
    let dead = events.filter(|event| event.state() == DeliveryState::DeadLettered);
    let ids: HashSet<String> = dead.map(|event| event.message_id).collect();
    assert_eq!(ids.len(), 10);
    assert_eq!(dead_letters(channel).await, ids);
    ids
}

fn moving(server: &Server, directory: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_segment-relay"))
        .args(["outbox", "move"])
        .env("SEGMENT_RELAY__OUTBOX__PATH", directory.join("outbox"))
        .env(
            "SEGMENT_RELAY__SECRETS__KEY_FILE",
            directory.join("outbox.key"),
        )
        .env("SEGMENT_RELAY__NATS__SERVERS", server.url())
        .env("SEGMENT_RELAY__NATS__REPLICAS", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts")
}

async fn arrive(watched: &Watched, events: usize) {
    let begun = Instant::now();
    while watched.count() < events {
        let count = watched.count();
        assert!(
            begun.elapsed() < END_TIMEOUT,
            "only {count} of {events} events have arrived"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_embedded_outbox_is_moved_with_all_it_holds_however_often_that_is_interrupted() {
    let Some(server) = Server::start() else {
        return;
    };
    init_streams(&[server.url()], 1).await;
    let watched = Arc::new(Watched::default());
    let endpoint = watched.listen().await;
    let directory = tempfile::tempdir().expect("a directory");
    let urls = [endpoint.clone(), endpoint.clone()];
    let mut embedded = Process::start(&directory.path().join("outbox"), &urls).await;
    create(&embedded.channel).await;
    // Some are delivered, some given up, and most wait.
    send(&embedded.channel, 0).await;
    arrive(&watched, BATCH * 2).await;
    let given_up = poisoned(&embedded.channel).await;
    watched.is_down.store(true, Ordering::Relaxed);
    let mut waiting: HashMap<usize, Vec<[String; 2]>> = HashMap::new();
    for batch in 1..=BATCHES {
        for (user, ids) in send(&embedded.channel, batch).await {
            waiting.entry(user).or_default().push(ids);
        }
    }
    embedded.kill();

    let mut interrupted = 0;
    let ended = loop {
        let mut child = moving(&server, directory.path());
        if interrupted < 6 {
            tokio::time::sleep(Duration::from_millis(40 + 25 * interrupted)).await;
            if child.try_wait().expect("a child").is_none() {
                child.kill().expect("killed");
                child.wait().expect("ended");
            }
            interrupted += 1;
            continue;
        }
        break child.wait_with_output().expect("ends");
    };
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(
        ended.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    assert!(said.contains("is empty now"), "{said}");

    let before = watched.count();
    watched.is_down.store(false, Ordering::Relaxed);
    // Long enough for a machine that is busy: what is sent again for want of an answer would
    // be counted as if it was in a lane twice.
    let patient = [(
        "SEGMENT_RELAY__SEGMENT__REQUEST_TIMEOUT_MS",
        Path::new("30000"),
    )];
    let relay = process_with(&server.url(), directory.path(), &endpoint, 1, &patient).await;
    arrive(&watched, before + BATCHES * BATCH * 2).await;
    assert_eq!(watched.repeated(), 0, "an event was in a lane twice");
    let places = watched.places();
    for (user, pairs) in &waiting {
        let own: Vec<usize> = pairs.iter().flatten().map(|id| places[id]).collect();
        assert!(
            own.is_sorted(),
            "the events of user {user} came out of order"
        );
    }
    assert_eq!(dead_letters(&relay.channel).await, given_up);
    // What was delivered before is known, and a repetition is a duplicate.
    let mut client = SegmentRelayClient::new(relay.channel.clone());
    let request = GetCaptureRequest {
        integration_id: "acme".into(),
        capture_id: "c-0".into(),
    };
    let found = client
        .get_capture(request)
        .await
        .expect("known")
        .into_inner();
    let events = found.result.expect("a result").events;
    assert_eq!(states(&events), [DeliveryState::Delivered; 2]);
    let arrived = watched.count();
    send(&relay.channel, 0).await;
    send(&relay.channel, BATCHES).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(watched.count(), arrived);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_the_old_disk_has_damaged_is_given_up_where_it_goes_and_not_sent() {
    let Some(server) = Server::start() else {
        return;
    };
    init_streams(&[server.url()], 1).await;
    let watched = Arc::new(Watched::default());
    watched.is_down.store(true, Ordering::Relaxed);
    let endpoint = watched.listen().await;
    let directory = tempfile::tempdir().expect("a directory");
    let urls = [endpoint.clone(), endpoint.clone()];
    let outbox = directory.path().join("outbox");
    let mut embedded = Process::start(&outbox, &urls).await;
    create(&embedded.channel).await;
    for number in 0..2 {
        capture(&embedded.channel, number, WaitFor::Accepted)
            .await
            .expect("accepted");
    }
    embedded.terminate().await;
    let database = rusqlite::Connection::open(outbox.join("relay.db")).expect("opens");
    let damaged = database.execute(
        "UPDATE queue SET track = zeroblob(length(track)) WHERE sequence = (SELECT min(sequence) FROM queue)",
        [],
    );
    assert_eq!(damaged, Ok(1));
    database.close().expect("closes");

    let moved = moving(&server, directory.path())
        .wait_with_output()
        .expect("ends");
    assert!(
        moved.status.success(),
        "{}",
        String::from_utf8_lossy(&moved.stderr)
    );
    watched.is_down.store(false, Ordering::Relaxed);
    let before = watched.count();
    let relay = process(&server.url(), directory.path(), &endpoint, 1).await;
    arrive(&watched, before + 2).await;
    let request = ListDeadLettersRequest {
        reason: DeliveryReason::Damaged.into(),
        ..ListDeadLettersRequest::default()
    };
    let letters = DeadLetterServiceClient::new(relay.channel.clone())
        .list_dead_letters(request)
        .await
        .expect("listed");
    assert_eq!(letters.into_inner().dead_letters.len(), 2);
    assert_eq!(watched.count(), before + 2);
}
