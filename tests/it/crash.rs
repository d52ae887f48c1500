//! Kills the real process under load, again and again, and reconciles what was
//! acknowledged with what the sandbox got.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use segment_relay::{
    proto::{
        Capture, CaptureBatchRequest, CaptureRequest, CreateIntegrationRequest, DeliveryState,
        EventDelivery, WaitFor, integration_service_client::IntegrationServiceClient,
        segment_relay_client::SegmentRelayClient,
    },
    sandbox::{Rule, Sandbox},
};
use tokio::sync::watch;
use tonic::{Request, transport::Channel};

use crate::{
    harness::{PATIENCE, acme, states, worked_example},
    process::{Process, lasting_sandbox},
};

/// Kills of an ordinary run; `CRASH_ROUNDS` for a longer one.
const ROUNDS: usize = 8;
const USERS: usize = 6;
/// Acknowledgements of one round at the most.
const LOAD: usize = 400;

/// What callers know: for each user, the message ids of the acknowledged events
/// in the order in which the captures were accepted.
#[derive(Default)]
struct Ledger {
    acknowledged: Mutex<HashMap<usize, Vec<[String; 2]>>>,
    count: watch::Sender<usize>,
}

impl Ledger {
    fn note(&self, user: usize, events: &[EventDelivery]) {
        let ids = [events[0].message_id.clone(), events[1].message_id.clone()];
        self.acknowledged
            .lock()
            .expect("sound")
            .entry(user)
            .or_default()
            .push(ids);
        self.count.send_modify(|count| *count += 1);
    }
}

fn capture(user: usize, number: usize) -> Capture {
    Capture {
        capture_id: format!("u{user}-{number}"),
        email: format!("user-{user}@example.com"),
        ..worked_example()
    }
}

/// One user's calls, one after the other, until the process is gone. Every fourth
/// is a batch. Returns the number of the first capture without an answer.
async fn load(channel: Channel, user: usize, mut number: usize, ledger: Arc<Ledger>) -> usize {
    let mut relay = SegmentRelayClient::new(channel);
    loop {
        let size = if number.is_multiple_of(4) { 5 } else { 1 };
        let captures: Vec<_> = (number..number + size).map(|n| capture(user, n)).collect();
        let mut answers = Vec::new();
        if let [one] = captures.as_slice() {
            let message = CaptureRequest {
                integration_id: "acme".into(),
                capture: Some(one.clone()),
                ..CaptureRequest::default()
            };
            let Ok(answer) = relay.capture(message).await else {
                return number;
            };
            answers.extend(answer.into_inner().result);
        } else {
            let message = CaptureBatchRequest {
                integration_id: "acme".into(),
                captures,
                ..CaptureBatchRequest::default()
            };
            let Ok(answer) = relay.capture_batch(message).await else {
                return number;
            };
            answers = answer.into_inner().results;
        }
        for answer in &answers {
            assert!(answer.error.is_none(), "{answer:?}");
            ledger.note(user, &answer.events);
        }
        number += size;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_however_often_the_process_is_killed() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let (sandbox, urls) = lasting_sandbox().await;
    let bad_day = Rule {
        status: Some(503),
        share: Some(0.2),
        ..Rule::default()
    };
    sandbox.set_rules(vec![bad_day]).expect("a fine rule");

    let directory = tempfile::tempdir().expect("a directory");
    let outbox = directory.path().join("outbox");
    let mut relay = Process::start(&outbox, &urls).await;
    let message = CreateIntegrationRequest {
        integration: Some(acme()),
    };
    IntegrationServiceClient::new(relay.channel.clone())
        .create_integration(message)
        .await
        .expect("created");

    let ledger = Arc::new(Ledger::default());
    let mut next = vec![0; USERS];
    let rounds = std::env::var_os("CRASH_ROUNDS")
        .and_then(|rounds| rounds.to_str()?.parse().ok())
        .unwrap_or(ROUNDS);
    for _ in 0..rounds {
        let until = *ledger.count.borrow() + rng.usize(1..LOAD);
        let users: Vec<_> = (0..USERS)
            .map(|user| {
                let channel = relay.channel.clone();
                tokio::spawn(load(channel, user, next[user], Arc::clone(&ledger)))
            })
            .collect();
        let mut count = ledger.count.subscribe();
        let enough = count.wait_for(|count| *count >= until);
        tokio::time::timeout(PATIENCE, enough)
            .await
            .expect("answers come")
            .expect("a count");
        relay.kill();
        for (user, task) in users.into_iter().enumerate() {
            // What was not answered is sent again: a duplicate, or new.
            next[user] = task.await.expect("no panic");
        }
        relay = Process::start(&outbox, &urls).await;
    }
    sandbox.set_rules(Vec::new()).expect("no rules");
    everything_is_final(&relay.channel, &next).await;
    reconcile(&sandbox, &ledger);
}

/// Sends the last capture of each user again and waits for it: all before it in
/// its lane are settled then.
async fn everything_is_final(channel: &Channel, next: &[usize]) {
    let mut relay = SegmentRelayClient::new(channel.clone());
    for (user, next) in next.iter().enumerate() {
        let mut request = Request::new(CaptureRequest {
            integration_id: "acme".into(),
            capture: Some(capture(user, next + 1_000)),
            wait_for: WaitFor::Delivered.into(),
        });
        request.set_timeout(PATIENCE);
        let answer = relay.capture(request).await.expect("answered").into_inner();
        let events = answer.result.expect("a result").events;
        assert_eq!(states(&events), [DeliveryState::Delivered; 2]);
    }
}

fn reconcile(sandbox: &Sandbox, ledger: &Ledger) {
    let mut place = HashMap::new();
    for (index, entry) in sandbox.entries().iter().enumerate() {
        let id = entry.event()["messageId"]
            .as_str()
            .expect("an id")
            .to_owned();
        // The first arrival counts; repeats have the same id.
        place.entry(id).or_insert(index);
    }
    let acknowledged = ledger.acknowledged.lock().expect("sound");
    let mut seen = HashSet::new();
    for (user, pairs) in acknowledged.iter() {
        let mut last = None;
        for id in pairs.iter().flatten() {
            let arrived = place.get(id);
            assert!(
                arrived.is_some(),
                "user {user}: {id} was acknowledged and never arrived"
            );
            if seen.insert(id.clone()) {
                assert!(last < arrived, "user {user}: {id} arrived out of order");
                last = arrived;
            }
        }
    }
    let total: usize = acknowledged.values().map(Vec::len).sum();
    assert!(total >= ROUNDS, "only {total} captures were acknowledged");
}
