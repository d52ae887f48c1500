//! Faults of the disk, injected below the real process by a small library that
//! stands between it and the C library (`faults/shim.c`).

#![cfg(target_os = "linux")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use segment_relay::proto::{
    CaptureRequest, CaptureResult, CreateIntegrationRequest, DeliveryState, WaitFor,
    integration_service_client::IntegrationServiceClient, segment_relay_client::SegmentRelayClient,
};
use tonic::{Code, Request, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;

use crate::{
    harness::{PATIENCE, acme, numbered, reason, states},
    process::{Process, lasting_sandbox},
};

/// Builds the shim; a C compiler is needed for the bundled SQLite anyway.
pub(crate) fn build_shim(directory: &Path) -> PathBuf {
    let shim = directory.join("shim.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/faults/shim.c");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&shim)
        .args([source, "-ldl"])
        .output()
        .expect("cc runs");
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    shim
}

async fn capture(relay: &Process, number: usize) -> Result<CaptureResult, Status> {
    let mut request = Request::new(CaptureRequest {
        integration_id: "acme".into(),
        capture: Some(numbered(number)),
        wait_for: WaitFor::Delivered.into(),
    });
    request.set_timeout(PATIENCE);
    let answer = SegmentRelayClient::new(relay.channel.clone())
        .capture(request)
        .await?;
    Ok(answer.into_inner().result.expect("a result"))
}

async fn delivered(relay: &Process, number: usize) -> CaptureResult {
    let result = capture(relay, number).await.expect("accepted");
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    result
}

/// Waits until the relay's health is as it should be, by its own reports.
async fn health_becomes(relay: &Process, service: &str, wanted: ServingStatus) {
    let request = HealthCheckRequest {
        service: service.into(),
    };
    let mut client = HealthClient::new(relay.channel.clone());
    let mut reports = client.watch(request).await.expect("watches").into_inner();
    let reached = async {
        while let Some(report) = reports.message().await.expect("no error") {
            if report.status() == wanted {
                return;
            }
        }
        panic!("the reports ended");
    };
    tokio::time::timeout(PATIENCE, reached)
        .await
        .expect("health changes in time");
}

async fn a_fault_is_survived(kind: &str) {
    let (sandbox, urls) = lasting_sandbox().await;
    let directory = tempfile::tempdir().expect("a directory");
    let (shim, control) = (
        build_shim(directory.path()),
        directory.path().join("control"),
    );
    let outbox = directory.path().join("outbox");
    let environment = [
        ("LD_PRELOAD", shim.as_path()),
        ("FAULT_CONTROL", control.as_path()),
    ];
    let mut relay = Process::start_with(&outbox, &urls, &environment).await;
    let message = CreateIntegrationRequest {
        integration: Some(acme()),
    };
    let mut integrations = IntegrationServiceClient::new(relay.channel.clone());
    integrations
        .create_integration(message)
        .await
        .expect("created");
    delivered(&relay, 0).await;

    std::fs::write(&control, kind).expect("the fault begins");
    for number in 1..5 {
        let refused = capture(&relay, number)
            .await
            .expect_err("nothing can be stored");
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        assert_eq!(reason(&refused), "OUTBOX_UNAVAILABLE");
        let details = refused.get_error_details();
        assert!(
            details
                .retry_info()
                .is_some_and(|retry| retry.retry_delay.is_some())
        );
    }
    for service in ["", "jebbit.segmentrelay.v1.SegmentRelay"] {
        health_becomes(&relay, service, ServingStatus::NotServing).await;
    }
    assert!(
        relay.child.try_wait().expect("asked").is_none(),
        "the process has died"
    );
    assert_eq!(
        sandbox.stats().events_accepted,
        2,
        "what was refused was sent"
    );

    std::fs::remove_file(&control).expect("the fault ends");
    for service in ["", "jebbit.segmentrelay.v1.SegmentRelay"] {
        health_becomes(&relay, service, ServingStatus::Serving).await;
    }
    for number in 0..8 {
        let result = delivered(&relay, number).await;
        assert_eq!(result.duplicate, number == 0, "{number} was half stored");
    }
    // All of it is on the disk: a new process on the same files knows it.
    relay.kill();
    let relay = Process::start(&outbox, &urls).await;
    for number in 0..8 {
        assert!(delivered(&relay, number).await.duplicate);
    }
    let stats = sandbox.stats();
    assert_eq!((stats.events_accepted, stats.events_duplicate), (16, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_captures_and_heals_by_itself() {
    a_fault_is_survived("full").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_sync_acknowledges_nothing_and_heals_by_itself() {
    a_fault_is_survived("sync").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_turns_read_only_refuses_captures_and_heals_by_itself() {
    a_fault_is_survived("readonly").await;
}
