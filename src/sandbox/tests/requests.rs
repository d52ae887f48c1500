//! Good behaviour.

use serde_json::json;

use super::*;
use crate::sandbox::Rule;

#[tokio::test]
async fn an_event_shows_up_in_the_debugger_as_it_was_sent() {
    let running = Running::start().await;
    let event = identify("m-1");
    let request = running.post(batch(&[&event])).header("x-retry-count", "3");
    let response = request.send().await.expect("an answer");
    assert_eq!(response.status(), 200);
    assert_eq!(parse(response).await, json!({"success": true}));

    let mut entries = running.get_json("/debugger").await;
    let received_at = entries[0]["received_at"].take();
    let received_at = received_at.as_str().expect("a time");
    assert!(
        received_at.len() == 24 && received_at.ends_with('Z'),
        "{received_at}"
    );
    let expected = json!([{
        "seq": 1, "received_at": null, "region": "non_eu", "write_key_hint": "1234",
        "request": 1, "retry_count": 3, "status": 200, "outcome": "accepted", "warnings": [],
        "event": serde_json::from_str::<Value>(&event).expect("JSON"),
    }]);
    assert_eq!(entries, expected);
    assert_eq!(running.sandbox.entries()[0].event_json(), event);
}

#[tokio::test]
async fn what_is_answered_200_may_be_dropped_duplicate_or_warned_about() {
    let running = Running::start().await;
    let fine = identify("m-1");
    let nameless = r#"{"type":"track","userId":"u","messageId":"m-2"}"#;
    assert_eq!(running.send(&[&fine, &fine, nameless]).await, 200);
    let entries = running.get_json("/debugger").await;
    assert_eq!(entries[1]["outcome"], "duplicate");
    assert_eq!(entries[1]["reason"], "duplicate_message_id");
    assert_eq!(entries[2]["outcome"], "dropped");
    assert_eq!(entries[2]["reason"], "event_not_defined");
    assert_eq!(entries[2]["warnings"], json!(["no_timestamp"]));

    let stats = running.get_json("/stats").await;
    for (name, value) in [
        ("requests", json!(1)),
        ("statuses", json!({"200": 1})),
        ("events_accepted", json!(1)),
        ("events_duplicate", json!(1)),
        ("events_dropped", json!(1)),
        ("dropped", json!({"event_not_defined": 1})),
        ("largest_batch_events", json!(3)),
        ("requests_in_flight", json!(0)),
        ("most_requests_in_flight", json!(1)),
        ("connections_opened", json!(1)),
        ("gzip_requests", json!(0)),
    ] {
        assert_eq!(stats[name], value, "{name}");
    }
    assert_eq!(stats["bytes"], stats["largest_batch_bytes"]);
}

#[tokio::test]
async fn batches_that_are_dropped_as_a_whole_leave_one_entry() {
    let running = Running::start().await;
    assert_eq!(running.send(&[]).await, 200);
    assert_eq!(running.send(&["{}"; 2_501]).await, 200);
    let entries = running.get_json("/debugger").await;
    let found: Vec<_> = [0, 1]
        .map(|index| (&entries[index]["reason"], &entries[index]["event"]))
        .into();
    assert_eq!(
        found,
        [
            (&json!("empty_batch"), &Value::Null),
            (&json!("too_many_events"), &Value::Null)
        ]
    );
    assert_eq!(entries.as_array().map(Vec::len), Some(2));
    let stats = running.get_json("/stats").await;
    assert_eq!(
        stats["dropped"],
        json!({"empty_batch": 1, "too_many_events": 2501})
    );
}

#[tokio::test]
async fn a_wrong_write_key_is_answered_200_and_its_events_are_dropped() {
    let options = SandboxOptions {
        write_keys: vec![
            (Region::NonEu, "key-of-non-eu".to_owned()),
            (Region::Eu, "key-of-the-eu".to_owned()),
        ],
        ..SandboxOptions::default()
    };
    let running = Running::start_with(options).await;
    for key in ["key-of-non-eu", "key-of-the-eu", "key-of-nobody"] {
        let body = batch_with_key(&[&identify(key)], key);
        let response = running.post(body).send().await.expect("an answer");
        assert_eq!(response.status(), 200);
    }
    let body = batch_with_key(&[&identify("eu")], "key-of-the-eu");
    let url = format!("http://{}/v1/batch", running.eu);
    running
        .client
        .post(url)
        .body(body)
        .send()
        .await
        .expect("an answer");

    let entries = running.get_json("/debugger").await;
    let found: Vec<_> = (0..4)
        .map(|index| &entries[index])
        .map(|entry| {
            (
                entry["region"].as_str(),
                entry["reason"].as_str(),
                entry["detail"].as_str(),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            (Some("non_eu"), None, None),
            (Some("non_eu"), Some("unknown_source"), Some("wrong region")),
            (
                Some("non_eu"),
                Some("unknown_source"),
                Some("unknown write key")
            ),
            (Some("eu"), None, None),
        ]
    );
    assert_eq!(entries[3]["warnings"], json!(["content_type_not_json"]));
}

#[tokio::test]
async fn gzip_is_taken_and_bad_gzip_answered_400() {
    let running = Running::start().await;
    let plain = batch(&[&identify("m-1")]);
    let post = |body: Vec<u8>, encoding: &'static str| {
        let request = running
            .post(body)
            .header("content-encoding", encoding)
            .send();
        async { request.await.expect("an answer").status().as_u16() }
    };
    let packed = gzip(plain.as_bytes());
    let packed_bytes = packed.len() as u64;
    assert_eq!(post(packed.clone(), "gzip").await, 200);
    let stats = running.sandbox.stats();
    assert_eq!(stats.gzip_requests, 1);
    assert_eq!(
        (stats.bytes, stats.bytes_decompressed),
        (packed_bytes, plain.len() as u64)
    );
    assert_eq!(stats.events_accepted, 1);

    assert_eq!(post(packed[..packed.len() - 9].to_vec(), "gzip").await, 400);
    assert_eq!(post(plain.clone().into(), "gzip").await, 400);
    assert_eq!(post(packed, "identity").await, 400);
    assert_eq!(post(plain.into(), "br").await, 400);
    assert_eq!(post(gzip(&vec![b' '; 50_000_000]), "gzip").await, 400);
    assert_eq!(running.sandbox.stats().statuses.get(&400), Some(&5));
    assert_eq!(running.sandbox.entries().len(), 1);
}

#[tokio::test]
async fn bodies_of_more_than_500000_bytes_are_answered_400() {
    let running = Running::start().await;
    let body = batch(&[&identify("m-1")]);
    let padded = |bytes: usize| format!("{body}{}", " ".repeat(bytes - body.len()));
    for (bytes, status) in [(500_000, 200), (500_001, 400), (3_000_000, 400)] {
        let response = running.post(padded(bytes)).send().await.expect("an answer");
        assert_eq!(response.status(), status, "{bytes}");
    }
    assert_eq!(running.sandbox.stats().events_accepted, 1);
}

#[tokio::test]
async fn what_is_not_a_json_object_is_answered_400() {
    let running = Running::start().await;
    for body in [&b"x"[..], b"[]", b"", b"{\"batch\":[", b"{\"a\":\"\xff\"}"] {
        let response = running.post(body).send().await.expect("an answer");
        assert_eq!(response.status(), 400);
        assert_eq!(parse(response).await["success"], false);
    }
    assert_eq!(running.sandbox.entries().len(), 0);
}

#[tokio::test]
async fn the_debugger_filters_and_pages() {
    let running = Running::start().await;
    let track = r#"{"type":"track","event":"E","userId":"u-1","messageId":"t-1"}"#;
    running
        .send(&[&identify("1"), track, &identify("2"), &identify("3")])
        .await;
    for (query, expected) in [
        ("", vec![1, 2, 3, 4]),
        ("?type=identify", vec![1, 3, 4]),
        ("?userId=u-1", vec![1, 2]),
        ("?userId=u-1&type=track", vec![2]),
        ("?messageId=3", vec![4]),
        ("?limit=2", vec![3, 4]),
        ("?after=1&limit=2", vec![2, 3]),
        ("?after=4", vec![]),
    ] {
        let entries = running.get_json(&format!("/debugger{query}")).await;
        let entries = entries.as_array().expect("an array");
        let found: Vec<u64> = entries
            .iter()
            .filter_map(|entry| entry["seq"].as_u64())
            .collect();
        assert_eq!(found, expected, "{query}");
    }
    assert_eq!(running.get("/debugger?sort=up").await.status(), 400);
}

#[tokio::test]
async fn the_debugger_prints_for_terminals() {
    let running = Running::start().await;
    running
        .send(&[r#"{"type":"track","event":"Survey \u001b[2J","userId":""}"#])
        .await;
    let url = format!("http://{}/debugger", running.non_eu);
    let request = running.client.get(url).header("accept", "text/plain");
    let by_header = request.send().await.expect("an answer");
    assert_eq!(
        by_header.headers()["content-type"],
        "text/plain; charset=utf-8"
    );
    let text = by_header.text().await.expect("a text");
    let by_query = running.get("/debugger?format=text").await.text().await;
    assert_eq!(by_query.expect("a text"), text);
    let (head, json) = text.split_once('\n').expect("lines");
    assert!(
        head.ends_with(
            r#"Z  non_eu  track  dropped (id_not_string)  "Survey \u{1b}[2J"  [no_timestamp]  [no_message_id]"#
        ),
        "{head}"
    );
    assert!(json.starts_with("{\n  \"type\": \"track\",\n"), "{json}");
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods_are_told_apart() {
    let running = Running::start().await;
    assert_eq!(running.get("/v1/track").await.status(), 404);
    for (path, allowed) in [("/v1/batch", "POST"), ("/reset", "POST")] {
        let response = running.get(path).await;
        assert_eq!(response.status(), 405, "{path}");
        assert_eq!(response.headers()["allow"], allowed, "{path}");
    }
    for path in ["/", "/stats", "/debugger", "/control"] {
        let url = format!("http://{}{path}", running.non_eu);
        let response = running.client.post(url).send().await.expect("an answer");
        assert_eq!(response.status(), 405, "{path}");
        assert!(response.headers().contains_key("allow"), "{path}");
    }
    let about = running.get("/").await.text().await.expect("a text");
    for endpoint in ["/v1/batch", "/debugger", "/stats", "/control", "/reset"] {
        assert!(about.contains(endpoint), "{endpoint}");
    }
}

#[tokio::test]
async fn reset_empties_everything() {
    let running = Running::start().await;
    running.send(&[&identify("m-1")]).await;
    let rule = Rule {
        status: Some(503),
        ..Default::default()
    };
    running.sandbox.set_rules(vec![rule]).expect("a fine rule");
    let url = format!("http://{}/reset", running.non_eu);
    assert_eq!(
        running
            .client
            .post(url)
            .send()
            .await
            .expect("an answer")
            .status(),
        200
    );
    assert_eq!(running.get_json("/debugger").await, json!([]));
    assert_eq!(running.sandbox.stats().requests, 0);
    assert_eq!(running.send(&[&identify("m-1")]).await, 200);
    assert_eq!(running.sandbox.stats().events_accepted, 1);
}

#[tokio::test]
async fn http2_is_spoken_too() {
    let mut running = Running::start().await;
    running.client = client(true);
    let response = running.post(batch(&[&identify("m-1")])).send().await;
    let response = response.expect("an answer");
    assert_eq!(response.version(), reqwest::Version::HTTP_2);
    assert_eq!(response.status(), 200);
    assert_eq!(running.sandbox.stats().events_accepted, 1);
}

#[tokio::test]
async fn subscribers_are_told_of_new_entries() {
    let running = Running::start().await;
    let mut news = running.sandbox.subscribe();
    running.send(&[&identify("m-1")]).await;
    let entry = news.recv().await.expect("an entry");
    assert_eq!(
        (entry.seq, entry.event()["messageId"].as_str()),
        (1, Some("m-1"))
    );
}

#[tokio::test]
async fn wait_for_wakes_on_changes_and_gives_up_in_time() {
    let running = Running::start().await;
    let event = identify("m-1");
    let (stats, status) = tokio::join!(
        running.wait_for(|stats| stats.events_accepted == 1),
        running.send_one(&event)
    );
    assert_eq!((stats.events_accepted, status), (1, 200));
    let never = running
        .sandbox
        .wait_for(|stats| stats.events_accepted > 1, Duration::from_millis(5));
    assert_eq!(
        never.await.expect_err("a time-out").stats.events_accepted,
        1
    );
}

#[tokio::test]
async fn shutdown_closes_idle_connections_and_ends_run() {
    let mut running = Running::start().await;
    let mut idle = TcpStream::connect(running.eu).await.expect("a connection");
    running.wait_for(|stats| stats.connections_open == 1).await;
    running.shutdown.cancel();
    let ended = tokio::time::timeout(PATIENCE, &mut running.task).await;
    ended.expect("it ends").expect("without a panic");
    assert_eq!(idle.read(&mut [0; 16]).await.expect("an end"), 0);
    assert_eq!(running.sandbox.stats().connections_open, 0);
    assert!(TcpStream::connect(running.eu).await.is_err());
}

#[tokio::test]
async fn connections_beyond_the_bound_wait() {
    let running = Running::start_with(SandboxOptions {
        max_connections: 1,
        ..SandboxOptions::default()
    })
    .await;
    let first = TcpStream::connect(running.non_eu)
        .await
        .expect("a connection");
    running.wait_for(|stats| stats.connections_open == 1).await;
    let event = identify("m-1");
    let mut second = std::pin::pin!(running.send_one(&event));
    let early = tokio::time::timeout(Duration::from_millis(50), second.as_mut()).await;
    assert!(early.is_err(), "it was answered beside the first");
    assert_eq!(running.sandbox.stats().connections_opened, 1);
    drop(first);
    assert_eq!(second.await, 200);
}

#[tokio::test]
async fn a_sandbox_that_only_counts_judges_nothing_and_misbehaves_when_told() {
    let running = Running::start_with(SandboxOptions {
        count_only: true,
        ..SandboxOptions::default()
    })
    .await;
    let (one, other) = (identify("m-1"), r#"{"messageId":"no type"}"#);
    assert_eq!(running.send(&[&one, other]).await, 200);
    assert_eq!(running.send_one(&one).await, 200);
    let stats = running.sandbox.stats();
    assert_eq!((stats.events_accepted, stats.requests), (3, 2));
    assert_eq!(stats.largest_batch_events, 2);
    assert!(running.sandbox.entries().is_empty());

    let rule = Rule {
        status: Some(503),
        ..Rule::default()
    };
    running.sandbox.set_rules(vec![rule]).expect("a fine rule");
    assert_eq!(running.send_one(&one).await, 503);
    let stats = running.sandbox.stats();
    assert_eq!((stats.events_accepted, stats.events_refused), (3, 1));
}
