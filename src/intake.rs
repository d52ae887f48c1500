//! From a capture on the wire to what the outbox stores: mapping -> event.
//! Pure; the clock is passed in.

use twox_hash::XxHash3_128;

use crate::{
    capture::Capture,
    event,
    integration::Integration,
    mapping::{self, CaptureFault, Mapped},
    outbox::{Content, NewCapture, shard_of},
    proto::DeliveryReason,
    time::UnixMillis,
};

/// Validates a capture, builds its events, and says what is to be stored.
///
/// # Errors
/// Everything that is wrong with the capture.
pub fn prepare(
    integration: &Integration,
    capture: Capture<'_>,
    received: UnixMillis,
) -> Result<NewCapture, CaptureFault> {
    let digest = digest(&capture);
    let mapped = mapping::map(integration, capture, received)?;
    assemble(integration, mapped, digest, received)
}

/// Builds the events of a valid capture, and says what is to be stored.
///
/// # Errors
/// An event would be too large.
pub fn assemble(
    integration: &Integration,
    mapped: Mapped<'_>,
    digest: [u8; 16],
    received: UnixMillis,
) -> Result<NewCapture, CaptureFault> {
    let events = event::build(integration.id(), &mapped).map_err(CaptureFault::Invalid)?;
    let content = match (events, &mapped.subject) {
        (Some(_), _) if !integration.enabled => Content::Skip {
            reason: DeliveryReason::IntegrationDisabled,
        },
        (Some(events), Some(subject)) => Content::Send {
            shard: shard_of(&subject.user_id),
            events,
        },
        _ => Content::Skip {
            reason: DeliveryReason::NoEmail,
        },
    };
    Ok(NewCapture {
        integration_id: integration.id().clone(),
        capture_id: mapped.capture_id.into_owned(),
        digest,
        region: mapped.region,
        mapping_version: integration.revision.mapping_version,
        revision: integration.revision.number(),
        accept_time: received,
        user_id: mapped.subject.map(|subject| subject.user_id),
        content,
        room: None,
        trace: None,
    })
}

/// Fingerprint of a capture's content. Its id is left out, so that a capture
/// whose id was derived is the same when it comes again with that id. Maps are
/// sorted, so equal content has equal bytes.
///
/// It tells repetitions from mistakes, and is no proof against a caller who looks for two
/// contents that agree: he would deceive himself alone. Outboxes blind it.
#[must_use]
pub fn digest(capture: &Capture<'_>) -> [u8; 16] {
    XxHash3_128::oneshot(&capture.canonical_content()).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{integration::Revision, proto};

    fn integration(enabled: bool) -> Integration {
        let spec = proto::Integration {
            integration_id: "acme".into(),
            credentials: vec![proto::Credential {
                data_region: proto::DataRegion::Eu.into(),
                write_key: "key".into(),
                ..Default::default()
            }],
            enabled: Some(enabled),
            ..Default::default()
        };
        let revision = Revision {
            etag: String::new(),
            mapping_version: 3,
            create_time: UnixMillis(0),
            update_time: UnixMillis(0),
            read_only: false,
            ..Revision::default()
        };
        Integration::new(&spec, revision).expect("valid")
    }

    fn capture() -> proto::Capture {
        proto::Capture {
            email: "a@example.com".into(),
            campaign_id: "c".into(),
            session_id: "s".into(),
            ..Default::default()
        }
    }

    fn prepared(enabled: bool, capture: proto::Capture) -> NewCapture {
        prepare(
            &integration(enabled),
            (&capture).into(),
            UnixMillis(1_800_000_000_000),
        )
        .expect("valid")
    }

    #[test]
    fn the_fingerprint_depends_on_all_but_the_id_and_the_time_of_receipt() {
        let first = prepared(true, capture());
        let named = proto::Capture {
            capture_id: first.capture_id.clone(),
            ..capture()
        };
        assert_eq!(prepared(true, named).digest, first.digest);
        let again = capture();
        let received = UnixMillis(1_900_000_000_000);
        let later = prepare(&integration(true), (&again).into(), received);
        assert_eq!(later.expect("valid").digest, first.digest);
        let other = proto::Capture {
            traffic_source: "x".into(),
            ..capture()
        };
        assert_ne!(prepared(true, other).digest, first.digest);
    }

    #[test]
    fn nothing_is_sent_without_an_address_or_for_a_disabled_integration() {
        let skip = |new: NewCapture| match new.content {
            Content::Skip { reason } => Some(reason),
            Content::Send { .. } => None,
        };
        assert_eq!(skip(prepared(true, capture())), None);
        assert_eq!(
            skip(prepared(false, capture())),
            Some(DeliveryReason::IntegrationDisabled)
        );
        let anonymous = proto::Capture {
            email: String::new(),
            ..capture()
        };
        assert_eq!(
            skip(prepared(false, anonymous)),
            Some(DeliveryReason::NoEmail)
        );
    }
}
