//! The right one is blamed: what fails in a request, a source or an endpoint costs nobody
//! else's events.

use segment_relay::{
    proto::{DeliveryReason, DeliveryState},
    sandbox::{DropConnection, Rule},
};

use crate::{
    harness::{World, acme, numbered, states},
    receiver::Receiver,
};

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
