//! What an outbox encrypts before it stores it, and what it blinds: values that
//! tell nothing themselves but could be guessed, such as the hash of an address.

use std::sync::Arc;

use prost::Message;

use super::{LeasedCapture, NewCapture, OutboxError, StoredIntegration};
use crate::{
    event::EventType,
    integration::IntegrationId,
    proto::ErasureReceipt,
    vault::{Blinder, UnsealError, Vault, VaultError, sealed_under},
};

/// Kinds of blinded values.
const DIGEST: u8 = 1;
const SUBJECT: u8 = 2;

/// Seals and blinds what goes into a store, and unseals what comes out.
#[derive(Clone, Debug)]
pub(super) struct Sealing {
    pub(super) vault: Arc<Vault>,
    blinder: Blinder,
    /// Whether payloads are sealed. Those that are sealed already are unsealed in
    /// any case.
    pub(super) payloads: bool,
}

/// A capture as it is stored.
#[derive(Debug)]
pub(super) struct SealedCapture {
    /// With blinded digest and, where that is wanted, sealed payloads.
    pub(super) capture: NewCapture,
    /// Whose data it is, blinded.
    pub(super) subject: Option<i64>,
}

fn failed(error: VaultError) -> OutboxError {
    OutboxError::Unavailable(error.to_string())
}

fn unreadable(what: &str, error: UnsealError) -> OutboxError {
    OutboxError::Unavailable(format!("{what}: {error}"))
}

/// Where a payload belongs.
pub(super) fn payload_place(id: &IntegrationId, capture_id: &str, event: EventType) -> String {
    format!(
        "payload/{}/{capture_id}/{}",
        id.as_str(),
        event.to_proto() as i32
    )
}

impl Sealing {
    /// `index_key` has to stay the same for as long as what it blinded is kept.
    pub(super) fn new(vault: Arc<Vault>, index_key: &[u8; 32], payloads: bool) -> Self {
        Self {
            vault,
            blinder: Blinder::new(index_key),
            payloads,
        }
    }

    /// A capture as it is stored.
    pub(super) fn capture(&self, mut capture: NewCapture) -> Result<SealedCapture, OutboxError> {
        capture.digest = self.digest(&capture.digest);
        let subject = capture.user_id.take().map(|id| self.subject(&id));
        if self.payloads
            && let super::Content::Send { events, .. } = &mut capture.content
        {
            let (id, capture_id) = (&capture.integration_id, &capture.capture_id);
            let seal = |event, payload: &[u8]| {
                let place = payload_place(id, capture_id, event);
                self.vault.seal(&place, payload).map_err(failed)
            };
            events.identify = seal(EventType::Identify, &events.identify)?;
            events.track = seal(EventType::Track, &events.track)?;
        }
        Ok(SealedCapture { capture, subject })
    }

    /// A fingerprint, blinded.
    pub(super) fn digest(&self, digest: &[u8; 16]) -> [u8; 16] {
        let mut half = [0; 16];
        half.copy_from_slice(&self.blinder.blind(DIGEST, digest)[..16]);
        half
    }

    /// The number under which a person's captures are found.
    pub(super) fn subject(&self, user_id: &str) -> i64 {
        let blinded = self.blinder.blind(SUBJECT, user_id.as_bytes());
        let mut number = [0; 8];
        number.copy_from_slice(&blinded[..8]);
        i64::from_le_bytes(number)
    }

    /// Unseals the payloads of a leased capture; one that can't be is damaged.
    ///
    /// # Errors
    /// Its key is not known here: another relay has one that this one lacks, so that the
    /// capture is sound, and waits for it.
    pub(super) fn leased(&self, capture: &mut LeasedCapture) -> Result<(), OutboxError> {
        if capture.damaged {
            return Ok(());
        }
        let record = &capture.record;
        let (id, capture_id) = (&record.integration_id, &record.capture_id);
        let payloads = [
            (EventType::Identify, &mut capture.identify),
            (EventType::Track, &mut capture.track),
        ];
        for (event, payload) in payloads {
            let Some(sealed) = payload.as_mut().filter(|it| sealed_under(it).is_some()) else {
                continue;
            };
            match self
                .vault
                .unseal(&payload_place(id, capture_id, event), sealed)
            {
                Ok(opened) => *sealed = opened.into(),
                Err(error @ UnsealError::UnknownKey(_)) => {
                    return Err(unreadable("a payload that waits", error));
                }
                Err(error) => {
                    tracing::error!(integration = %id, capture_id, %error, "a payload is not sent");
                    capture.damaged = true;
                }
            }
        }
        Ok(())
    }

    /// An integration with its write keys.
    pub(super) fn integration(&self, spec: &StoredIntegration) -> Result<Vec<u8>, OutboxError> {
        let id = super::stored_id(spec);
        let id = id
            .as_ref()
            .map_or(spec.integration_id.as_str(), |id| id.as_str());
        let place = integration_place(id);
        let plain = zeroize::Zeroizing::new(spec.encode_to_vec());
        self.vault.seal(&place, &plain).map_err(failed)
    }

    /// The same back.
    pub(super) fn open_integration(
        &self,
        id: &str,
        sealed: &[u8],
    ) -> Result<StoredIntegration, OutboxError> {
        let plain = self
            .vault
            .unseal(&integration_place(id), sealed)
            .map_err(|error| unreadable("a stored integration", error))?;
        let plain = zeroize::Zeroizing::new(plain);
        Message::decode(plain.as_slice())
            .map_err(|error| OutboxError::Unavailable(format!("a damaged integration: {error}")))
    }

    /// A receipt of an erasure.
    pub(super) fn receipt(&self, receipt: &ErasureReceipt) -> Result<Vec<u8>, OutboxError> {
        let place = receipt_place(&receipt.receipt_id);
        self.vault
            .seal(&place, &receipt.encode_to_vec())
            .map_err(failed)
    }

    /// The same back.
    pub(super) fn open_receipt(
        &self,
        id: &str,
        sealed: &[u8],
    ) -> Result<ErasureReceipt, OutboxError> {
        let plain = self
            .vault
            .unseal(&receipt_place(id), sealed)
            .map_err(|error| unreadable("a stored receipt", error))?;
        Message::decode(plain.as_slice())
            .map_err(|error| OutboxError::Unavailable(format!("a damaged receipt: {error}")))
    }
}

pub(super) fn integration_place(id: &str) -> String {
    format!("integration/{id}")
}

pub(super) fn receipt_place(id: &str) -> String {
    format!("erasure/{id}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::{Content, conformance::new_capture};

    fn sealing(vault: Arc<Vault>) -> Sealing {
        Sealing::new(vault, &[7; 32], true)
    }

    fn leased(identify: Vec<u8>) -> LeasedCapture {
        let record = crate::status::CaptureRecord {
            integration_id: IntegrationId::new("acme").expect("valid"),
            capture_id: "a".to_owned(),
            region: crate::region::Region::Eu,
            mapping_version: 1,
            accept_time: crate::time::UnixMillis(1),
            queue_time: crate::time::UnixMillis(1),
            identify: crate::status::EventStatus::new(crate::status::State::Queued),
            track: crate::status::EventStatus::new(crate::status::State::Queued),
            attempts: Vec::new(),
            trace: None,
        };
        LeasedCapture {
            sequence: 1,
            record: Arc::new(record),
            identify: Some(identify.into()),
            track: None,
            damaged: false,
        }
    }

    #[test]
    fn a_payload_under_a_key_of_another_relay_waits_and_a_damaged_one_is_given_up() {
        let vault = || Arc::new(Vault::forgetful().expect("random"));
        let (own, other) = (sealing(vault()), sealing(vault()));
        let sealed = own.capture(new_capture("acme", "a", 0)).expect("sealed");
        let Content::Send { events, .. } = sealed.capture.content else {
            panic!("it has events");
        };
        let mut here = leased(events.identify.clone());
        own.leased(&mut here).expect("unsealed");
        assert!(!here.damaged && here.identify.is_some_and(|plain| plain.starts_with(b"{")));

        let mut there = leased(events.identify.clone());
        let error = other.leased(&mut there).expect_err("no such key");
        let wanted = format!("under the key {}", own.vault.current());
        assert!(error.to_string().contains(&wanted), "{error}");
        assert!(!there.damaged);

        let mut changed = events.identify;
        *changed.last_mut().expect("bytes") ^= 1;
        let mut changed = leased(changed);
        own.leased(&mut changed).expect("not its key's fault");
        assert!(changed.damaged);
    }
}
