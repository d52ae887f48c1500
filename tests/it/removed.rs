//! Integrations that leave the configuration file.

use segment_relay::{
    proto::{PreviewCaptureRequest, WaitFor},
    sandbox::Rule,
};
use tonic::Code;

use crate::{
    harness::{PATIENCE, World, numbered, reason},
    integrations::get,
    notify::{settings, types},
    receiver::Receiver,
};

#[tokio::test]
async fn an_integration_that_leaves_the_file_takes_nothing_new_and_goes_when_nothing_waits() {
    let receiver = Receiver::start().await;
    let without = settings(&receiver);
    let file = format!(
        "{without}[[integrations]]\nintegration_id = \"acme\"\n\
         [[integrations.credentials]]\ndata_region = \"non_eu\"\n\
         write_key = \"key-of-the-file-01\"\n"
    );
    let world = World::with(&file).await;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    world.accept(numbered(1)).await;
    let mut world = world.restart_with(&without).await;
    for _ in 0..2 {
        let captured = world.capture(numbered(2), WaitFor::Accepted).await;
        let preview = PreviewCaptureRequest {
            integration_id: "acme".into(),
            capture: Some(numbered(2)),
        };
        let previewed = world.relay().preview_capture(preview).await.map(|_| ());
        for refused in [captured.map(|_| ()), previewed] {
            let refused = refused.expect_err("refused");
            assert_eq!(refused.code(), Code::NotFound);
            assert_eq!(reason(&refused), "INTEGRATION_NOT_FOUND");
            let why = "removed from the configuration file";
            assert!(refused.message().contains(why), "{refused}");
        }
        // What waits can be looked at.
        let waiting = world.status("capture-1").await.expect("found");
        assert_eq!(waiting.result.expect("a result").events.len(), 2);
        let found = get(&world, "acme").await.expect("still there");
        assert!(found.removal_time.is_some() && found.read_only);
        world.restart().await;
    }
    world.behave();
    let gone = async {
        while get(&world, "acme").await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("gone");
    let sent = world.sandbox.entries();
    let delivered = sent
        .iter()
        .rev()
        .find(|one| one.request.status == Some(200));
    let hint = &delivered.expect("delivered").request.write_key_hint;
    assert_eq!(hint, "e-01");
    let told = async {
        loop {
            let told = types(&receiver.wait_for(3).await);
            if told.iter().any(|one| one == "integration.deleted") {
                return told;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let told = tokio::time::timeout(PATIENCE, told).await.expect("told");
    for expected in ["integration.removed", "integration.deleted"] {
        let count = told.iter().filter(|one| *one == expected).count();
        assert_eq!(count, 1, "{told:?}");
    }
    world.restart().await;
    assert!(get(&world, "acme").await.is_err());
    world.stop().await;
}
