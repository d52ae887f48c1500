//! Misbehaviour.

use std::time::Instant;

use serde_json::json;

use super::*;

async fn control(running: &Running, rules: Value) -> Response {
    let url = format!("http://{}/control", running.non_eu);
    let request = running.client.put(url).body(rules.to_string());
    request.send().await.expect("an answer")
}

#[tokio::test]
async fn control_is_set_shown_and_removed() {
    let running = Running::start().await;
    let rule = json!({"status": 429, "retry_after": "7", "rate_limit_reset": "soon", "count": 1});
    let response = control(&running, rule.clone()).await;
    assert_eq!(response.status(), 200);
    assert_eq!(
        parse(response).await,
        json!({"rules": [rule], "acted": [0]})
    );

    let event = identify("m-1");
    let answer = running
        .post(batch(&[&event]))
        .send()
        .await
        .expect("an answer");
    assert_eq!(answer.status(), 429);
    assert_eq!(answer.headers()["retry-after"], "7");
    assert_eq!(answer.headers()["x-ratelimit-reset"], "soon");
    let stats = running.sandbox.stats();
    assert_eq!((stats.events_accepted, stats.events_refused), (0, 1));
    assert_eq!(
        (stats.misbehaved_requests, stats.statuses.get(&429)),
        (1, Some(&1))
    );
    assert_eq!(running.get_json("/control").await["acted"], json!([1]));
    assert_eq!(running.send_one(&event).await, 200);
    assert_eq!(running.sandbox.stats().events_accepted, 1);

    let url = format!("http://{}/control", running.non_eu);
    let removed = running.client.delete(url).send().await.expect("an answer");
    assert_eq!(parse(removed).await, json!({"rules": [], "acted": []}));
}

#[tokio::test]
async fn unknown_fields_of_control_are_named() {
    let running = Running::start().await;
    let response = control(&running, json!({"rules": [{"statsu": 500}]})).await;
    assert_eq!(response.status(), 400);
    let message = parse(response).await["message"].to_string();
    assert!(message.contains("statsu"), "{message}");
}

#[tokio::test]
async fn rules_pick_their_region() {
    let running = Running::start().await;
    control(&running, json!({"status": 500, "region": "eu"})).await;
    assert_eq!(running.send(&[&identify("m-1")]).await, 200);
    let url = format!("http://{}/v1/batch", running.eu);
    let request = running.client.post(url).body(batch(&[]));
    assert_eq!(request.send().await.expect("an answer").status(), 500);
}

#[tokio::test]
async fn a_poisoned_request_is_refused_and_others_are_not() {
    let running = Running::start().await;
    control(&running, json!({"reject_message_ids": ["bad"]})).await;
    let (good, bad) = (identify("good"), identify("bad"));
    assert_eq!(running.send(&[&good, &bad]).await, 400);
    assert_eq!(running.sandbox.stats().events_accepted, 0);
    assert_eq!(running.send(&[&good]).await, 200);
}

#[tokio::test]
async fn a_rule_for_a_key_also_sees_bodies_that_are_not_json() {
    let running = Running::start().await;
    control(&running, json!({"status": 503, "write_key": "abc"})).await;
    for (authorization, status) in [("Basic YWJjOg==", 503), ("Basic YWJkOg==", 400)] {
        let request = running.post("{").header("authorization", authorization);
        assert_eq!(request.send().await.expect("an answer").status(), status);
    }
}

#[tokio::test]
async fn a_connection_dropped_before_the_answer_brings_nothing() {
    let running = Running::start().await;
    let rule = json!({"drop_connection": "before_answer", "process": true, "count": 1});
    control(&running, rule).await;
    let event = identify("m-1");
    assert_eq!(send_raw(running.non_eu, &batch(&[&event])).await, "");
    let stats = running.sandbox.stats();
    assert_eq!((stats.events_accepted, stats.connections_dropped), (1, 1));
    assert!(stats.statuses.is_empty());
    assert_eq!(running.sandbox.entries()[0].request.status, None);
    // The answer was lost after the event was taken: the repeat is a duplicate.
    assert_eq!(running.send_one(&event).await, 200);
    assert_eq!(running.sandbox.stats().events_duplicate, 1);
}

#[tokio::test]
async fn a_connection_dropped_mid_answer_brings_a_part() {
    let running = Running::start().await;
    control(&running, json!({"drop_connection": "mid_answer"})).await;
    let answer = send_raw(running.non_eu, &batch(&[&identify("m-1")])).await;
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(head.to_lowercase().contains("content-length: 16"), "{head}");
    assert_eq!(body, r#"{"succes"#);
    let stats = running.sandbox.stats();
    assert_eq!((stats.events_accepted, stats.events_refused), (0, 1));
}

#[tokio::test]
async fn connections_are_dropped_over_http2_too() {
    let mut running = Running::start().await;
    running.client = client(true);
    for how in ["before_answer", "mid_answer"] {
        control(&running, json!({"drop_connection": how, "count": 1})).await;
        let answer = running.post(batch(&[&identify(how)])).send().await;
        let broken = match answer {
            Ok(answer) => {
                assert_eq!((how, answer.status().as_u16()), ("mid_answer", 200));
                answer.bytes().await.is_err()
            }
            Err(_) => how == "before_answer",
        };
        assert!(broken, "{how}");
    }
    let stats = running.sandbox.stats();
    assert_eq!(stats.connections_dropped, 2);
}

#[tokio::test]
async fn a_delayed_answer_comes_late_and_its_events_are_taken_early() {
    let running = Running::start().await;
    control(&running, json!({"delay_ms": 100})).await;
    let began = Instant::now();
    let event = identify("m-1");
    let (status, in_flight) = tokio::join!(running.send_one(&event), async {
        running
            .wait_for(|stats| stats.events_accepted == 1)
            .await
            .requests_in_flight
    });
    assert_eq!((status, in_flight), (200, 1));
    assert!(began.elapsed() >= Duration::from_millis(100));
}

#[tokio::test]
async fn requests_in_flight_are_counted_and_given_up() {
    let running = Running::start().await;
    control(&running, json!({"delay_ms": 600_000})).await;
    let events = ["a", "b", "c"].map(identify);
    let sending = async {
        tokio::join!(
            running.send_one(&events[0]),
            running.send_one(&events[1]),
            running.send_one(&events[2])
        )
    };
    tokio::select! {
        statuses = sending => panic!("answered {statuses:?}"),
        stats = running.wait_for(|stats| stats.requests_in_flight == 3) => {
            assert_eq!(stats.most_requests_in_flight, 3);
        }
    }
    // The clients have gone by now.
    let stats = running
        .wait_for(|stats| stats.requests_in_flight == 0)
        .await;
    assert!(stats.statuses.is_empty());
}

#[tokio::test]
async fn shutdown_waits_a_second_for_requests_and_no_longer() {
    let mut running = Running::start().await;
    control(&running, json!({"delay_ms": 600_000})).await;
    let body = batch(&[&identify("m-1")]);
    let sending = tokio::spawn(running.post(body).send());
    running
        .wait_for(|stats| stats.requests_in_flight == 1)
        .await;
    let began = Instant::now();
    running.shutdown.cancel();
    let ended = tokio::time::timeout(PATIENCE, &mut running.task).await;
    ended.expect("it ends").expect("without a panic");
    assert!(began.elapsed() >= Duration::from_millis(900));
    assert!(sending.await.expect("no panic").is_err());
}
