//! How messages print that hold secrets or what people said: without them, wherever
//! they are printed.

use std::fmt;

use super::{
    AttributeValue, Capture, Credential, EraseSubjectRequest, PreviewedEvent, StringList,
    attribute_value, erase_subject_request,
};

/// Stands in the place of what is not printed.
const HIDDEN: &str = "[redacted]";

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("capture_id", &self.capture_id)
            .field("campaign_id", &self.campaign_id)
            .field("session_id", &self.session_id)
            .field("data_region", &self.data_region)
            .field("attributes", &self.attributes.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for AttributeValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AttributeValue").field(&self.kind).finish()
    }
}

impl fmt::Debug for attribute_value::Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl fmt::Debug for StringList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("data_region", &self.data_region)
            .field("write_key", &HIDDEN)
            .field("write_key_hint", &self.write_key_hint)
            .finish()
    }
}

impl fmt::Debug for EraseSubjectRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EraseSubjectRequest")
            .field("subject", &self.subject)
            .field("integration_id", &self.integration_id)
            .finish()
    }
}

impl fmt::Debug for erase_subject_request::Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl fmt::Debug for PreviewedEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreviewedEvent")
            .field("type", &self.r#type)
            .field("message_id", &self.message_id)
            .field("json", &HIDDEN)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{CaptureRequest, Integration, PreviewCaptureResponse};

    #[test]
    fn no_message_prints_a_secret_or_what_people_said() {
        const PLANTED: &str = "planted@example.com";
        let value = AttributeValue {
            kind: Some(attribute_value::Kind::ListValue(StringList {
                values: vec![PLANTED.into()],
            })),
        };
        let printed = format!(
            "{:?} {:?} {:?} {:?}",
            CaptureRequest {
                capture: Some(Capture {
                    email: PLANTED.into(),
                    attributes: [("a".to_owned(), value)].into(),
                    ..Capture::default()
                }),
                ..CaptureRequest::default()
            },
            Integration {
                credentials: vec![Credential {
                    write_key: PLANTED.into(),
                    ..Credential::default()
                }],
                ..Integration::default()
            },
            EraseSubjectRequest {
                subject: Some(erase_subject_request::Subject::Email(PLANTED.into())),
                ..EraseSubjectRequest::default()
            },
            PreviewCaptureResponse {
                events: vec![PreviewedEvent {
                    json: PLANTED.into(),
                    ..PreviewedEvent::default()
                }],
                ..PreviewCaptureResponse::default()
            }
        );
        assert!(!printed.contains(PLANTED), "{printed}");
    }
}
