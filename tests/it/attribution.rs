//! The right one is blamed: what fails in a request, a source or an endpoint
//! costs no other user's events.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use segment_relay::{
    proto::{
        Capture, CaptureBatchRequest, DeliveryReason, DeliveryState, GetIntegrationRequest,
        SourceCondition,
    },
    sandbox::{DropConnection, Rule},
};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    harness::{PATIENCE, World, acme, numbered, states},
    notify::{settings, types},
    receiver::{Receiver, events_in},
};

/// Captures of as many people, all of one lane.
fn of_one_lane(lane: u8, count: usize) -> Vec<Capture> {
    let own = |capture: &Capture| Sha256::digest(&capture.email)[0] % 4 == lane;
    (0..).map(numbered).filter(own).take(count).collect()
}

async fn accept(world: &World, captures: &[Capture]) {
    let request = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: captures.to_vec(),
        ..CaptureBatchRequest::default()
    };
    let answer = world.relay().capture_batch(request).await;
    answer.expect("accepted");
}

async fn condition(world: &World) -> SourceCondition {
    let request = GetIntegrationRequest {
        integration_id: "acme".into(),
    };
    let found = world.integrations().get_integration(request).await;
    let integration = found.expect("found").into_inner().integration;
    let health = integration.and_then(|integration| integration.health);
    health.expect("health").condition()
}

async fn condition_becomes(world: &World, expected: SourceCondition) {
    let reached = async {
        while condition(world).await != expected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let reached = tokio::time::timeout(PATIENCE, reached).await;
    reached.expect("in time");
}

#[tokio::test]
async fn one_event_that_fails_in_company_holds_up_nobody_else() {
    let rule = |capture: &Capture| Rule {
        reject_containing: Some(hex::encode(Sha256::digest(&capture.email))),
        ..Rule::default()
    };
    let captures = of_one_lane(2, 41);
    let bad = &captures[20];
    for rule in [
        Rule {
            reject_status: Some(500),
            ..rule(bad)
        },
        Rule {
            delay_ms: Some(60_000),
            ..rule(bad)
        },
        Rule {
            drop_connection: Some(DropConnection::BeforeAnswer),
            ..rule(bad)
        },
        Rule {
            reject_status: Some(403),
            ..rule(bad)
        },
    ] {
        let world = World::with("[segment]\nrequest_timeout_ms = 150\n").await;
        world.create(acme()).await;
        world.misbehave(rule);
        accept(&world, &captures).await;
        world.arrived(80).await;
        assert_eq!(world.sandbox.stats().events_accepted, 80);
        assert!(world.sandbox.stats().requests < 60);
        // Its user's later events wait behind it.
        let mut later = bad.clone();
        later.capture_id = "later".into();
        world.accept(later.clone()).await;
        world.behave();
        if world.status(&bad.capture_id).await.is_ok_and(|status| {
            let result = status.result.expect("a result");
            states(&result.events) != [DeliveryState::DeadLettered; 2]
        }) {
            world.settled(bad.clone()).await;
        }
        world.settled(later).await;
        world.stop().await;
    }
}

#[tokio::test]
async fn what_refuses_everything_for_a_while_costs_no_event() {
    for refusal in [400, 404, 421] {
        let world = World::with(
            "[delivery]\nretry_base_ms = 10\nretry_max_ms = 50\nunauthorized_retry_ms = 60\n",
        )
        .await;
        world.create(acme()).await;
        world.misbehave(Rule {
            status: Some(refusal),
            ..Rule::default()
        });
        let captures: Vec<Capture> = (0..100).map(numbered).collect();
        accept(&world, &captures).await;
        let enough = world
            .sandbox
            .wait_for(|stats| stats.requests > 60, PATIENCE);
        enough.await.expect("it is tried");
        if refusal == 400 {
            condition_becomes(&world, SourceCondition::Suspended).await;
        }
        world.behave();
        world.arrived(200).await;
        condition_becomes(&world, SourceCondition::Healthy).await;
        world.stop().await;
    }
}

#[tokio::test]
async fn segment_is_told_how_often_the_events_were_tried() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(429),
        retry_after: Some("0.2".into()),
        count: Some(1),
        ..Rule::default()
    });
    let start = std::time::Instant::now();
    let result = world.deliver(numbered(1)).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    assert!(start.elapsed() >= Duration::from_secs(1), "rounded up");
    let entries = world.sandbox.entries();
    assert_eq!(entries.last().expect("an entry").request.retry_count, 1);
    world.stop().await;
}

/// The `messageId`s of a request.
fn message_ids(body: &[u8]) -> Vec<String> {
    let body: Value = serde_json::from_slice(body).expect("JSON");
    let events = body["batch"].as_array().expect("events");
    let ids = events.iter().map(|event| event["messageId"].as_str());
    ids.map(|id| id.expect("an id").to_owned()).collect()
}

#[tokio::test]
async fn every_request_tells_how_often_its_events_were_tried_also_after_a_split() {
    let endpoint = Receiver::start().await;
    // Halved, tried alone, set aside, passed and joined by others again.
    endpoint.fail_with(&[500, 500, 503, 500, 200, 500, 500, 400, 200, 429, 500, 408]);
    let url = format!("http://{}/v1/batch", endpoint.address);
    let world = World::with_front("", async |_| url).await;
    world.create(acme()).await;
    let captures = of_one_lane(3, 9);
    accept(&world, &captures).await;
    for capture in captures {
        let result = world.settled(capture).await;
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
    let mut tried: HashMap<String, u32> = HashMap::new();
    for request in endpoint.received() {
        let ids = message_ids(&request.body);
        let before = ids.iter().map(|id| tried.get(id).copied().unwrap_or(0));
        let told = request.headers.get("x-retry-count");
        let told = told.map(|told| told.to_str().expect("ASCII").parse().expect("a number"));
        assert_eq!(told, before.max().filter(|count| *count > 0), "{tried:?}");
        for id in ids {
            *tried.entry(id).or_default() += 1;
        }
    }
    assert!(tried.values().any(|count| *count > 4), "{tried:?}");
    world.stop().await;
}

#[tokio::test]
async fn a_lane_that_fails_beside_good_ones_is_told_of_once() {
    for (status, allowed) in [(500, "integration.broken"), (401, "integration.broken")] {
        let receiver = Receiver::start().await;
        let world = World::with(&format!(
            "[notify]\nurl = \"http://{}/hook\"\nbroken_after_ms = 100\n\
             secret = \"whsec_cGxhbnRlZC13ZWJob29rLXNlY3JldC1vZi10ZXN0cw==\"\n\
             [delivery]\nretry_base_ms = 10\nretry_max_ms = 50\nunauthorized_retry_ms = 20\n",
            receiver.address
        ))
        .await;
        world.create(acme()).await;
        let bad = of_one_lane(1, 1).remove(0);
        world.refuse_person(&bad.email, status);
        // Two events of one person: a lane that takes nothing.
        world.accept(bad.clone()).await;
        for number in 0..40 {
            let good = of_one_lane(number % 3 % 2 * 2, usize::from(number) + 1);
            world.deliver(good[usize::from(number)].clone()).await;
        }
        if status == 500 {
            condition_becomes(&world, SourceCondition::Broken).await;
        }
        world.behave();
        world.settled(bad).await;
        condition_becomes(&world, SourceCondition::Healthy).await;
        let kinds: Vec<String> = receiver
            .received()
            .iter()
            .map(|one| serde_json::from_slice::<Value>(&one.body).expect("JSON"))
            .map(|body| body["type"].as_str().expect("a type").to_owned())
            .collect();
        let kinds: Vec<&str> = kinds.iter().map(String::as_str).skip(1).collect();
        assert!(kinds.len() <= 4, "{kinds:?}");
        let seen: BTreeSet<&str> = kinds.iter().copied().collect();
        assert!(status != 500 || seen.contains(allowed), "{kinds:?}");
        world.stop().await;
    }
}

#[tokio::test]
async fn a_lane_of_many_bad_events_is_told_of_once_whatever_the_others_do() {
    for status in [500, 401, 402] {
        let receiver = Receiver::start().await;
        let world = World::with(&settings(&receiver)).await;
        world.create(acme()).await;
        let bad = of_one_lane(1, 12);
        let rules = bad.iter().map(|capture| Rule {
            reject_containing: Some(hex::encode(Sha256::digest(&capture.email))),
            reject_status: Some(status),
            ..Rule::default()
        });
        world
            .sandbox
            .set_rules(rules.collect())
            .expect("fine rules");
        accept(&world, &bad).await;
        let lanes = [0, 2, 3].map(|lane| of_one_lane(lane, 20));
        let [first, second, third] = lanes;
        for ((one, two), three) in first.into_iter().zip(second).zip(third) {
            for good in [one, two, three] {
                world.deliver(good).await;
            }
        }
        if status == 500 {
            condition_becomes(&world, SourceCondition::Broken).await;
        }
        world.behave();
        for capture in bad {
            world.settled(capture).await;
        }
        condition_becomes(&world, SourceCondition::Healthy).await;
        let told = types(&receiver.wait_for(1).await);
        // It may look broken before it looks parked; it recovers once, in the end.
        let failed = told
            .iter()
            .skip(1)
            .take_while(|one| *one != "integration.healthy");
        let failed = failed.count();
        assert!(failed <= 2 && (failed > 0 || status != 500), "{told:?}");
        assert_eq!(told.len(), 1 + failed + usize::from(failed > 0), "{told:?}");
        world.stop().await;
    }
}

#[tokio::test]
async fn a_body_settles_nothing_that_the_status_line_has_settled() {
    let endless = Receiver::start().await;
    endless.answer_without_end();
    let url = format!("http://{}/v1/batch", endless.address);
    let world = World::with_front("", async |_| url).await;
    world.create(acme()).await;
    let result = world.deliver(numbered(1)).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    assert_eq!(result.events[0].attempt_count, 1);
    assert_eq!(endless.received().len(), 1);
    world.stop().await;

    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        drop_connection: Some(DropConnection::MidAnswer),
        process: Some(true),
        ..Rule::default()
    });
    let result = world.deliver(numbered(1)).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    assert_eq!(world.sandbox.stats().requests, 1);
    world.stop().await;
}

#[tokio::test]
async fn a_2xx_that_is_not_segments_takes_nothing() {
    let proxy = Receiver::start().await;
    let url = format!("http://{}/v1/batch", proxy.address);
    let world = World::with_front("", async |_| url).await;
    world.create(acme()).await;
    for (number, body) in ["<html>Log in</html>", r#"{"success":false}"#]
        .into_iter()
        .enumerate()
    {
        proxy.answer(body);
        let capture = numbered(number);
        world.accept(capture.clone()).await;
        proxy.wait_for(proxy.received().len() + 2).await;
        let status = world.status(&capture.capture_id).await.expect("found");
        let first = &status.attempts[0];
        assert_eq!(first.reason(), DeliveryReason::NotTaken);
        assert_eq!(first.http_status, 200);
        proxy.answer(r#"{"success":true}"#);
        let result = world.settled(capture).await;
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
    world.stop().await;
}

#[tokio::test]
async fn batches_shrink_to_what_an_endpoint_answers_in_time_and_all_is_delivered() {
    // As one that takes 2 ms an event; whether an answer is in time is not up to this machine.
    let endpoint = Receiver::start().await;
    endpoint.answer_up_to(200);
    let url = format!("http://{}/v1/batch", endpoint.address);
    let settings = "[segment]\nrequest_timeout_ms = 400\n";
    let world = World::with_front(settings, async |_| url).await;
    world.create(acme()).await;
    let captures = of_one_lane(0, 800);
    accept(&world, &captures).await;
    let last = captures.last().expect("some").clone();
    let result = world.settled(last).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    let sizes: Vec<usize> = endpoint
        .received()
        .iter()
        .map(|one| events_in(&one.body))
        .collect();
    let answered = sizes.iter().filter(|events| **events <= 200);
    assert!(answered.sum::<usize>() >= 1_600, "{sizes:?}");
    let largest = sizes.iter().max().expect("some");
    assert!(*largest > 400 && sizes.len() < 60, "{sizes:?}");
    world.stop().await;
}
