//! The conformance suite against a real nats-server, in a directory of its own. Without
//! one the tests say so and check nothing: `tests/run` brings it, and makes its absence a failure.

mod chunks;
mod interrupted;

#[allow(dead_code, reason = "shared with tests/it")]
#[path = "../../../tests/it/nats_server.rs"]
mod server;

use std::{sync::Arc, time::Duration};

use super::{JetStreamOptions, JetStreamOutbox, Layout, NatsAuth, NatsConnection, NatsHandle};
use crate::{
    audit::Audit,
    metrics::Metrics,
    notify::Notices,
    outbox::{
        BoxFuture, DeadLetterFilter, Erasure, Outbox, OutboxError, SubjectQuery,
        conformance::{self, LIMITS, Rig},
    },
    proto::{
        Credential, DataRegion, DeliveryReason, ErasureReceipt, Integration, UnmappedAttributes,
    },
    registry::{Configured, Registry, Told},
    status::Outcome,
    vault::Vault,
};

use server::Server;

/// One outbox on a server of its own, with as many partitions as it says.
struct JetStreamRig {
    server: Server,
    vault: Arc<Vault>,
    partitions: usize,
}

impl JetStreamRig {
    fn new(partitions: usize) -> Option<Self> {
        Some(Self {
            server: Server::start()?,
            vault: Arc::new(Vault::forgetful().expect("random")),
            partitions,
        })
    }
}

fn connection(server: &Server) -> NatsConnection {
    NatsConnection {
        servers: vec![server.url()],
        auth: NatsAuth::None,
        tls: None,
    }
}

impl JetStreamRig {
    /// One relay's outbox.
    async fn relay(&self) -> JetStreamOutbox {
        self.remembering(Duration::from_secs(3_600)).await
    }

    /// One that remembers ids for so long.
    async fn remembering(&self, remember: Duration) -> JetStreamOutbox {
        let layout = Layout {
            prefix: "test".to_owned(),
            partitions: self.partitions,
            replicas: 1,
            max_bytes: None,
            cluster: None,
            tags: Vec::new(),
        };
        let handle = NatsHandle::connect(&connection(&self.server), layout)
            .await
            .expect("connects");
        handle.init().await.expect("makes its streams");
        let options = JetStreamOptions {
            limits: LIMITS,
            remember,
            encrypt_payloads: false,
            request_timeout: Duration::from_secs(2),
            metrics: Metrics::off(),
        };
        let opened = JetStreamOutbox::open(handle, options, &self.vault).await;
        opened.expect("opens")
    }
}

impl Rig for JetStreamRig {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Outbox>> {
        Box::pin(async { Arc::new(self.relay().await) as Arc<dyn Outbox> })
    }
}

/// The suite's tests, each where there is a server.
macro_rules! with_server {
    ($partitions:expr; $($name:ident)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                if let Some(rig) = super::JetStreamRig::new($partitions) {
                    $crate::outbox::conformance::$name(&rig).await;
                }
            }
        )*
    };
}

mod one_partition {
    crate::outbox::conformance::names!(with_server; 1;);
}

mod three_partitions {
    crate::outbox::conformance::names!(with_server; 3;);
}

#[tokio::test]
async fn an_erasure_waits_for_what_this_relay_sends_also_where_nobody_has_held_its_lane() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let outbox = rig.open().await;
    conformance::submit(&*outbox, vec![conformance::new_capture("acme", "a", 0)]).await;
    let in_flight = conformance::lease(&*outbox, "acme", 2).await;
    let subject = SubjectQuery {
        user_ids: vec![conformance::user_of("a")],
        integration_id: None,
    };
    let found = outbox.find_subject(subject.clone()).await.expect("found");
    let erasure = Erasure {
        subject,
        captures: found.captures,
        receipt: ErasureReceipt::default(),
    };
    let mut erased = outbox.erase(erasure);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut erased).await;
    assert!(early.is_err(), "{early:?} while a request was under way");
    conformance::settle(&*outbox, in_flight, |_, _| Outcome::Delivered).await;
    let receipt = erased.await.expect("erased");
    // Delivered before it was erased: nothing waited any more, and its history is gone.
    assert_eq!((receipt.waiting_event_count, receipt.attempt_count), (0, 1));
}

/// Ends the session of a relay as another one does that sees it stand still.
async fn end_session(outbox: &JetStreamOutbox) -> String {
    let shared = &outbox.0;
    let name = shared.sessions.name().expect("a session");
    let bucket = shared.wire.context.get_key_value(shared.layout.bucket());
    let bucket = bucket.await.expect("the bucket");
    let ended = bucket.purge_with_ttl(format!("session.{name}"), Duration::from_secs(3_600));
    ended.await.expect("ended");
    name
}

#[tokio::test]
async fn a_settlement_by_a_lease_that_was_ended_is_refused_and_changes_nothing() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let (late, next) = (rig.relay().await, rig.relay().await);
    let mut fenced = false;
    // A relay whose session has ended takes a new one within half a second, and forgets its
    // lanes. What is looked at is a settlement before it knows.
    for round in 0..20 {
        let (name, capture) = (format!("acme-{round}"), format!("c-{round}"));
        let lane = conformance::lane(&name);
        conformance::submit_one(&late, &name, &capture).await;
        let held = late.0.take_lane(&lane).await.expect("taken");
        let leased = conformance::lease(&late, &name, 2).await;
        assert_eq!(conformance::ids(&leased), [capture.as_str()]);
        let session = end_session(&late).await;
        let taken = next.0.take_lane(&lane).await.expect("taken over");
        let before = next.find(&lane.integration_id, &capture).await;

        conformance::settle(&late, leased, |_, _| Outcome::DeadLetter {
            reason: DeliveryReason::Expired,
        })
        .await;
        fenced |= late.0.sessions.name().as_deref() == Some(session.as_str());
        drop(held);
        assert_eq!(next.find(&lane.integration_id, &capture).await, before);
        let filter = DeadLetterFilter::default();
        assert_eq!(next.dead_letters(filter, 0, 10).await, Ok(Vec::new()));
        // The other one has all of it, and settles.
        let leased = conformance::lease(&next, &name, 2).await;
        assert_eq!(conformance::ids(&leased), [capture.as_str()]);
        conformance::settle(&next, leased, |_, _| Outcome::Delivered).await;
        let settled = late.find(&lane.integration_id, &capture).await;
        let settled = settled.expect("read").expect("there");
        assert!(
            settled.is_final() && settled.attempts.len() == 1,
            "{settled:?}"
        );
        drop(taken);
        if fenced {
            return;
        }
    }
    panic!("the relay always knew that its session had ended");
}

/// Ten integrations as a configuration file has them.
fn configured(unmapped: UnmappedAttributes) -> Vec<Integration> {
    let integration = |number: usize| Integration {
        integration_id: format!("acme-{number}"),
        credentials: vec![Credential {
            data_region: DataRegion::NonEu.into(),
            write_key: "a-write-key-for-tests".into(),
            ..Credential::default()
        }],
        unmapped_attributes: unmapped.into(),
        ..Integration::default()
    };
    (0..10).map(integration).collect()
}

#[tokio::test]
async fn relays_that_start_at_once_put_the_same_integrations_in_place() {
    let Some(rig) = JetStreamRig::new(1) else {
        return;
    };
    let (one, other) = (rig.open().await, rig.open().await);
    let (audit, notices) = (Audit::new(), Notices::nobody());
    let told = Told {
        audit: &audit,
        notices: &notices,
    };
    for unmapped in [UnmappedAttributes::Forward, UnmappedAttributes::Drop] {
        let wanted = configured(unmapped);
        let load = |outbox: &Arc<dyn Outbox>| {
            let configured = Configured {
                integrations: &wanted,
                version: 0,
            };
            Registry::load(Arc::clone(outbox), configured, &told, conformance::NOW)
        };
        let (own, others) = tokio::join!(load(&one), load(&other));
        let (own, others) = (own.expect("loads"), others.expect("loads"));
        for spec in &wanted {
            let id = conformance::id(&spec.integration_id);
            let [own, others] = [&own, &others].map(|one| one.get(&id).expect("known"));
            assert_eq!(own.revision, others.revision);
            assert_eq!(own.to_spec_with_secrets(), others.to_spec_with_secrets());
        }
    }
    // Whoever changes what it has read before another did is told so.
    let stored = one.integrations().await.expect("read").remove(0);
    other
        .put_integration(stored.clone(), None)
        .await
        .expect("stored");
    assert_eq!(
        one.put_integration(stored, None).await,
        Err(OutboxError::Changed(conformance::id("acme-0")))
    );
}
