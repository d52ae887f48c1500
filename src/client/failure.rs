//! Why a client command failed, for people.

use std::fmt::Write;

use tonic::Status;
use tonic_types::StatusExt;

use super::render::plain;

/// Why a client command failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The flags or the file are wrong: exit code 2.
    #[error("{0}")]
    Input(String),
    /// The relay could not be reached.
    #[error("no connection to {address}: {cause}")]
    Connect {
        /// The address that was tried.
        address: String,
        /// What the system said.
        cause: String,
    },
    /// The relay refused the call.
    #[error("{}", status_text(.0))]
    Call(Box<Status>),
    /// A file or the output failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// An answer that is not as the contract has it.
    #[error("the relay's answer is incomplete: {0}")]
    Answer(String),
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        Self::Call(Box::new(status))
    }
}

impl ClientError {
    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Input(_)) { 2 } else { 1 }
    }
}

/// A failed call with the details that it came with.
#[must_use]
pub fn status_text(status: &Status) -> String {
    let mut text = format!("{}: {}", code_name(status), plain(status.message()));
    let details = status.get_error_details();
    let violations = details
        .bad_request()
        .map(|bad| bad.field_violations.as_slice());
    for violation in violations.unwrap_or_default() {
        let (field, rule) = (plain(&violation.field), plain(&violation.description));
        let _ = write!(text, "\n  {field}: {rule} ({})", plain(&violation.reason));
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        let _ = write!(text, "\n  try again in {:.1} s", delay.as_secs_f32());
    }
    text
}

/// The code's name in the gRPC documentation, e.g. `INVALID_ARGUMENT`.
fn code_name(status: &Status) -> String {
    let mut name = String::new();
    for c in format!("{:?}", status.code()).chars() {
        if c.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.extend(c.to_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic::Code;
    use tonic_types::{ErrorDetails, FieldViolation};

    use super::*;

    #[test]
    fn a_failed_call_names_its_code_its_fields_and_when_to_try_again() {
        let mut details = ErrorDetails::new();
        details.set_bad_request(vec![FieldViolation {
            field: "capture.email".into(),
            description: "not an address".into(),
            reason: "INVALID_EMAIL".into(),
            localized_message: None,
        }]);
        details.set_retry_info(Some(Duration::from_millis(1_500)));
        let status = Status::with_error_details(Code::InvalidArgument, "bad\u{7}", details);
        assert_eq!(
            status_text(&status),
            "INVALID_ARGUMENT: bad\\u{7}\n  capture.email: not an address (INVALID_EMAIL)\n  \
             try again in 1.5 s"
        );
    }
}
