//! A caller who is bound to one integration uses every rpc as much as it may, beside the dead
//! letters of another one. Meanwhile a third one's captures are accepted and delivered as fast
//! as without it.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use prost::Message;
use segment_relay::{
    grpc::RPCS,
    proto::{
        CaptureRequest, CaptureStreamRequest, CreateIntegrationRequest, Integration,
        ListErasureReceiptsRequest, ListIntegrationsRequest, WaitFor,
    },
};
use tokio::task::JoinSet;

use crate::{
    auth::{by, call_over, callers},
    harness::{World, acme, connect, numbered, worked_example},
    scopes::naming,
};

/// Dead letters of the large integration.
const DEAD_LETTERS: u32 = 200_000;
/// Calls of the abusive caller at once.
const CALLS: usize = 100;
/// Less than this is no wait, on a loaded machine without optimization. What this test is for
/// took seconds.
const SLACK: Duration = Duration::from_millis(20);

async fn create(world: &World, id: &str) {
    let integration = Some(Integration {
        integration_id: id.into(),
        ..acme()
    });
    let request = by("all", CreateIntegrationRequest { integration });
    // It may be there already.
    let _ = world.integrations().create_integration(request).await;
}

async fn capture(world: &World, id: &str, number: usize, wait_for: WaitFor) -> Duration {
    let request = CaptureRequest {
        integration_id: id.into(),
        capture: Some(numbered(number)),
        wait_for: wait_for.into(),
    };
    let begun = Instant::now();
    let accepted = world.relay().capture(by("capture", request)).await;
    accepted.expect("accepted");
    begun.elapsed()
}

/// Copies the only capture of `large` many times, with two dead letters each.
fn fill(store: &Path) {
    let database = rusqlite::Connection::open(store.join("relay.db")).expect("opens");
    let sql = format!(
        "BEGIN;
        CREATE TEMP TABLE one AS SELECT * FROM capture WHERE integration_id = 'large' LIMIT 1;
        CREATE TEMP TABLE n AS WITH RECURSIVE n (i) AS
            (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {captures})
            SELECT i + (SELECT max(sequence) FROM capture) AS i FROM n;
        INSERT INTO capture (sequence, integration_id, capture_id, digest, accept_millis, open, status)
            SELECT n.i, o.integration_id, 'copy-' || n.i, o.digest, o.accept_millis, 1, o.status
            FROM n, one o;
        INSERT OR IGNORE INTO lane (integration_id, region, shard) VALUES ('large', 1, 0);
        INSERT INTO dead_letter (sequence, lane, event, reason, millis, payload, payload_crc)
            SELECT n.i, (SELECT min(id) FROM lane WHERE integration_id = 'large'), e.e, 1, 1,
                zeroblob(600), 0
            FROM n, (SELECT 1 AS e UNION ALL SELECT 2) e;
        UPDATE dead_letter_id SET last = (SELECT max(id) FROM dead_letter);
        COMMIT;",
        captures = DEAD_LETTERS / 2
    );
    database.execute_batch(&sql).expect("filled");
}

/// What an abusive caller sends: calls of one rpc, or of two in turns.
struct Abuse {
    path: &'static str,
    messages: Vec<(String, Vec<u8>)>,
}

/// One for each rpc.
fn abuses() -> Vec<Abuse> {
    let named: Vec<_> = naming("mine").into_iter().collect();
    let of = |rpc: &str| {
        let found = named.iter().find(|(name, _)| *name == rpc);
        found.map(|(_, message)| message.clone())
    };
    let requests = RPCS.iter().map(|(path, _)| {
        let rpc = path
            .strip_prefix("/jebbit.segmentrelay.v1.")
            .expect("of the schema");
        let messages = match rpc {
            "SegmentRelay/CaptureStream" => vec![
                CaptureStreamRequest {
                    correlation_id: "1".into(),
                    integration_id: "mine".into(),
                    capture: Some(worked_example()),
                }
                .encode_to_vec(),
            ],
            "IntegrationService/ListIntegrations" => {
                vec![ListIntegrationsRequest::default().encode_to_vec()]
            }
            "PrivacyService/ListErasureReceipts" => {
                vec![ListErasureReceiptsRequest::default().encode_to_vec()]
            }
            // What is deleted has to be made again.
            "IntegrationService/DeleteIntegration" => {
                let create = of("IntegrationService/CreateIntegration").expect("known");
                vec![of(rpc).expect("known"), create]
            }
            _ => vec![of(rpc).unwrap_or_else(|| panic!("{rpc} is not tried"))],
        };
        let create = "/jebbit.segmentrelay.v1.IntegrationService/CreateIntegration";
        let paths = [*path, create].map(str::to_owned);
        Abuse {
            path,
            messages: paths.into_iter().zip(messages).collect(),
        }
    });
    requests.collect()
}

/// As many calls at once as an abusive caller has; each is given up after `patience`.
fn burst(world: &World, name: &'static str, abuse: &Abuse, patience: Duration) -> JoinSet<()> {
    let channel = connect(world.address);
    let mut calls = JoinSet::new();
    for number in 0..CALLS {
        let (channel, message) = (
            channel.clone(),
            &abuse.messages[number % abuse.messages.len()],
        );
        let (path, message) = (message.0.clone(), message.1.clone());
        calls.spawn(async move {
            let call = call_over(&channel, &path, by(name, message));
            let _ = tokio::time::timeout(patience, call).await;
        });
    }
    calls
}

/// Mean times until captures of the third tenant are accepted and delivered, from the moment at
/// which a burst of calls begins.
async fn tenant(world: &World, first: usize, calls: &mut JoinSet<()>) -> Duration {
    let begun = Instant::now();
    for number in 0..6 {
        let wait_for = [WaitFor::Accepted, WaitFor::Delivered][number % 2];
        capture(world, "third", first + number, wait_for).await;
    }
    let took = begun.elapsed();
    calls.shutdown().await;
    took / 6
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_rpc_of_one_tenant_keeps_another_waiting() {
    let mut world = World::with(&callers()).await;
    if !world.is_embedded() {
        return;
    }
    for id in ["mine", "large", "third"] {
        create(&world, id).await;
    }
    capture(&world, "large", 1, WaitFor::Delivered).await;
    world.restart_after(fill).await;
    let mut first = 10_000;
    let mut slow = Vec::new();
    for abuse in &abuses() {
        for patience in [Duration::from_secs(60), Duration::from_millis(2)] {
            // A loaded machine is given other chances, an unfair relay fails in each.
            let mut failed = String::new();
            for _ in 0..4 {
                create(&world, "mine").await;
                let mut took = [Duration::ZERO; 2];
                // As many calls that are refused at once: what the machine takes for them.
                for (place, name) in ["nobody", "scoped"].into_iter().enumerate() {
                    let mut calls = burst(&world, name, abuse, patience);
                    took[place] = tenant(&world, first, &mut calls).await;
                    first += 10;
                }
                let [refused, done] = took;
                let ratio = done.as_secs_f64() / refused.as_secs_f64();
                let told = format!(
                    "{}, given up after {patience:?}: {done:?} beside {refused:?}, ratio {ratio:.2}",
                    abuse.path
                );
                println!("{told}");
                if ratio <= 2.0 || done <= SLACK {
                    failed.clear();
                    break;
                }
                failed = told;
            }
            if !failed.is_empty() {
                slow.push(failed);
            }
        }
    }
    assert!(slow.is_empty(), "{slow:#?}");
    world.stop().await;
}
