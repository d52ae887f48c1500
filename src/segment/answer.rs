//! What came of a request.

use std::time::Duration;

use crate::time::UnixMillis;

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// An answer, by its status line.
    Status {
        /// The HTTP status.
        status: u16,
        /// How long to wait, where the answer says so.
        retry_after: Option<Duration>,
    },
    /// A 2xx whose body shows that Segment did not take the events.
    NotTaken {
        /// The HTTP status.
        status: u16,
        /// What the body is.
        body: &'static str,
    },
    /// No answer within the time-out. Segment may have taken the events.
    TimedOut,
    /// No connection, or it broke.
    Broken {
        /// What happened, without addresses of people or keys.
        error: String,
        /// Whether the request may have reached Segment, which may have taken the events.
        sent: bool,
    },
}

/// A request's outcome with its timing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What came of it.
    pub reply: Reply,
    /// When it was started.
    pub started: UnixMillis,
    /// Until the end of the answer, or the failure.
    pub latency: Duration,
}

impl Answer {
    /// The HTTP status; 0 where no answer came.
    #[must_use]
    pub fn http_status(&self) -> u16 {
        match self.reply {
            Reply::Status { status, .. } | Reply::NotTaken { status, .. } => status,
            Reply::TimedOut | Reply::Broken { .. } => 0,
        }
    }

    /// What went wrong, as one of few words or the status (semantic conventions for
    /// HTTP, `error.type`); empty after a 2xx from Segment.
    #[must_use]
    pub fn error_type(&self) -> String {
        match self.reply {
            Reply::Status { status, .. } if (200..300).contains(&status) => String::new(),
            Reply::Status { status, .. } => status.to_string(),
            Reply::NotTaken { .. } => "not_taken".to_owned(),
            Reply::TimedOut => "timeout".to_owned(),
            Reply::Broken { .. } => "connection".to_owned(),
        }
    }

    /// What went wrong, for people; empty after a 2xx from Segment.
    #[must_use]
    pub fn error(&self) -> String {
        match &self.reply {
            Reply::Status { status, .. } if (200..300).contains(status) => String::new(),
            Reply::Status { status, .. } => {
                let known = http::StatusCode::from_u16(*status).ok();
                match known.and_then(|status| status.canonical_reason()) {
                    Some(reason) => format!("HTTP {status} {reason}"),
                    None => format!("HTTP {status}"),
                }
            }
            Reply::NotTaken { status, body } => format!("HTTP {status} with {body}"),
            Reply::TimedOut => {
                format!("no answer within {:.1} s", self.latency.as_secs_f32())
            }
            Reply::Broken { error, .. } => error.clone(),
        }
    }
}
