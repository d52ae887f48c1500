use segment_relay::{
    proto::{
        Capture, DataRegion, DeliveryReason, DeliveryState, Integration, UpdateIntegrationRequest,
        WatchDeliveriesRequest,
    },
    sandbox::{DropConnection, Rule},
};
use tokio_stream::StreamExt;

use crate::harness::{World, acme, credential, numbered, states, text, worked_example};

#[tokio::test]
async fn a_failed_request_is_repeated_with_the_same_ids_and_a_fresh_time() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(503),
        count: Some(2),
        ..Rule::default()
    });
    let result = world.deliver(worked_example()).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    assert_eq!(result.events[0].attempt_count, 3);

    let attempts = world
        .status(&result.capture_id)
        .await
        .expect("found")
        .attempts;
    let of_identify: Vec<_> = attempts
        .iter()
        .filter(|attempt| attempt.message_id == result.events[0].message_id)
        .map(|attempt| {
            (
                attempt.http_status,
                attempt.reason(),
                attempt.error.as_str(),
            )
        })
        .collect();
    let failed = (
        503,
        DeliveryReason::ServerError,
        "HTTP 503 Service Unavailable",
    );
    assert_eq!(
        of_identify,
        [failed, failed, (200, DeliveryReason::Unspecified, "")]
    );
    let entries = world.sandbox.entries();
    assert_eq!(entries.last().expect("an entry").request.retry_count, 2);
    world.stop().await;
}

#[tokio::test]
async fn lost_answers_and_broken_connections_lose_nothing() {
    let world = World::start().await;
    world.create(acme()).await;
    for number in 0..2 {
        world.misbehave(Rule {
            drop_connection: Some(DropConnection::BeforeAnswer),
            count: Some(1),
            process: Some(true),
            ..Rule::default()
        });
        let result = world.deliver(numbered(number)).await;
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
        assert_eq!(result.events[0].attempt_count, 2);
        let attempts = world
            .status(&result.capture_id)
            .await
            .expect("found")
            .attempts;
        assert_eq!(attempts[0].reason(), DeliveryReason::Network);
        assert!(
            !attempts[0].error.contains("http://"),
            "{}",
            attempts[0].error
        );
    }
    // Segment had taken them the first time: it sees repeats by their messageId.
    let stats = world.sandbox.stats();
    assert_eq!((stats.events_accepted, stats.events_duplicate), (4, 4));
    world.stop().await;
}

#[tokio::test]
async fn a_slow_answer_times_out_and_is_tried_again() {
    let world = World::with("[segment]\nrequest_timeout_ms = 150\n").await;
    world.create(acme()).await;
    world.misbehave(Rule {
        delay_ms: Some(60_000),
        count: Some(1),
        ..Rule::default()
    });
    let result = world.deliver(worked_example()).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    let attempts = world
        .status(&result.capture_id)
        .await
        .expect("found")
        .attempts;
    assert_eq!(attempts[0].reason(), DeliveryReason::Timeout);
    world.stop().await;
}

#[tokio::test]
async fn of_a_refused_batch_only_the_poisoned_event_is_given_up() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        reject_containing: Some("poison".into()),
        ..Rule::default()
    });
    // One person, so one lane: they travel together.
    let capture = |number: usize| Capture {
        capture_id: format!("capture-{number}"),
        ..worked_example()
    };
    let mut bad = capture(5);
    bad.attributes = [(
        "age".to_owned(),
        segment_relay::proto::AttributeValue {
            kind: Some(segment_relay::proto::attribute_value::Kind::IntegerValue(7)),
        },
    )]
    .into();
    bad.campaign_name = "poison".into();
    let captures = (0..10).map(|number| {
        if number == 5 {
            bad.clone()
        } else {
            capture(number)
        }
    });
    let request = segment_relay::proto::CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: captures.collect(),
        wait_for: segment_relay::proto::WaitFor::Delivered.into(),
    };
    let results = world
        .relay()
        .capture_batch(request)
        .await
        .expect("answered")
        .into_inner()
        .results;
    for (number, result) in results.iter().enumerate() {
        let expected = if number == 5 {
            // Only the track event names the campaign.
            [DeliveryState::Delivered, DeliveryState::DeadLettered]
        } else {
            [DeliveryState::Delivered; 2]
        };
        assert_eq!(states(&result.events), expected, "{number}");
    }
    assert_eq!(
        results[5].events[1].reason(),
        DeliveryReason::PayloadRejected
    );
    assert_eq!(results[5].events[1].last_http_status, 400);
    assert_eq!(world.sandbox.stats().events_duplicate, 0);
    world.stop().await;
}

#[tokio::test]
async fn a_refused_key_holds_events_back_until_it_is_changed() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(401),
        write_key: Some(crate::harness::WRITE_KEY.into()),
        ..Rule::default()
    });
    let mut watcher = world
        .relay()
        .watch_deliveries(WatchDeliveriesRequest {
            integration_id: "acme".into(),
            states: vec![DeliveryState::Retrying.into()],
            types: Vec::new(),
        })
        .await
        .expect("watches")
        .into_inner();
    world.accept(worked_example()).await;
    let update = watcher.next().await.expect("an update").expect("no error");
    let event = update.event.expect("an event");
    assert_eq!(event.reason(), DeliveryReason::Unauthorized);
    assert_eq!(event.last_http_status, 401);

    // The next attempt would be minutes away; new credentials end the wait.
    let change = UpdateIntegrationRequest {
        integration: Some(Integration {
            integration_id: "acme".into(),
            credentials: vec![credential(DataRegion::NonEu, "rotated-write-key-0002")],
            ..Integration::default()
        }),
        update_mask: None,
    };
    world
        .integrations()
        .update_integration(change)
        .await
        .expect("updated");
    let result = world.settled(worked_example()).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    assert_eq!(world.sandbox.entries()[0].request.write_key_hint, "0002");
    world.stop().await;
}

#[tokio::test]
async fn one_customer_in_trouble_delays_nobody_else() {
    let world = World::start().await;
    world.create(acme()).await;
    let other = Integration {
        integration_id: "other".into(),
        credentials: vec![credential(DataRegion::NonEu, "write-key-of-other-0009")],
        ..acme()
    };
    world.create(other).await;
    world.misbehave(Rule {
        status: Some(500),
        write_key: Some(crate::harness::WRITE_KEY.into()),
        ..Rule::default()
    });
    world.accept(worked_example()).await;
    let request = segment_relay::proto::CaptureRequest {
        integration_id: "other".into(),
        capture: Some(worked_example()),
        wait_for: segment_relay::proto::WaitFor::Delivered.into(),
    };
    let answer = world
        .relay()
        .capture(request)
        .await
        .expect("answered")
        .into_inner();
    let result = answer.result.expect("a result");
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    world.behave();
    world.settled(worked_example()).await;
    world.stop().await;
}

#[tokio::test]
async fn what_was_accepted_during_an_outage_is_delivered_after_a_restart() {
    let mut world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        drop_connection: Some(DropConnection::BeforeAnswer),
        ..Rule::default()
    });
    for number in 0..20 {
        world.accept(numbered(number)).await;
    }
    world.restart().await;
    world.behave();
    for number in 0..20 {
        let result = world.settled(numbered(number)).await;
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
    let stats = world.sandbox.stats();
    assert_eq!((stats.events_accepted, stats.events_duplicate), (40, 0));
    world.stop().await;
}

#[tokio::test]
async fn bodies_are_compressed_where_it_is_configured() {
    let world = World::with("[segment]\ngzip = true\n").await;
    world.create(acme()).await;
    let mut capture = worked_example();
    capture
        .attributes
        .insert("essay".into(), text(&"many words ".repeat(500)));
    let result = world.deliver(capture).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    let stats = world.sandbox.stats();
    assert_eq!(stats.gzip_requests, stats.requests);
    world.stop().await;
}

#[tokio::test]
async fn connections_are_kept_alive_and_renewed_at_their_maximum_age() {
    let world = World::with("[segment]\nmax_connection_age_ms = 1000\n").await;
    world.create(acme()).await;
    for number in 0..20 {
        world.deliver(numbered(number)).await;
    }
    let kept = world.sandbox.stats().connections_opened;
    assert!(
        kept <= 4,
        "{kept} connections for 20 requests one after the other"
    );
    let renewed = async {
        let mut number = 20;
        while world.sandbox.stats().connections_opened == kept {
            world.deliver(numbered(number)).await;
            number += 1;
        }
    };
    tokio::time::timeout(crate::harness::PATIENCE, renewed)
        .await
        .expect("renewed");
    world.stop().await;
}

#[tokio::test]
async fn an_integration_sends_no_faster_than_its_rate() {
    let world = World::with(
        "[delivery]\nmax_events_per_second = 100\nburst_events = 20\nretry_base_ms = 10\n",
    )
    .await;
    world.create(acme()).await;
    let request = segment_relay::proto::CaptureBatchRequest {
        integration_id: "acme".into(),
        captures: (0..40).map(numbered).collect(),
        wait_for: segment_relay::proto::WaitFor::Accepted.into(),
    };
    let start = std::time::Instant::now();
    world
        .relay()
        .capture_batch(request)
        .await
        .expect("accepted");
    world.arrived(80).await;
    // 20 at once, the other 60 at 100 a second.
    assert!(
        start.elapsed() >= std::time::Duration::from_millis(590),
        "{:?}",
        start.elapsed()
    );
    assert!(world.sandbox.stats().largest_batch_events <= 20);
    world.stop().await;
}

#[tokio::test]
async fn a_pause_that_segment_asks_for_holds_all_lanes_of_the_source_back() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(429),
        retry_after: Some("1".into()),
        count: Some(1),
        ..Rule::default()
    });
    let start = std::time::Instant::now();
    world.accept(numbered(0)).await;
    let refused = |stats: &segment_relay::sandbox::Stats| stats.requests > 0;
    world
        .sandbox
        .wait_for(refused, crate::harness::PATIENCE)
        .await
        .expect("an attempt");
    // Twenty people fall into all four lanes.
    for number in 1..20 {
        world.accept(numbered(number)).await;
    }
    world.arrived(2).await;
    assert!(
        start.elapsed() >= std::time::Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
    world.arrived(40).await;
    assert_eq!(world.sandbox.stats().statuses.get(&429), Some(&1));
    world.stop().await;
}
