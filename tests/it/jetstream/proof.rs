//! Three servers and three relays under load, while one thing after the other goes wrong.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use segment_relay::proto::{
    Capture, CaptureRequest, CreateIntegrationRequest, DataRegion, Integration,
    ListDeadLettersRequest, dead_letter_service_client::DeadLetterServiceClient,
    integration_service_client::IntegrationServiceClient, segment_relay_client::SegmentRelayClient,
};
use tonic::{Request, transport::Channel};

use super::relays::{LEASE, POISON, Relay, Watched};
use crate::{
    harness::{acme, credential, init_streams, worked_example},
    nats_server::Server,
};

const USERS: usize = 12;
/// Each is delivered by one relay at a time.
const INTEGRATIONS: usize = 6;
/// Longest call.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait until all is delivered in the end.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// What callers know: message ids of acknowledged captures by user, in order.
#[derive(Default)]
struct Ledger(Mutex<HashMap<usize, Vec<[String; 2]>>>);

impl Ledger {
    fn count(&self) -> usize {
        self.0.lock().expect("sound").values().map(Vec::len).sum()
    }
}

fn name(user: usize) -> String {
    format!("acme-{}", user % INTEGRATIONS)
}

fn capture(user: usize, number: usize) -> Capture {
    let name = if number % 97 == 13 { POISON } else { "fine" };
    Capture {
        capture_id: format!("u{user}-{number}"),
        email: format!("user-{user}@example.com"),
        campaign_name: name.into(),
        ..worked_example()
    }
}

/// One user's calls, one after the other, at whichever relay answers, until it ends.
async fn load(channels: Vec<Channel>, user: usize, ledger: Arc<Ledger>, end: Arc<AtomicBool>) {
    let mut relays: Vec<_> = channels.into_iter().map(SegmentRelayClient::new).collect();
    let (mut number, mut at) = (0, user % relays.len());
    while !end.load(Ordering::Relaxed) {
        let mut request = Request::new(CaptureRequest {
            integration_id: name(user),
            capture: Some(capture(user, number)),
            ..CaptureRequest::default()
        });
        request.set_timeout(CALL_TIMEOUT);
        match tokio::time::timeout(CALL_TIMEOUT, relays[at].capture(request)).await {
            Ok(Ok(answer)) => {
                let events = answer.into_inner().result.expect("a result").events;
                let ids = [events[0].message_id.clone(), events[1].message_id.clone()];
                ledger
                    .0
                    .lock()
                    .expect("sound")
                    .entry(user)
                    .or_default()
                    .push(ids);
                number += 1;
            }
            // The same again elsewhere: it may have been stored.
            _ => {
                at = (at + 1) % relays.len();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        if number % 7 == 0 {
            at = (at + 1) % relays.len();
        }
    }
}

/// Waits until so many more events have arrived; returns how long it took.
async fn deliveries_go_on(watched: &Watched, more: usize, what: &str) -> Duration {
    let (begun, wanted) = (Instant::now(), watched.count() + more);
    while watched.count() < wanted {
        assert!(
            begun.elapsed() < END_TIMEOUT,
            "deliveries stand still after: {what}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!(
        "{what}: {more} more events arrived within {:?}",
        begun.elapsed()
    );
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_relays_on_three_servers_lose_nothing_whatever_goes_wrong() {
    let Some(mut servers) = Server::cluster(3) else {
        return;
    };
    let urls: Vec<String> = servers.iter().map(Server::url).collect();
    init_streams(&urls, 3).await;
    let watched = Arc::new(Watched::default());
    let endpoint = watched.listen().await;
    let directory = tempfile::tempdir().expect("a directory");
    let mut relays = Vec::new();
    for _ in 0..3 {
        relays.push(Relay::start(&servers, directory.path(), &endpoint, 3).await);
    }
    for number in 0..INTEGRATIONS {
        let integration = Integration {
            integration_id: name(number),
            credentials: vec![credential(
                DataRegion::NonEu,
                &format!("write-key-of-{number}"),
            )],
            ..acme()
        };
        let request = CreateIntegrationRequest {
            integration: Some(integration),
        };
        let mut client = IntegrationServiceClient::new(relays[0].process.channel.clone());
        client.create_integration(request).await.expect("created");
    }
    reaches_all(&relays).await;

    let (ledger, end) = (
        Arc::new(Ledger::default()),
        Arc::new(AtomicBool::new(false)),
    );
    let channels: Vec<Channel> = relays
        .iter()
        .map(|relay| relay.process.channel.clone())
        .collect();
    let users: Vec<_> = (0..USERS)
        .map(|user| {
            tokio::spawn(load(
                channels.clone(),
                user,
                Arc::clone(&ledger),
                Arc::clone(&end),
            ))
        })
        .collect();
    deliveries_go_on(&watched, 500, "nothing").await;

    servers[0].kill();
    deliveries_go_on(&watched, 500, "a server was killed").await;
    servers[0].run();
    deliveries_go_on(&watched, 500, "the server is back").await;

    relays[1].signal("STOP");
    tokio::time::sleep(LEASE + Duration::from_secs(3)).await;
    deliveries_go_on(&watched, 500, "a relay was paused past its lease").await;
    relays[1].signal("CONT");
    deliveries_go_on(&watched, 500, "the paused relay goes on").await;

    relays[2].cut_off(true);
    tokio::time::sleep(LEASE + Duration::from_secs(3)).await;
    deliveries_go_on(&watched, 500, "a relay was cut off past its lease").await;
    relays[2].cut_off(false);
    deliveries_go_on(&watched, 500, "the relay reaches the servers again").await;

    relays[0].process.kill();
    tokio::time::sleep(LEASE + Duration::from_secs(2)).await;
    deliveries_go_on(&watched, 500, "a relay was killed").await;

    end.store(true, Ordering::Relaxed);
    for user in users {
        user.await.expect("no panic");
    }
    let survivor = relays[1].process.channel.clone();
    reconcile(&watched, &ledger, survivor).await;
    assert_eq!(
        watched.collisions.load(Ordering::Relaxed),
        0,
        "a lane had two requests at once"
    );
}

/// A change at one relay is known to the others within a second.
async fn reaches_all(relays: &[Relay]) {
    let begun = Instant::now();
    for relay in relays {
        let mut client = IntegrationServiceClient::new(relay.process.channel.clone());
        let request = segment_relay::proto::GetIntegrationRequest {
            integration_id: name(INTEGRATIONS - 1),
        };
        while let Err(status) = client.get_integration(request.clone()).await {
            let late = begun.elapsed() > Duration::from_secs(1);
            assert!(!late, "not known after a second: {status}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Message ids of all dead letters.
pub(crate) async fn dead_letters(channel: &Channel) -> HashSet<String> {
    let mut client = DeadLetterServiceClient::new(channel.clone());
    let (mut ids, mut page_token) = (HashSet::new(), String::new());
    loop {
        let request = ListDeadLettersRequest {
            page_size: 1_000,
            page_token,
            ..Default::default()
        };
        let page = client
            .list_dead_letters(request)
            .await
            .expect("listed")
            .into_inner();
        ids.extend(
            page.dead_letters
                .into_iter()
                .filter_map(|one| Some(one.event?.message_id)),
        );
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return ids;
        }
    }
}

/// Acknowledged is delivered or dead-lettered, and each user's events came in order.
async fn reconcile(watched: &Watched, ledger: &Ledger, relay: Channel) {
    let begun = Instant::now();
    let acknowledged = ledger.0.lock().expect("sound").clone();
    loop {
        let (places, dead) = (watched.places(), dead_letters(&relay).await);
        let missing: Vec<_> = acknowledged
            .values()
            .flatten()
            .flatten()
            .filter(|id| !places.contains_key(*id) && !dead.contains(*id))
            .collect();
        if missing.is_empty() {
            println!(
                "{} captures acknowledged, {} events delivered, {} repeated, {} dead letters",
                ledger.count(),
                places.len(),
                watched.repeated(),
                dead.len()
            );
            assert!(!dead.is_empty(), "some were poisoned");
            assert!(
                places.keys().all(|id| !dead.contains(id)),
                "delivered and dead"
            );
            for (user, pairs) in &acknowledged {
                let own: Vec<usize> = pairs
                    .iter()
                    .flatten()
                    .filter_map(|id| places.get(id).copied())
                    .collect();
                assert!(
                    own.is_sorted(),
                    "the events of user {user} came out of order"
                );
            }
            return;
        }
        assert!(
            begun.elapsed() < END_TIMEOUT,
            "acknowledged, and lost: {missing:?}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
