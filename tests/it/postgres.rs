//! Relays on PostgreSQL, through gRPC: what one does holds at the others.

mod changes;
mod dead_letters;
mod moving;
mod outage;
mod watching;

use std::{collections::HashMap, path::Path, process::Command, sync::Arc, time::Duration};

use segment_relay::{
    proto::{
        Capture, CaptureBatchRequest, CaptureRequest, CaptureResult, CreateIntegrationRequest,
        DeadLetter, EraseSubjectRequest, ErasureReceipt, Integration, ListDeadLettersRequest,
        WaitFor, dead_letter_service_client::DeadLetterServiceClient,
        erase_subject_request::Subject, integration_service_client::IntegrationServiceClient,
        privacy_service_client::PrivacyServiceClient, segment_relay_client::SegmentRelayClient,
    },
    sandbox::{Outcome, Rule, Sandbox},
};
use tempfile::TempDir;
use tonic::{Request, Status, transport::Channel};

use crate::{
    harness::{PATIENCE, worked_example},
    process::{Process, lasting_sandbox},
};

/// Longer than a relay takes to look into its lanes.
const SEVERAL_POLLS: Duration = Duration::from_secs(5);

/// Relays on one outbox, with a sandbox in Segment's place. It ends before its databases, if it
/// is declared after them.
struct Fleet {
    relays: Vec<Process>,
    sandbox: Arc<Sandbox>,
    endpoints: [String; 2],
    urls: String,
    directory: TempDir,
}

impl Fleet {
    /// Makes the schema and starts relays.
    async fn start(urls: String, relays: usize) -> Self {
        let (sandbox, endpoints) = lasting_sandbox().await;
        let mut fleet = Self {
            relays: Vec::new(),
            sandbox,
            endpoints,
            urls,
            directory: tempfile::tempdir().expect("a directory"),
        };
        let made = fleet.command(&["init"]).output().expect("runs");
        assert!(made.status.success(), "{made:?}");
        for _ in 0..relays {
            fleet.relays.push(fleet.relay().await);
        }
        fleet
    }

    /// A further relay.
    async fn relay(&self) -> Process {
        let settings = [
            ("SEGMENT_RELAY__OUTBOX__KIND", Path::new("postgres")),
            ("SEGMENT_RELAY__POSTGRES__URLS", Path::new(&self.urls)),
        ];
        let outbox = self.directory.path().join("outbox");
        Process::start_with(&outbox, &self.endpoints, &settings).await
    }

    /// `segment-relay outbox`.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
        let path = self.directory.path().join("outbox");
        command
            .arg("outbox")
            .args(arguments)
            .env("SEGMENT_RELAY__POSTGRES__URLS", &self.urls)
            .env("SEGMENT_RELAY__OUTBOX__PATH", &path)
            .env(
                "SEGMENT_RELAY__SECRETS__KEY_FILE",
                path.with_extension("key"),
            );
        command
    }

    /// Drains all relays and starts as many; nothing more may be sent by that.
    async fn restart_sends_nothing(&mut self) {
        let before = self.sandbox.stats().requests;
        let count = self.relays.len();
        for mut relay in self.relays.drain(..) {
            relay.terminate().await;
        }
        for _ in 0..count {
            self.relays.push(self.relay().await);
        }
        tokio::time::sleep(SEVERAL_POLLS).await;
        assert_eq!(self.sandbox.stats().requests, before, "it was sent anew");
    }

    fn channel(&self, relay: usize) -> Channel {
        self.relays[relay].channel.clone()
    }

    async fn create(&self, relay: usize, integration: Integration) -> Result<Integration, Status> {
        create(self.channel(relay), integration).await
    }

    async fn capture(
        &self,
        relay: usize,
        capture: Capture,
        wait_for: WaitFor,
    ) -> Result<CaptureResult, Status> {
        let mut request = Request::new(CaptureRequest {
            integration_id: "acme".into(),
            capture: Some(capture),
            wait_for: wait_for.into(),
        });
        request.set_timeout(PATIENCE);
        let mut client = SegmentRelayClient::new(self.channel(relay));
        let answer = client.capture(request).await?.into_inner();
        Ok(answer.result.expect("a result"))
    }

    async fn batch(
        &self,
        relay: usize,
        captures: Vec<Capture>,
        wait_for: WaitFor,
    ) -> Vec<CaptureResult> {
        batch(self.channel(relay), captures, wait_for).await
    }

    /// All dead letters, oldest first.
    async fn letters(&self, relay: usize) -> Vec<DeadLetter> {
        letters(self.channel(relay)).await
    }

    async fn erase(&self, relay: usize, person: usize) -> ErasureReceipt {
        let mut request = Request::new(EraseSubjectRequest {
            subject: Some(Subject::Email(address(person))),
            ..EraseSubjectRequest::default()
        });
        request.set_timeout(PATIENCE);
        let mut client = PrivacyServiceClient::new(self.channel(relay));
        let answer = client.erase_subject(request).await.expect("erased");
        answer.into_inner().receipt.expect("a receipt")
    }

    /// Segment answers each request with this status.
    fn refuse(&self, status: u16) {
        self.misbehave(Rule {
            status: Some(status),
            ..Rule::default()
        });
    }

    fn misbehave(&self, rule: Rule) {
        self.sandbox.set_rules(vec![rule]).expect("a fine rule");
    }

    fn behave(&self) {
        self.sandbox.set_rules(Vec::new()).expect("no rules");
    }

    /// Waits until so many events have been taken in all, each once.
    async fn arrived(&self, events: usize) {
        let wanted = events as u64;
        let enough = |stats: &segment_relay::sandbox::Stats| stats.events_accepted >= wanted;
        let stats = self.sandbox.wait_for(enough, PATIENCE).await;
        let stats = stats.expect("the events arrive");
        assert_eq!((stats.events_accepted, stats.events_duplicate), (wanted, 0));
    }

    /// The place of each message id in the order in which they were taken.
    fn places(&self) -> HashMap<String, usize> {
        let entries = self.sandbox.entries().into_iter();
        let accepted = entries.filter(|entry| entry.outcome == Outcome::Accepted);
        let id = |(place, entry): (usize, segment_relay::sandbox::Entry)| {
            let event = entry.event();
            (
                event["messageId"].as_str().expect("an id").to_owned(),
                place,
            )
        };
        accepted.enumerate().map(id).collect()
    }
}

async fn create(channel: Channel, integration: Integration) -> Result<Integration, Status> {
    let request = CreateIntegrationRequest {
        integration: Some(integration),
    };
    let mut client = IntegrationServiceClient::new(channel);
    let answer = client.create_integration(request).await?.into_inner();
    Ok(answer.integration.expect("an integration"))
}

async fn batch(channel: Channel, captures: Vec<Capture>, wait_for: WaitFor) -> Vec<CaptureResult> {
    let mut request = Request::new(CaptureBatchRequest {
        integration_id: "acme".into(),
        captures,
        wait_for: wait_for.into(),
    });
    request.set_timeout(PATIENCE);
    let mut client = SegmentRelayClient::new(channel);
    let answer = client.capture_batch(request).await.expect("answered");
    let results = answer.into_inner().results;
    assert!(results.iter().all(|one| one.error.is_none()), "{results:?}");
    results
}

async fn letters(channel: Channel) -> Vec<DeadLetter> {
    let mut client = DeadLetterServiceClient::new(channel);
    let mut letters = Vec::new();
    let mut request = ListDeadLettersRequest {
        page_size: 1_000,
        ..ListDeadLettersRequest::default()
    };
    loop {
        let answer = client.list_dead_letters(request.clone()).await;
        let page = answer.expect("listed").into_inner();
        letters.extend(page.dead_letters);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return letters;
        }
    }
}

fn address(person: usize) -> String {
    format!("person-{person}@example.com")
}

/// A capture of this person: those of one person share a lane.
fn capture_of(person: usize, capture_id: &str) -> Capture {
    Capture {
        capture_id: capture_id.into(),
        email: address(person),
        ..worked_example()
    }
}
