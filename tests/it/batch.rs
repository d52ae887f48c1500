use segment_relay::{
    proto::{
        Capture, CaptureBatchRequest, CaptureBatchResponse, CaptureResult, DeliveryState, WaitFor,
    },
    sandbox::Rule,
};
use tonic::{Code, Status};

use crate::harness::{World, acme, numbered, states, violations};

async fn send(
    world: &World,
    captures: Vec<Capture>,
    wait_for: WaitFor,
) -> Result<CaptureBatchResponse, Status> {
    let request = CaptureBatchRequest {
        integration_id: "acme".into(),
        captures,
        wait_for: wait_for.into(),
    };
    Ok(world.relay().capture_batch(request).await?.into_inner())
}

#[tokio::test]
async fn each_capture_has_its_result_and_a_bad_one_fails_alone() {
    let world = World::start().await;
    world.create(acme()).await;
    let bad = Capture {
        email: "nobody".into(),
        ..numbered(1)
    };
    let captures = vec![numbered(0), bad, numbered(2), numbered(0)];
    let results = send(&world, captures, WaitFor::Delivered)
        .await
        .expect("answered")
        .results;
    let ids: Vec<_> = results
        .iter()
        .map(|result| result.capture_id.as_str())
        .collect();
    assert_eq!(ids, ["capture-0", "capture-1", "capture-2", "capture-0"]);
    assert_eq!(states(&results[0].events), [DeliveryState::Delivered; 2]);
    assert_eq!(states(&results[2].events), [DeliveryState::Delivered; 2]);
    assert!(results[3].duplicate && !results[0].duplicate);
    let error = results[1].error.as_ref().expect("an error");
    assert_eq!(
        (error.code, error.reason.as_str()),
        (Code::InvalidArgument as i32, "INVALID_CAPTURE")
    );
    assert_eq!(error.violations[0].field, "capture.email");
    assert!(results[1].events.is_empty());
    assert_eq!(world.sandbox.stats().events_accepted, 4);
    world.stop().await;
}

#[tokio::test]
async fn a_batch_of_a_thousand_is_taken_and_more_is_refused_whole() {
    let world = World::start().await;
    world.create(acme()).await;
    for captures in [Vec::new(), (0..1_001).map(numbered).collect()] {
        let refused = send(&world, captures, WaitFor::Accepted)
            .await
            .expect_err("refused");
        assert_eq!(
            violations(&refused),
            [("captures".into(), "OUT_OF_RANGE".into())]
        );
    }
    let taken = send(
        &world,
        (0..1_000).map(numbered).collect(),
        WaitFor::Delivered,
    )
    .await;
    let results = taken.expect("taken").results;
    assert!(
        results
            .iter()
            .all(|r| states(&r.events) == [DeliveryState::Delivered; 2])
    );
    let stats = world.sandbox.stats();
    assert_eq!((stats.events_accepted, stats.events_duplicate), (2_000, 0));
    // Captures of four lanes, sent while the first requests are on their way.
    assert!(
        stats.requests <= 40,
        "{} requests for 2,000 events",
        stats.requests
    );
    assert!(stats.largest_batch_events <= 2_500 && stats.largest_batch_bytes < 500_000);
    world.stop().await;
}

#[tokio::test]
async fn a_full_backlog_refuses_some_captures_of_a_batch_and_stores_the_others() {
    let world = World::with("[outbox]\nmax_integration_events = 4\n").await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(500),
        ..Rule::default()
    });
    let results = send(&world, (0..3).map(numbered).collect(), WaitFor::Accepted).await;
    let results = results.expect("answered").results;
    assert!(results[0].error.is_none() && results[1].error.is_none());
    let error = results[2].error.as_ref().expect("no room");
    assert_eq!(error.code, Code::ResourceExhausted as i32);
    assert_eq!(error.reason, "INTEGRATION_BACKLOG_FULL");
    let unary = world
        .capture(numbered(3), WaitFor::Accepted)
        .await
        .expect_err("no room");
    assert_eq!(unary.code(), Code::ResourceExhausted);
    world.behave();
    world.settled(numbered(0)).await;
    world.settled(numbered(1)).await;
    world.deliver(numbered(3)).await;
    world.stop().await;
}

#[tokio::test]
async fn while_the_backlog_is_full_only_what_is_known_or_needs_no_room_is_read() {
    let world = World::with("[outbox]\nmax_integration_events = 4\n").await;
    if !world.is_embedded() {
        return;
    }
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(500),
        ..Rule::default()
    });
    let refusals = |results: &[CaptureResult]| {
        let reason = |one: &CaptureResult| one.error.as_ref().map(|error| error.reason.clone());
        results.iter().map(reason).collect::<Vec<_>>()
    };
    let full = || Some("INTEGRATION_BACKLOG_FULL".to_owned());
    let results = send(&world, (0..3).map(numbered).collect(), WaitFor::Accepted).await;
    let results = results.expect("answered").results;
    assert_eq!(refusals(&results), [None, None, full()]);

    // The rules of the schema are for those that find room.
    let invalid = Capture {
        campaign_id: String::new(),
        ..numbered(4)
    };
    let without_events = Capture {
        email: String::new(),
        ..numbered(5)
    };
    let captures = vec![numbered(3), invalid.clone(), numbered(1), without_events];
    let results = send(&world, captures, WaitFor::Accepted).await;
    let results = results.expect("answered").results;
    assert_eq!(refusals(&results), [full(), full(), None, None]);
    assert!(results[2].duplicate);
    assert_eq!(states(&results[3].events), [DeliveryState::Skipped; 2]);

    world.behave();
    for number in [0, 1] {
        world.settled(numbered(number)).await;
    }
    let results = send(&world, vec![numbered(3), invalid], WaitFor::Accepted).await;
    let results = results.expect("answered").results;
    assert_eq!(
        refusals(&results),
        [None, Some("INVALID_CAPTURE".to_owned())]
    );
    world.stop().await;
}
