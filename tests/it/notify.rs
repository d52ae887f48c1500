//! Webhooks, and the audit log.

use std::{sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use segment_relay::{
    config::{Endpoint, Notify},
    integration::IntegrationId,
    metrics::Metrics,
    notice::{Happening, Notice},
    notify::{self, Notices, SenderOptions},
    outbox::{Limits, Outbox, SqliteOptions, SqliteOutbox},
    proto::{
        DeleteIntegrationRequest, Integration, TestIntegrationRequest, UpdateIntegrationRequest,
        WaitFor,
    },
    sandbox::Rule,
    secret::WebhookSecret,
    time::UnixMillis,
    vault::Vault,
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{
    harness::{PATIENCE, WRITE_KEY, World, acme, numbered},
    receiver::{Received, Receiver},
};

const SECRET: &str = "cGxhbnRlZC13ZWJob29rLXNlY3JldC1vZi10ZXN0cw==";

pub(crate) fn settings(receiver: &Receiver) -> String {
    format!(
        "[notify]\nurl = \"http://{}/hook\"\nsecret = \"whsec_{SECRET}\"\nbroken_after_ms = 100\n\
         [delivery]\nretry_base_ms = 10\nretry_max_ms = 50\nunauthorized_retry_ms = 20\n",
        receiver.address
    )
}

/// Verifies as a receiver does, by the specification and another library's HMAC.
fn verified(received: &Received) -> Value {
    let header = |name: &str| {
        let value = received.headers.get(name).expect(name);
        value.to_str().expect("ASCII").to_owned()
    };
    let (id, timestamp) = (header("webhook-id"), header("webhook-timestamp"));
    let key = STANDARD.decode(SECRET).expect("base64");
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
    let mut signed = format!("{id}.{timestamp}.").into_bytes();
    signed.extend_from_slice(&received.body);
    let expected = STANDARD.encode(ring::hmac::sign(&key, &signed));
    assert_eq!(header("webhook-signature"), format!("v1,{expected}"));
    let age = segment_relay::time::UnixMillis::now().0 / 1_000
        - timestamp.parse::<i64>().expect("seconds");
    assert!((0..60).contains(&age), "{age} s old");
    assert!(!String::from_utf8_lossy(&received.body).contains(WRITE_KEY));
    serde_json::from_slice(&received.body).expect("JSON")
}

pub(crate) fn types(received: &[Received]) -> Vec<String> {
    let kind = |one| verified(one)["type"].as_str().expect("a type").to_owned();
    received.iter().map(kind).collect()
}

#[tokio::test]
async fn every_change_of_an_integration_is_told_with_a_signature() {
    let receiver = Receiver::start().await;
    let world = World::with(&settings(&receiver)).await;
    world.create(acme()).await;
    let mut integrations = world.integrations();
    let update = UpdateIntegrationRequest {
        integration: Some(Integration {
            integration_id: "acme".into(),
            event_name: "Quiz Done".into(),
            ..Integration::default()
        }),
        update_mask: None,
    };
    integrations
        .update_integration(update)
        .await
        .expect("updated");
    let test = TestIntegrationRequest {
        integration_id: "acme".into(),
    };
    integrations.test_integration(test).await.expect("tested");

    // Segment refuses the key: parked. It takes it again: healthy.
    world.misbehave(Rule {
        status: Some(401),
        ..Rule::default()
    });
    world.accept(numbered(1)).await;
    receiver.wait_for(4).await;
    world.behave();
    receiver.wait_for(5).await;
    // Segment fails for longer than broken_after_ms.
    world.misbehave(Rule {
        status: Some(500),
        ..Rule::default()
    });
    world.accept(numbered(2)).await;
    receiver.wait_for(6).await;
    world.behave();
    receiver.wait_for(7).await;
    let delete = DeleteIntegrationRequest {
        integration_id: "acme".into(),
        ..Default::default()
    };
    integrations
        .delete_integration(delete)
        .await
        .expect("deleted");

    let received = receiver.wait_for(8).await;
    assert_eq!(
        types(&received),
        [
            "integration.created",
            "integration.updated",
            "integration.tested",
            "integration.parked",
            "integration.healthy",
            "integration.broken",
            "integration.healthy",
            "integration.deleted",
        ]
    );
    let updated = verified(&received[1]);
    assert_eq!(updated["data"]["integration_id"], "acme");
    assert_eq!(updated["data"]["changed"], "event_name");
    assert_eq!(updated["data"]["caller"], "anonymous");
    assert_eq!(verified(&received[3])["data"]["http_status"], 401);
    world.stop().await;
}

#[tokio::test]
async fn what_the_configuration_file_changes_is_told_too() {
    let receiver = Receiver::start().await;
    let filed = |name: &str| {
        format!(
            "{}[[integrations]]\nintegration_id = \"filed\"\nevent_name = \"{name}\"\n\
             [[integrations.credentials]]\ndata_region = \"eu\"\nwrite_key = \"write-key-of-the-file\"\n",
            settings(&receiver)
        )
    };
    let mut world = World::with(&filed("One")).await;
    receiver.wait_for(1).await;
    world.restart().await;
    let world = world.restart_with(&filed("Two")).await;
    receiver.wait_for(2).await;
    let world = world.restart_with(&settings(&receiver)).await;
    let received = receiver.wait_for(3).await;
    assert_eq!(
        types(&received),
        [
            "integration.created",
            "integration.updated",
            "integration.deleted",
        ]
    );
    let updated = verified(&received[1]);
    assert_eq!(updated["data"]["integration_id"], "filed");
    assert_eq!(updated["data"]["caller"], "configuration");
    assert_eq!(updated["data"]["changed"], "event_name");
    world.stop().await;
}

async fn tried_three_times(world: &World) {
    let requests = world.sandbox.stats().requests;
    let tried = world
        .sandbox
        .wait_for(|stats| stats.requests >= requests + 3, PATIENCE)
        .await;
    tried.expect("it is tried on");
}

#[tokio::test]
async fn a_source_that_failed_before_a_restart_is_told_of_once_and_when_it_works_again() {
    let receiver = Receiver::start().await;
    let mut world = World::with(&settings(&receiver)).await;
    world.create(acme()).await;
    for (status, captured) in [(401, 1), (500, 2)] {
        world.misbehave(Rule {
            status: Some(status),
            ..Rule::default()
        });
        world.accept(numbered(captured)).await;
        // Created or healthy, then parked or broken.
        receiver.wait_for(captured * 2).await;
        tried_three_times(&world).await;
        world.restart().await;
        tried_three_times(&world).await;
        world.behave();
        receiver.wait_for(captured * 2 + 1).await;
    }
    assert_eq!(
        types(&receiver.received()),
        [
            "integration.created",
            "integration.parked",
            "integration.healthy",
            "integration.broken",
            "integration.healthy",
        ]
    );
    world.stop().await;
}

#[tokio::test]
async fn a_notice_that_is_not_taken_is_kept_over_a_restart_and_sent_with_the_same_id() {
    let receiver = Receiver::start().await;
    receiver.fail_with(&[503]);
    let mut world = World::with(&settings(&receiver)).await;
    world.create(acme()).await;
    receiver.wait_for(1).await;
    world.restart().await;
    let received = receiver.wait_for(2).await;
    assert_eq!(types(&received), ["integration.created"; 2]);
    assert_eq!(
        received[0].headers["webhook-id"],
        received[1].headers["webhook-id"]
    );
    assert_eq!(received[0].body, received[1].body);
    // Taken now: nothing more comes after another start.
    world.restart().await;
    world
        .capture(numbered(1), WaitFor::Delivered)
        .await
        .expect("delivered");
    assert_eq!(receiver.received().len(), 2);
    world.stop().await;
}

#[tokio::test]
async fn a_notice_is_tried_again_and_again_but_not_for_ever() {
    let receiver = Receiver::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let mib = 1024 * 1024;
    let options = SqliteOptions {
        directory: directory.path().to_owned(),
        limits: Limits {
            max_events: 10,
            max_bytes: mib,
            max_integration_events: 10,
            max_integration_bytes: mib,
        },
        group_commit_max: 10,
        remember: Duration::from_secs(3_600),
        encrypt_payloads: false,
        metrics: Metrics::off(),
    };
    let vault = Arc::new(Vault::forgetful().expect("random"));
    let outbox = SqliteOutbox::open(&options, &vault).expect("opens");
    let outbox: Arc<dyn Outbox> = Arc::new(outbox);
    let notices = Notices::new(Arc::clone(&outbox));
    let (now, id) = (
        UnixMillis::now(),
        IntegrationId::new("acme").expect("an id"),
    );
    let days = |days: u64| UnixMillis(now.0 - days as i64 * 24 * 3_600_000);
    // The first is too old to be tried twice, the second is not.
    receiver.fail_with(&[500, 500, 404, 307, 503]);
    for (happening, time) in [(Happening::Parked, days(4)), (Happening::Broken, days(2))] {
        notices.tell(Notice::new(happening, &id, &[], time)).await;
    }
    let sender = SenderOptions {
        notify: Notify {
            url: Endpoint::new(&format!("http://{}/hook", receiver.address)).expect("a URL"),
            secret: WebhookSecret::new(&format!("whsec_{SECRET}")).expect("a secret"),
            broken_after: Duration::from_secs(300),
        },
        // 5, 30, 120 and 600 s at the most.
        haste: 10_000,
    };
    let stop = CancellationToken::new();
    let running = tokio::spawn(notify::run(notices, sender, stop.clone()));
    let received = receiver.wait_for(6).await;
    let told: Vec<_> = types(&received);
    assert_eq!(told[0], "integration.parked");
    assert_eq!(told[1..], ["integration.broken"; 5]);
    let empty = async {
        while !outbox.notices(10).await.expect("read").is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, empty)
        .await
        .expect("done with");
    assert_eq!(receiver.received().len(), 6);
    stop.cancel();
    running.await.expect("ended");
    outbox.close().await;
}

#[tokio::test]
async fn a_receivers_answer_is_not_read_and_its_redirects_are_not_followed() {
    let (receiver, elsewhere) = (Receiver::start().await, Receiver::start().await);
    receiver.answer_without_end();
    let world = World::with(&settings(&receiver)).await;
    world.create(acme()).await;
    let test = TestIntegrationRequest {
        integration_id: "acme".into(),
    };
    let mut integrations = world.integrations();
    integrations
        .test_integration(test.clone())
        .await
        .expect("tested");
    let received = receiver.wait_for(2).await;
    assert_eq!(
        types(&received),
        ["integration.created", "integration.tested"]
    );
    receiver.redirect_to(format!("http://{}/hook", elsewhere.address));
    integrations.test_integration(test).await.expect("tested");
    receiver.wait_for(3).await;
    world.stop().await;
    assert!(elsewhere.received().is_empty(), "a webhook went elsewhere");
}

#[tokio::test]
async fn the_audit_log_says_who_changed_what_without_secrets() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("audit.jsonl");
    let settings = format!(
        "[log]\naudit_file = \"{}\"\n{}[[integrations]]\nintegration_id = \"from-file\"\n\
         [[integrations.credentials]]\ndata_region = \"eu\"\nwrite_key = \"write-key-of-the-file\"\n",
        path.display(),
        crate::auth::callers()
    );
    let world = World::with(&settings).await;
    let created = segment_relay::proto::CreateIntegrationRequest {
        integration: Some(acme()),
    };
    let mut integrations = world.integrations();
    integrations
        .create_integration(crate::auth::by("all", created.clone()))
        .await
        .expect("created");
    let mut rotated = acme();
    rotated.credentials[0].write_key = "write-key-of-acme-0002".into();
    let update = UpdateIntegrationRequest {
        integration: Some(rotated),
        update_mask: None,
    };
    integrations
        .update_integration(crate::auth::by("all", update))
        .await
        .expect("updated");
    integrations
        .create_integration(crate::auth::by("read", created))
        .await
        .expect_err("refused");
    let others = segment_relay::proto::GetIntegrationRequest {
        integration_id: "acme".into(),
    };
    integrations
        .get_integration(crate::auth::by("scoped", others))
        .await
        .expect_err("refused");
    world.stop().await;

    let text = std::fs::read_to_string(&path).expect("written");
    let entries: Vec<(String, String, String, String)> = text
        .lines()
        .map(|line| {
            let entry: Value = serde_json::from_str(line).expect("JSON");
            let field = |name: &str| entry[name].as_str().unwrap_or("").to_owned();
            (
                field("caller"),
                field("action"),
                field("integration"),
                field("detail"),
            )
        })
        .collect();
    let texts =
        |row: &(String, String, String, String)| [&row.0, &row.1, &row.2].map(String::clone);
    assert_eq!(
        texts(&entries[0]),
        ["configuration", "integration.created", "from-file"]
    );
    assert_eq!(texts(&entries[1]), ["all", "integration.created", "acme"]);
    assert_eq!(texts(&entries[2]), ["all", "integration.updated", "acme"]);
    assert!(entries[2].3.contains("credentials["), "{:?}", entries[2]);
    assert_eq!(texts(&entries[3]), ["read", "call.refused", ""]);
    assert!(
        entries[3].3.contains("PERMISSION_MISSING"),
        "{:?}",
        entries[3]
    );
    assert_eq!(texts(&entries[4]), ["scoped", "call.refused", ""]);
    let refused =
        "INTEGRATION_OUT_OF_SCOPE /jebbit.segmentrelay.v1.IntegrationService/GetIntegration";
    assert!(entries[4].3.starts_with(refused), "{:?}", entries[4]);
    assert!(
        !text.contains("write-key-of") && !text.contains("planted"),
        "{text}"
    );
}
