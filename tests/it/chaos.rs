//! A Segment that misbehaves in every way at once: in the end everything is
//! delivered, or rightly a dead letter.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    time::Instant,
};

use segment_relay::{
    proto::{
        Capture, CaptureBatchRequest, CaptureResult, DataRegion, DeliveryReason, DeliveryState,
        Integration, WaitFor,
    },
    sandbox::{DropConnection, Outcome, Rule},
};
use tonic::Request;

use crate::harness::{PATIENCE, World, acme, credential, numbered, states};

const TENANTS: [&str; 3] = ["acme", "globex", "initech"];
const CAPTURES: usize = 120;
const SETTINGS: &str = "[segment]\nrequest_timeout_ms = 200\n\
    [delivery]\nretry_base_ms = 10\nretry_max_ms = 40\n\
    max_events_per_second = 1000000\nburst_events = 1000000\n";

fn is_poisoned(number: usize) -> bool {
    number % 17 == 3
}

fn capture(number: usize) -> Capture {
    let region = if number.is_multiple_of(2) {
        DataRegion::Eu
    } else {
        DataRegion::NonEu
    };
    Capture {
        // Few people, so that many captures share a lane; those that come later wait behind none.
        email: match number {
            0..CAPTURES => format!("person-{}@example.com", number % 9),
            _ => format!("later-{number}@example.com"),
        },
        campaign_name: if is_poisoned(number) {
            "poison".into()
        } else {
            "fine".into()
        },
        data_region: region.into(),
        ..numbered(number)
    }
}

/// One rule of each kind, each for a share of the requests. The first that matches
/// acts, so each has a smaller share of what the ones before it let through.
fn misbehaviour(seed: u64) -> Vec<Rule> {
    let rule = |share: f64| Rule {
        share: Some(share),
        seed: Some(seed),
        ..Rule::default()
    };
    vec![
        // First, since a fault after processing would take the poison, too.
        Rule {
            reject_containing: Some("\"poison\"".into()),
            ..Rule::default()
        },
        Rule {
            status: Some(500),
            ..rule(0.1)
        },
        Rule {
            status: Some(503),
            process: Some(true),
            ..rule(0.1)
        },
        Rule {
            drop_connection: Some(DropConnection::BeforeAnswer),
            ..rule(0.1)
        },
        Rule {
            drop_connection: Some(DropConnection::MidAnswer),
            process: Some(true),
            ..rule(0.1)
        },
        Rule {
            status: Some(429),
            retry_after: Some("0".into()),
            ..rule(0.02)
        },
        Rule {
            status: Some(429),
            ..rule(0.05)
        },
        Rule {
            delay_ms: Some(400),
            process: Some(true),
            ..rule(0.03)
        },
        Rule {
            status: Some(408),
            ..rule(0.05)
        },
    ]
}

async fn send(
    world: &World,
    tenant: &str,
    numbers: Range<usize>,
    wait_for: WaitFor,
) -> Vec<CaptureResult> {
    let mut request = Request::new(CaptureBatchRequest {
        integration_id: tenant.into(),
        captures: numbers.map(capture).collect(),
        wait_for: wait_for.into(),
    });
    request.set_timeout(PATIENCE);
    let answer = world
        .relay()
        .capture_batch(request)
        .await
        .expect("answered");
    answer.into_inner().results
}

fn note_delivered(result: &CaptureResult, delivered: &mut HashSet<String>) {
    let good = result.events.iter();
    let good = good.filter(|event| event.state() == DeliveryState::Delivered);
    delivered.extend(good.map(|event| event.message_id.clone()));
}

/// What became of a tenant's captures. A poisoned event is given up once others of its source
/// were taken after its refusal: so others come, in both regions, for as long as it waits.
async fn at_rest(
    world: &World,
    tenant: &str,
    delivered: &mut HashSet<String>,
) -> Vec<CaptureResult> {
    let deadline = Instant::now() + PATIENCE;
    let healthy: Vec<usize> = (CAPTURES..)
        .filter(|it| !is_poisoned(*it))
        .take(400)
        .collect();
    for number in healthy {
        let results = send(world, tenant, 0..CAPTURES, WaitFor::Accepted).await;
        let waits = |state: &DeliveryState| {
            !matches!(
                state,
                DeliveryState::Delivered | DeliveryState::DeadLettered
            )
        };
        let mut all = results.iter().flat_map(|one| states(&one.events));
        if !all.any(|state| waits(&state)) {
            return results;
        }
        assert!(Instant::now() < deadline, "{tenant} does not come to rest");
        for other in [number, number + 1]
            .into_iter()
            .filter(|it| !is_poisoned(*it))
        {
            let sent = send(world, tenant, other..other + 1, WaitFor::Delivered).await;
            assert_eq!(states(&sent[0].events), [DeliveryState::Delivered; 2]);
            note_delivered(&sent[0], delivered);
        }
    }
    panic!("{tenant} does not come to rest");
}

#[tokio::test]
async fn everything_ends_delivered_or_rightly_dead_lettered() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let world = World::with(SETTINGS).await;
    for tenant in TENANTS {
        let credentials = vec![
            credential(DataRegion::NonEu, &format!("key-of-{tenant}-non-eu")),
            credential(DataRegion::Eu, &format!("key-of-{tenant}-in-eu")),
        ];
        let integration_id = tenant.to_owned();
        world
            .create(Integration {
                integration_id,
                credentials,
                ..acme()
            })
            .await;
    }
    world
        .sandbox
        .set_rules(misbehaviour(seed))
        .expect("fine rules");
    for tenant in TENANTS {
        send(&world, tenant, 0..CAPTURES, WaitFor::Accepted).await;
    }
    // Long enough that everything meets several faults, then only the poison is left.
    let enough = |stats: &segment_relay::sandbox::Stats| stats.misbehaved_requests > 150;
    world
        .sandbox
        .wait_for(enough, PATIENCE)
        .await
        .expect("requests");
    let poison = Rule {
        reject_containing: Some("\"poison\"".into()),
        ..Rule::default()
    };
    world.misbehave(poison);

    let mut delivered = HashSet::new();
    for tenant in TENANTS {
        let results = at_rest(&world, tenant, &mut delivered).await;
        for (number, result) in results.iter().enumerate() {
            assert!(result.duplicate);
            let expected = if is_poisoned(number) {
                [DeliveryState::Delivered, DeliveryState::DeadLettered]
            } else {
                [DeliveryState::Delivered; 2]
            };
            assert_eq!(states(&result.events), expected, "{tenant} {number}");
            if is_poisoned(number) {
                assert_eq!(result.events[1].reason(), DeliveryReason::PayloadRejected);
            }
            note_delivered(result, &mut delivered);
        }
    }
    let mut accepted = HashMap::<String, usize>::new();
    for entry in world.sandbox.entries() {
        if matches!(entry.outcome, Outcome::Accepted) {
            let id = entry.event()["messageId"]
                .as_str()
                .expect("an id")
                .to_owned();
            *accepted.entry(id).or_default() += 1;
        }
    }
    // What the debugger no longer keeps is counted all the same.
    assert_eq!(
        world.sandbox.stats().events_accepted,
        delivered.len() as u64
    );
    assert!(accepted.keys().all(|id| delivered.contains(id)));
    assert!(accepted.values().all(|count| *count == 1));
    world.stop().await;
}
