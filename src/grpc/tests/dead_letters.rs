//! Long changes of dead letters that the outbox breaks off.

use super::*;
use crate::{
    grpc::dead_letters::DeadLetters,
    outbox::{DeadLetterFilter, OutboxError, conformance},
    proto::{
        DeliveryReason, DiscardDeadLettersRequest, ReplayDeadLettersRequest,
        server::dead_letter_service_server::DeadLetterService,
    },
    status::Outcome,
};

/// Dead letters of one integration, with a relay that notes what is done in a file.
struct World {
    outbox: Arc<SharedDouble>,
    service: DeadLetters,
    ids: Vec<String>,
    audit: tempfile::NamedTempFile,
}

impl World {
    async fn new() -> Self {
        let outbox = SharedDouble::new();
        let audit = tempfile::NamedTempFile::new().expect("a file");
        let noted = Audit::to_file(audit.path()).expect("opens");
        let service = DeadLetters(relay(&outbox, noted).await);
        for id in ["a", "b", "c"] {
            conformance::submit_one(outbox.inner(), "acme", id).await;
        }
        let leased = conformance::lease(outbox.inner(), "acme", 10).await;
        let reason = DeliveryReason::RequestRejected;
        conformance::settle(outbox.inner(), leased, |_, _| Outcome::DeadLetter {
            reason,
        })
        .await;
        let letters = outbox
            .dead_letters(DeadLetterFilter::default(), 0, 10)
            .await;
        let letters = letters.expect("listed");
        Self {
            outbox,
            service,
            ids: letters.iter().map(|one| one.id.to_string()).collect(),
            audit,
        }
    }

    async fn replay(&self) -> Result<u64, Status> {
        let message = ReplayDeadLettersRequest {
            dead_letter_ids: self.ids.clone(),
            ..ReplayDeadLettersRequest::default()
        };
        let answer = self.service.replay_dead_letters(request(message)).await?;
        Ok(answer.into_inner().event_count)
    }

    async fn discard(&self) -> Result<u64, Status> {
        let message = DiscardDeadLettersRequest {
            dead_letter_ids: self.ids.clone(),
            ..DiscardDeadLettersRequest::default()
        };
        let answer = self.service.discard_dead_letters(request(message)).await?;
        Ok(answer.into_inner().event_count)
    }

    fn noted(&self) -> String {
        std::fs::read_to_string(self.audit.path()).expect("read")
    }
}

fn lost() -> OutboxError {
    OutboxError::OutcomeUnknown("timed out".into())
}

#[tokio::test]
async fn the_answer_counts_what_was_done() {
    let world = World::new().await;
    assert_eq!(world.discard().await.expect("done"), 6);
    assert!(world.noted().contains("6 events"), "{}", world.noted());
    assert_eq!(world.replay().await.expect("nothing is left"), 0);
}

#[tokio::test]
async fn a_failure_half_way_says_how_many_were_done() {
    let world = World::new().await;
    world.outbox.pass("replay");
    world.outbox.fail("replay", OutboxError::Closed);
    let refused = world.replay().await.expect_err("broken off");
    assert_eq!(reason(&refused), "OUTBOX_UNAVAILABLE");
    let told = refused.message();
    assert!(told.starts_with("6 events were replayed, then"), "{told}");
    let noted = world.noted();
    assert!(noted.contains("6 events, then it broke off;"), "{noted}");
}

#[tokio::test]
async fn an_unknown_outcome_is_noted() {
    let world = World::new().await;
    world.outbox.fail("discard", lost());
    let refused = world.discard().await.expect_err("broken off");
    assert_eq!(reason(&refused), "OUTCOME_UNKNOWN");
    assert!(refused.message().contains("may have been applied"));
    let noted = world.noted();
    assert!(
        noted.contains("0 events, then it broke off; perhaps"),
        "{noted}"
    );
    world.outbox.pass("discard");
    world.outbox.fail("discard", lost());
    let refused = world.discard().await.expect_err("broken off");
    let told = refused.message();
    assert!(
        told.starts_with("6 events were discarded, and perhaps more"),
        "{told}"
    );
}

#[tokio::test]
async fn a_failure_at_once_is_not_noted() {
    let world = World::new().await;
    world.outbox.fail("discard", OutboxError::Closed);
    world.discard().await.expect_err("refused");
    assert_eq!(world.noted(), "");
}
