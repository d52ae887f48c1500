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
use tonic::transport::Channel;

use crate::{
    auth::{by, call_over, callers},
    harness::{World, acme, connect, numbered, worked_example},
    scopes::naming,
};

/// Dead letters of the large integration.
const DEAD_LETTERS: u32 = 200_000;
/// Calls of the abusive caller at once.
const CALLS: usize = 100;
/// What the scheduler of a busy machine with two cores may add: the calls of the abusive caller
/// themselves take the time of this process. What this test is for took seconds.
const SLACK: Duration = Duration::from_millis(60);

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
        INSERT INTO dead_letter (sequence, lane, event, reason, millis, payload, payload_crc)
            SELECT n.i, (SELECT min(id) FROM lane WHERE integration_id = 'large'), e.e, 1, 1,
                zeroblob(600), 0
            FROM n, (SELECT 1 AS e UNION ALL SELECT 2) e;
        COMMIT;",
        captures = DEAD_LETTERS / 2
    );
    database.execute_batch(&sql).expect("filled");
}

/// What an abusive caller sends.
fn requests() -> Vec<(String, Vec<Vec<u8>>)> {
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
        ((*path).to_owned(), messages)
    });
    requests.collect()
}

/// Calls without end; each is given up after `patience`.
async fn abuse(channel: Channel, path: String, messages: Vec<Vec<u8>>, patience: Duration) {
    let create = "/jebbit.segmentrelay.v1.IntegrationService/CreateIntegration";
    for number in 0.. {
        let place = number % messages.len();
        let path = if place == 0 { path.as_str() } else { create };
        let request = by("scoped", messages[place].clone());
        let _ = tokio::time::timeout(patience, call_over(&channel, path, request)).await;
        // Between two calls of a client lies a turn of its own.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Mean times until captures of the third tenant are accepted, and delivered.
async fn tenant(world: &World, first: usize) -> [Duration; 2] {
    let mut sums = [Duration::ZERO; 2];
    let (accepted, delivered) = (30, 5);
    for number in 0..accepted {
        sums[0] += capture(world, "third", first + number, WaitFor::Accepted).await;
    }
    for number in accepted..accepted + delivered {
        sums[1] += capture(world, "third", first + number, WaitFor::Delivered).await;
    }
    [sums[0] / 30, sums[1] / 5]
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
    let mut number = 10_000;
    let mut slow = Vec::new();
    for (path, messages) in requests() {
        for patience in [Duration::from_secs(60), Duration::from_millis(2)] {
            create(&world, "mine").await;
            // A loaded machine is given another chance, an unfair relay fails in each.
            let mut failed = String::new();
            for _ in 0..3 {
                let alone = tenant(&world, number).await;
                let mut abusive = JoinSet::new();
                let channel = connect(world.address);
                for _ in 0..CALLS {
                    let (channel, path) = (channel.clone(), path.clone());
                    abusive.spawn(abuse(channel, path, messages.clone(), patience));
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                let beside = tenant(&world, number + 100).await;
                abusive.shutdown().await;
                number += 200;
                let ratio = |place: usize| beside[place].as_secs_f64() / alone[place].as_secs_f64();
                let told = format!(
                    "{path}, given up after {patience:?}: accepted {:?} beside {:?} ({:.2}), \
                     delivered {:?} beside {:?} ({:.2})",
                    beside[0],
                    alone[0],
                    ratio(0),
                    beside[1],
                    alone[1],
                    ratio(1)
                );
                println!("{told}");
                let fits = |place: usize| beside[place] <= alone[place] * 2 + SLACK;
                failed = match fits(0) && fits(1) {
                    true => String::new(),
                    false => told,
                };
                if failed.is_empty() {
                    break;
                }
            }
            if !failed.is_empty() {
                slow.push(failed);
            }
        }
    }
    assert!(slow.is_empty(), "{slow:#?}");
    world.stop().await;
}
