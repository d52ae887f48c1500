//! PrivacyService: a person's data goes, and a receipt stays.

use std::{sync::Arc, time::Duration};

use prost::Message;
use tokio::sync::OwnedMutexGuard;
use tonic::{Request, Response, Status};

use super::{RelayError, Services, accept::pass};
use crate::{
    audit::Entry,
    integration::IntegrationId,
    mapping,
    outbox::{Erasure, LaneKey, OutboxError, SubjectQuery},
    permission::{Caller, Scope},
    proto::{
        EraseSubjectRequest, EraseSubjectResponse, ErasureReceipt, ListErasureReceiptsRequest,
        ListErasureReceiptsResponse, erase_subject_request::Subject,
        server::privacy_service_server::PrivacyService,
    },
    time::UnixMillis,
};

/// Captures that one transaction erases at the most.
const CHUNK: usize = 500;
/// Searches of one erasure at the most: captures of the person may keep coming.
const MAX_SEARCHES: usize = 1_000;
/// Receipts that are read at once, and for one page at the most.
const RECEIPTS: usize = 200;
const MAX_LOOKED_AT: usize = 2_000;
/// Longest wait for the requests that carry the person's events.
const HOLD_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub(super) struct Privacy(pub(super) Services);

#[tonic::async_trait]
impl PrivacyService for Privacy {
    async fn erase_subject(
        &self,
        request: Request<EraseSubjectRequest>,
    ) -> Result<Response<EraseSubjectResponse>, Status> {
        let (caller, permit) = self.0.enter(&request)?;
        let request = request.into_inner();
        let (subject, email_sha256) = parse_subject(&caller, &request)?;
        let mut receipt = ErasureReceipt {
            email_sha256,
            erase_time: Some(UnixMillis::now().to_proto()),
            caller: caller.name.clone(),
            integration_id: request.integration_id,
            ..ErasureReceipt::default()
        };
        let this = self.clone();
        let erasure = async move {
            let erased = this.erase(subject, &mut receipt).await;
            this.note(&caller, &receipt);
            erased.map(|()| receipt)
        };
        let receipt = self.0.carry_out(permit, erasure).await?;
        Ok(Response::new(EraseSubjectResponse {
            receipt: Some(receipt),
        }))
    }

    async fn list_erasure_receipts(
        &self,
        request: Request<ListErasureReceiptsRequest>,
    ) -> Result<Response<ListErasureReceiptsResponse>, Status> {
        let (caller, _permit) = self.0.enter(&request)?;
        let held = Arc::clone(&pass(&request)?.bytes);
        let request = request.into_inner();
        let size = super::page_size(request.page_size)?;
        if !request.email_sha256.is_empty() {
            check_hash(&request.email_sha256)?;
        }
        let mut before = match request.page_token.as_str() {
            "" => None,
            token => Some(token.parse().map_err(|_| {
                let rule = "not a token of this service; start again without one";
                RelayError::invalid("page_token", "INVALID_FORMAT", rule)
            })?),
        };
        let wanted = |receipt: &ErasureReceipt| {
            let hash = &request.email_sha256;
            (hash.is_empty() || *hash == receipt.email_sha256)
                && (caller.scope == Scope::All || caller.may_touch(&receipt.integration_id))
        };
        let (mut receipts, mut looked_at, mut last) = (Vec::new(), 0, false);
        // Receipts of others cost as much as those that are wanted, so a page ends after some.
        while receipts.len() < size && looked_at < MAX_LOOKED_AT && !last {
            let page = self.0.outbox.erasure_receipts(before, RECEIPTS).await;
            let page = page.map_err(RelayError::from)?;
            last = page.len() < RECEIPTS;
            for receipt in page {
                if receipts.len() == size {
                    last = false;
                    break;
                }
                looked_at += 1;
                before = receipt.receipt_id.parse().ok();
                if wanted(&receipt) {
                    receipts.push(receipt);
                }
            }
        }
        let bytes = receipts.iter().map(ErasureReceipt::encoded_len).sum();
        self.0.usage.hold_answer(&held, bytes)?;
        let token = before.filter(|_| !last).map(|id: i64| id.to_string());
        Ok(Response::new(ListErasureReceiptsResponse {
            receipts,
            next_page_token: token.unwrap_or_default(),
        }))
    }
}

impl Privacy {
    /// Notes an erasure, also one that broke off.
    fn note(&self, caller: &Caller, receipt: &ErasureReceipt) {
        let action = match (receipt.completed, receipt.receipt_id.as_str()) {
            (true, _) => "subject.erased",
            // Nothing is gone yet.
            (false, "") => return,
            (false, _) => "subject.partly_erased",
        };
        self.0.audit.note(&Entry {
            caller: &caller.name,
            action,
            integration: &receipt.integration_id,
            detail: format!(
                "receipt {}: {} waiting events, {} dead letters, {} attempts",
                receipt.receipt_id,
                receipt.waiting_event_count,
                receipt.dead_letter_count,
                receipt.attempt_count
            ),
        });
    }

    /// Erases all that was accepted before this call, until nothing is found. The
    /// receipt tells how far it came, also where it fails.
    async fn erase(
        &self,
        subject: SubjectQuery,
        receipt: &mut ErasureReceipt,
    ) -> Result<(), RelayError> {
        for _ in 0..MAX_SEARCHES {
            // A dead letter that went back into its lane meanwhile could be on its way.
            let name = subject.integration_id.as_slice();
            let name = (!name.is_empty()).then_some(name);
            let _replays = self.0.holds.hold_replays(name).await;
            let found = self.0.outbox.find_subject(subject.clone()).await?;
            // What is on its way to Segment is settled before it is counted.
            let _holds = self.hold(&found.lanes).await?;
            for captures in found.captures.chunks(CHUNK) {
                let piece = Erasure {
                    subject: subject.clone(),
                    captures: captures.to_vec(),
                    receipt: receipt.clone(),
                };
                *receipt = self.0.outbox.erase(piece).await?;
            }
            if found.captures.is_empty() {
                let end = Erasure {
                    subject,
                    captures: Vec::new(),
                    receipt: ErasureReceipt {
                        completed: true,
                        ..receipt.clone()
                    },
                };
                *receipt = self.0.outbox.erase(end).await?;
                return Ok(());
            }
        }
        let coming = "captures of the person keep coming; what came before is gone".to_owned();
        Err(OutboxError::Unavailable(coming).into())
    }

    /// Holds lanes in their order, so that two erasures never wait for each other.
    async fn hold(&self, lanes: &[LaneKey]) -> Result<Vec<OwnedMutexGuard<()>>, RelayError> {
        let hold_all = async {
            let mut holds = Vec::with_capacity(lanes.len());
            for lane in lanes {
                holds.push(self.0.holds.hold(lane).await);
            }
            holds
        };
        tokio::time::timeout(HOLD_TIMEOUT, hold_all)
            .await
            .map_err(|_| {
                let busy = "requests that carry the person's events do not end".to_owned();
                RelayError::Outbox(OutboxError::Unavailable(busy))
            })
    }
}

/// Whom a request names, and the hash for the receipt.
fn parse_subject(
    caller: &Caller,
    request: &EraseSubjectRequest,
) -> Result<(SubjectQuery, String), RelayError> {
    let integration_id = match request.integration_id.as_str() {
        // Everywhere is more than a caller with a scope may touch.
        id if !caller.may_touch(id) => return Err(RelayError::OutOfScope),
        "" => None,
        // An integration that was deleted may have left dead letters.
        id => Some(IntegrationId::new(id).ok_or_else(|| {
            let rule = "1 to 63 characters of a-z, 0-9 and hyphen; empty for all";
            RelayError::invalid("integration_id", "INVALID_FORMAT", rule)
        })?),
    };
    let (user_ids, hash) = match &request.subject {
        Some(Subject::Email(email)) => {
            let ids = mapping::user_ids(email).ok_or_else(|| {
                let rule = "not an e-mail address as in RFC 5321; or give email_sha256";
                RelayError::invalid("email", "INVALID_EMAIL", rule)
            })?;
            let hash = ids[0].clone();
            (ids, hash)
        }
        Some(Subject::EmailSha256(hash)) => {
            check_hash(hash)?;
            (vec![hash.clone()], hash.clone())
        }
        None => {
            let rule = "name the person by email or email_sha256";
            return Err(RelayError::invalid("subject", "REQUIRED", rule));
        }
    };
    let query = SubjectQuery {
        user_ids,
        integration_id,
    };
    Ok((query, hash))
}

fn check_hash(hash: &str) -> Result<(), RelayError> {
    let digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    if hash.len() == 64 && hash.bytes().all(digit) {
        return Ok(());
    }
    let rule = "64 hex digits in lower case, as in userId";
    Err(RelayError::invalid("email_sha256", "INVALID_FORMAT", rule))
}
