//! Integrations whose deliveries a person holds.

use segment_relay::{
    proto::{
        DeliveryState, GetIntegrationRequest, Integration, TestIntegrationRequest,
        UpdateIntegrationRequest, WaitFor,
    },
    sandbox::Rule,
};

use crate::{
    command::{stderr, stdout},
    harness::{World, acme, numbered, states},
    notify::{settings, types},
    receiver::Receiver,
};

async fn set_paused(world: &World, paused: bool) -> Integration {
    let change = UpdateIntegrationRequest {
        integration: Some(Integration {
            integration_id: "acme".into(),
            paused: Some(paused),
            ..Integration::default()
        }),
        update_mask: None,
    };
    let updated = world.integrations().update_integration(change).await;
    let updated = updated.expect("updated").into_inner();
    updated.integration.expect("an integration")
}

async fn get(world: &World) -> Integration {
    let request = GetIntegrationRequest {
        integration_id: "acme".into(),
    };
    let answer = world.integrations().get_integration(request).await;
    let answer = answer.expect("found").into_inner();
    answer.integration.expect("an integration")
}

#[tokio::test]
async fn captures_are_taken_and_wait_until_the_integration_is_resumed() {
    let mut world = World::start().await;
    assert_eq!(world.create(acme()).await.paused, Some(false));
    // One that was tried before, and one that was not.
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    world.accept(numbered(1)).await;
    let tried = |stats: &segment_relay::sandbox::Stats| stats.requests > 0;
    let tried = world.sandbox.wait_for(tried, crate::harness::PATIENCE);
    tried.await.expect("tried");
    assert_eq!(set_paused(&world, true).await.paused, Some(true));
    world.restart().await;
    world.behave();
    let requests = world.sandbox.stats().requests;
    for number in 2..4 {
        let accepted = world.accept(numbered(number)).await;
        assert_eq!(states(&accepted.events), [DeliveryState::Queued; 2]);
    }
    // A pause is no fault, and a test goes past it.
    let found = get(&world).await;
    let health = found.health.expect("health");
    assert_eq!((found.paused, found.resume_time), (Some(true), None));
    assert_eq!((health.waiting_events, health.last_error.as_str()), (6, ""));
    let test = TestIntegrationRequest {
        integration_id: "acme".into(),
    };
    let tested = world.integrations().test_integration(test).await;
    assert_eq!(
        tested.expect("tested").into_inner().results[0].http_status,
        200
    );
    assert_eq!(world.sandbox.stats().requests, requests + 1);
    world.restart().await;
    world.accept(numbered(4)).await;
    assert_eq!(world.sandbox.stats().requests, requests + 1);

    assert!(set_paused(&world, false).await.resume_time.is_some());
    for number in 1..5 {
        let sent = world.settled(numbered(number)).await;
        assert_eq!(states(&sent.events), [DeliveryState::Delivered; 2]);
    }
    world.stop().await;
}

#[tokio::test]
async fn a_pause_is_told_by_webhooks_and_comes_from_the_file_too() {
    let receiver = Receiver::start().await;
    let filed = |paused: bool| {
        format!(
            "{}[[integrations]]\nintegration_id = \"acme\"\npaused = {paused}\n\
             [[integrations.credentials]]\ndata_region = \"non_eu\"\n\
             write_key = \"key-of-the-file-01\"\n",
            settings(&receiver)
        )
    };
    let world = World::with(&filed(true)).await;
    let accepted = world.capture(numbered(1), WaitFor::Accepted).await;
    assert_eq!(
        states(&accepted.expect("taken").events),
        [DeliveryState::Queued; 2]
    );
    let world = world.restart_with(&filed(true)).await;
    assert_eq!(get(&world).await.health.expect("health").waiting_events, 2);
    assert_eq!(world.sandbox.stats().requests, 0);
    let world = world.restart_with(&filed(false)).await;
    let sent = world.settled(numbered(1)).await;
    assert_eq!(states(&sent.events), [DeliveryState::Delivered; 2]);
    let world = world.restart_with(&filed(true)).await;
    let expected = [
        "integration.created",
        "integration.updated",
        "integration.resumed",
        "integration.updated",
        "integration.paused",
    ];
    assert_eq!(types(&receiver.wait_for(5).await), expected);
    world.stop().await;
}

#[tokio::test]
async fn the_command_pauses_and_resumes_an_integration_by_name() {
    let world = World::start().await;
    world.create(acme()).await;
    let address = world.address.to_string();
    let run = |arguments: &'static [&'static str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_segment-relay"));
        command
            .args(arguments)
            .env("SEGMENT_RELAY_ADDRESS", &address);
        tokio::task::spawn_blocking(move || command.output().expect("runs"))
    };
    let paused = run(&["pause", "acme"]).await.expect("ended");
    assert!(paused.status.success(), "{}", stderr(&paused));
    assert!(stdout(&paused).starts_with("acme is paused: "));
    assert_eq!(get(&world).await.paused, Some(true));
    let resumed = run(&["resume", "acme", "--json"]).await.expect("ended");
    assert!(
        stdout(&resumed).contains("resumeTime"),
        "{}",
        stdout(&resumed)
    );
    assert_eq!(get(&world).await.paused, Some(false));
    let missing = run(&["pause", "nobody"]).await.expect("ended");
    assert_eq!(missing.status.code(), Some(1));
    assert!(stderr(&missing).contains("NOT_FOUND"));
    world.stop().await;
}
