//! A store whose files were damaged: refused, checked, accepted, and carried on with.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use segment_relay::{
    proto::{
        CaptureRequest, CreateIntegrationRequest, DeliveryState, WaitFor,
        integration_service_client::IntegrationServiceClient,
        segment_relay_client::SegmentRelayClient,
    },
    sandbox::Rule,
};

use crate::{
    command::{stderr, stdout},
    harness::{acme, states, worked_example},
    process::{Process, lasting_sandbox},
};

fn command(outbox: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_segment-relay"))
        .args(arguments)
        .env("SEGMENT_RELAY__SERVER__LISTEN", "127.0.0.1:0")
        .env("SEGMENT_RELAY__OUTBOX__PATH", outbox)
        .env(
            "SEGMENT_RELAY__SECRETS__KEY_FILE",
            outbox.with_extension("key"),
        )
        .stdin(Stdio::null())
        .output()
        .expect("runs")
}

async fn capture(relay: &Process, wait_for: WaitFor) -> Vec<DeliveryState> {
    let request = CaptureRequest {
        integration_id: "acme".into(),
        capture: Some(worked_example()),
        wait_for: wait_for.into(),
    };
    let answer = SegmentRelayClient::new(relay.channel.clone())
        .capture(request)
        .await;
    states(
        &answer
            .expect("accepted")
            .into_inner()
            .result
            .expect("a result")
            .events,
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_lacks_a_file_is_refused_until_the_loss_is_accepted() {
    let (sandbox, urls) = lasting_sandbox().await;
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = directory.path().join("outbox");
    let away = Rule {
        status: Some(503),
        ..Rule::default()
    };
    sandbox.set_rules(vec![away]).expect("a rule");
    let mut relay = Process::start(&outbox, &urls).await;
    let request = CreateIntegrationRequest {
        integration: Some(acme()),
    };
    IntegrationServiceClient::new(relay.channel.clone())
        .create_integration(request)
        .await
        .expect("created");
    capture(&relay, WaitFor::Accepted).await;
    let refused = command(&outbox, &["outbox", "check"]);
    assert!(
        stderr(&refused).contains("another segment-relay"),
        "{}",
        stderr(&refused)
    );
    relay.terminate().await;
    drop(relay);

    let sound = command(&outbox, &["outbox", "check"]);
    assert!(sound.status.success(), "{}", stderr(&sound));
    assert!(stdout(&sound).contains("1 captures, 2 events wait, 0 dead letters"));
    assert!(stdout(&sound).contains("nothing is damaged"));

    std::fs::remove_file(outbox.join("relay.journal-1")).expect("removed");
    let refused = command(&outbox, &["serve"]);
    assert_eq!(refused.status.code(), Some(1));
    for part in ["relay.journal-1 is missing", "outbox check --accept-damage"] {
        assert!(stderr(&refused).contains(part), "{}", stderr(&refused));
    }
    let found = command(&outbox, &["outbox", "check"]);
    assert_eq!(found.status.code(), Some(1));
    assert!(
        stdout(&found).contains("damaged: journal: "),
        "{}",
        stdout(&found)
    );
    let accepted = command(&outbox, &["outbox", "check", "--accept-damage"]);
    assert!(accepted.status.success(), "{}", stderr(&accepted));

    sandbox.set_rules(Vec::new()).expect("no rules");
    let mut relay = Process::start(&outbox, &urls).await;
    assert_eq!(
        capture(&relay, WaitFor::Delivered).await,
        [DeliveryState::Delivered; 2]
    );
    relay.terminate().await;
    drop(relay);

    // A journal without its database is no new store.
    std::fs::write(outbox.join("relay.journal-0"), b"something").expect("written");
    std::fs::remove_file(outbox.join("relay.db")).expect("removed");
    let refused = command(&outbox, &["serve"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr(&refused);
    assert!(said.contains("relay.db is missing or empty"), "{said}");
    assert!(!outbox.join("relay.db").exists());
}
