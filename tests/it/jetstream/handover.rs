//! How long lanes stand still when the relay that holds them goes.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use segment_relay::proto::{
    CaptureBatchRequest, CreateIntegrationRequest, DataRegion, Integration,
    integration_service_client::IntegrationServiceClient, segment_relay_client::SegmentRelayClient,
};

use super::relays::{LEASE, Watched, process};
use crate::{
    harness::{PATIENCE, acme, credential, init_streams, numbered},
    nats_server::Server,
    process::Process,
    scan::Written,
};

const INTEGRATIONS: usize = 8;
/// Captures of each integration that wait: some in each of its lanes.
const CAPTURES: usize = 20;
/// What comes on top of the lease: the session is looked at every half second, and so is what
/// waits; the rest is for a machine that has other things to do.
const MARGIN: Duration = Duration::from_secs(3);
/// A relay that drains says at once that its lanes are free.
const AT_ONCE: Duration = Duration::from_secs(2);

fn name(number: usize) -> String {
    format!("acme-{number}")
}

/// Two relays that know each other, and an endpoint that takes nothing yet.
struct Two {
    relays: [Process; 2],
    watched: Arc<Watched>,
    _server: Server,
    _directory: tempfile::TempDir,
}

impl Two {
    async fn start() -> Option<Self> {
        let server = Server::start()?;
        init_streams(&[server.url()], 1).await;
        let watched = Arc::new(Watched::default());
        watched.is_down.store(true, Ordering::Relaxed);
        let endpoint = watched.listen().await;
        let directory = tempfile::tempdir().expect("a directory");
        let one = process(&server.url(), directory.path(), &endpoint, 1).await;
        let other = process(&server.url(), directory.path(), &endpoint, 1).await;
        let two = Self {
            relays: [one, other],
            watched,
            _server: server,
            _directory: directory,
        };
        two.create().await;
        Some(two)
    }

    async fn create(&self) {
        let mut client = IntegrationServiceClient::new(self.relays[0].channel.clone());
        for number in 0..INTEGRATIONS {
            let key = format!("write-key-of-{number}");
            let integration = Integration {
                integration_id: name(number),
                credentials: vec![credential(DataRegion::NonEu, &key)],
                ..acme()
            };
            let request = CreateIntegrationRequest {
                integration: Some(integration),
            };
            client.create_integration(request).await.expect("created");
        }
    }

    /// Stores captures whose events wait, until each relay has tried some: it holds lanes.
    async fn wait_in_lanes_of_both(&self) {
        let mut client = SegmentRelayClient::new(self.relays[0].channel.clone());
        for number in 0..INTEGRATIONS {
            let request = CaptureBatchRequest {
                integration_id: name(number),
                captures: (0..CAPTURES).map(numbered).collect(),
                ..CaptureBatchRequest::default()
            };
            let answer = client.capture_batch(request).await.expect("answered");
            let results = answer.into_inner().results;
            assert!(results.iter().all(|one| one.error.is_none()), "{results:?}");
        }
        let deadline = Instant::now() + PATIENCE;
        while self.held().iter().map(HashSet::len).sum::<usize>() < INTEGRATIONS * 4 {
            assert!(
                Instant::now() < deadline,
                "not all lanes are held: {:?}",
                self.held()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // None was counted at both while it went from one to the other.
        let held = self.held();
        assert!(held[0].is_disjoint(&held[1]), "{held:?}");
    }

    fn held(&self) -> [HashSet<String>; 2] {
        [held(&self.relays[0].log), held(&self.relays[1].log)]
    }

    /// Until all waiting events have arrived.
    async fn all_arrive(&self, since: Instant) -> Duration {
        let all = INTEGRATIONS * CAPTURES * 2;
        while self.watched.count() < all {
            let count = self.watched.count();
            assert!(
                since.elapsed() < PATIENCE,
                "{count} of {all} events have arrived"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        since.elapsed()
    }
}

/// The lanes that a relay holds by its own word.
fn held(log: &Written) -> HashSet<String> {
    let mut lanes = HashSet::new();
    for line in log.all() {
        let Ok(line) = serde_json::from_str::<serde_json::Value>(&line) else {
            continue;
        };
        let lane = || line["lane"].as_str().expect("a lane").to_owned();
        match line["message"].as_str() {
            Some("took a lane") => drop(lanes.insert(lane())),
            Some("gave a lane up") => drop(lanes.remove(&lane())),
            _ => {}
        }
    }
    lanes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lanes_of_a_relay_that_is_killed_go_on_after_its_lease_and_not_before() {
    let Some(mut two) = Two::start().await else {
        return;
    };
    two.wait_in_lanes_of_both().await;
    let held = two.held();
    // At least half of them.
    let victim = usize::from(held[1].len() > held[0].len());
    let lanes = held[victim].len();
    two.relays[victim].kill();
    let killed = Instant::now();
    two.watched.is_down.store(false, Ordering::Relaxed);
    let took = two.all_arrive(killed).await;
    println!(
        "{lanes} lanes of a killed relay were delivered {took:?} after it, the lease is {LEASE:?}"
    );
    assert!(took < LEASE + MARGIN, "{took:?}");
    // A session is written every half second: before that its relay might live.
    assert!(took > LEASE - Duration::from_secs(1), "{took:?}");
    assert_eq!(two.watched.collisions.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lanes_of_a_relay_that_drains_go_on_at_once() {
    let Some(mut two) = Two::start().await else {
        return;
    };
    two.wait_in_lanes_of_both().await;
    let held = two.held();
    let victim = usize::from(held[1].len() > held[0].len());
    two.relays[victim].terminate().await;
    let ended = Instant::now();
    two.watched.is_down.store(false, Ordering::Relaxed);
    let took = two.all_arrive(ended).await;
    println!(
        "{} lanes of a drained relay were delivered {took:?} after its end",
        held[victim].len()
    );
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!(two.watched.collisions.load(Ordering::Relaxed), 0);
}
