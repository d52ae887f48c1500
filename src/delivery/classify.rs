//! What an answer may mean for the events of a request, by itself. What it does mean takes
//! evidence: whether the event was alone, and whether others were taken (`lane`).

use std::time::Duration;

use crate::{
    proto::DeliveryReason,
    segment::{Answer, Reply},
};

/// Shortest and longest wait that an answer may ask for: what Segment's own
/// SDKs clip it to.
const RETRY_AFTER_SECONDS: (u64, u64) = (1, 300);

/// What an answer may mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Segment's endpoint took the events.
    Delivered,
    /// Segment asks the source for a pause; it does not count as a failure.
    Pause(Duration),
    /// It failed, and no event is to blame.
    Hold(DeliveryReason),
    /// It failed, and one of the events may be to blame.
    Fault(FaultKind, Failure),
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What its events are told.
    pub reason: DeliveryReason,
    /// The shortest wait that the answer asks for.
    pub retry_after: Option<Duration>,
}

/// What a fault is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A repetition may mend it.
    Transient,
    /// There was no answer in time: there may have been too many events.
    TimedOut,
    /// It did not reach what takes events: a wrong path or connection, or a firewall that hides
    /// why it dislikes an event.
    Misrouted,
    /// No repetition mends it.
    Final,
    /// The write key is refused, or a firewall dislikes an event.
    Key,
}

impl FaultKind {
    /// Whether the request was refused for good.
    #[must_use]
    pub fn is_refusal(self) -> bool {
        matches!(self, Self::Final | Self::Key)
    }
}

/// Sorts an answer. Statuses that Segment's newest Node SDK repeats are transient; the others
/// are final, except statuses that no event is given up for.
#[must_use]
pub fn classify(answer: &Answer) -> Disposition {
    let fault = |kind, reason, retry_after| {
        let failure = Failure {
            reason,
            retry_after,
        };
        Disposition::Fault(kind, failure)
    };
    let transient = FaultKind::Transient;
    match &answer.reply {
        Reply::Status {
            status,
            retry_after,
        } => of_status(*status, retry_after.map(clipped)),
        Reply::NotTaken { .. } => fault(transient, DeliveryReason::NotTaken, None),
        Reply::TimedOut => fault(FaultKind::TimedOut, DeliveryReason::Timeout, None),
        Reply::Broken { sent: true, .. } => fault(transient, DeliveryReason::Network, None),
        Reply::Broken { sent: false, .. } => Disposition::Hold(DeliveryReason::Network),
    }
}

fn of_status(status: u16, retry_after: Option<Duration>) -> Disposition {
    let (kind, reason) = match status {
        200..=299 => return Disposition::Delivered,
        429 => {
            let limited = Disposition::Hold(DeliveryReason::RateLimited);
            return retry_after.map_or(limited, Disposition::Pause);
        }
        404 | 421 => (FaultKind::Misrouted, DeliveryReason::ServerError),
        400 | 413 => (FaultKind::Final, DeliveryReason::PayloadRejected),
        401 | 403 => (FaultKind::Key, DeliveryReason::Unauthorized),
        408 | 410 | 460 => (FaultKind::Transient, DeliveryReason::ServerError),
        // 511 asks for a new OAuth token, which the relay does not use.
        402..=499 | 501 | 505 | 511 => (FaultKind::Final, DeliveryReason::RequestRejected),
        _ => (FaultKind::Transient, DeliveryReason::ServerError),
    };
    // What is refused for good is not asked to come again.
    let retry_after = retry_after.filter(|_| !kind.is_refusal());
    Disposition::Fault(
        kind,
        Failure {
            reason,
            retry_after,
        },
    )
}

fn clipped(wait: Duration) -> Duration {
    let (shortest, longest) = RETRY_AFTER_SECONDS;
    wait.clamp(Duration::from_secs(shortest), Duration::from_secs(longest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::UnixMillis;

    fn classified(status: u16, retry_after: Option<u64>) -> Disposition {
        classify(&Answer {
            reply: Reply::Status {
                status,
                retry_after: retry_after.map(Duration::from_secs),
            },
            started: UnixMillis(0),
            latency: Duration::ZERO,
        })
    }

    /// The kind of fault and the reason.
    fn sorted(status: u16) -> (Option<FaultKind>, DeliveryReason) {
        match classified(status, None) {
            Disposition::Delivered | Disposition::Pause(_) => (None, DeliveryReason::Unspecified),
            Disposition::Hold(reason) => (None, reason),
            Disposition::Fault(kind, failure) => (Some(kind), failure.reason),
        }
    }

    #[test]
    fn every_status_is_sorted_as_the_table_says() {
        use DeliveryReason as Reason;
        for status in 100..=599 {
            let expected = match status {
                200..=299 => (None, Reason::Unspecified),
                404 | 421 => (Some(FaultKind::Misrouted), Reason::ServerError),
                429 => (None, Reason::RateLimited),
                400 | 413 => (Some(FaultKind::Final), Reason::PayloadRejected),
                401 | 403 => (Some(FaultKind::Key), Reason::Unauthorized),
                408 | 410 | 460 => (Some(FaultKind::Transient), Reason::ServerError),
                400..=499 | 501 | 505 | 511 => (Some(FaultKind::Final), Reason::RequestRejected),
                _ => (Some(FaultKind::Transient), Reason::ServerError),
            };
            assert_eq!(sorted(status), expected, "{status}");
        }
    }

    #[test]
    fn the_asked_wait_is_clipped_and_kept_where_a_repetition_is_worth_it() {
        for (asked, given) in [(0, 1), (7, 7), (300, 300), (86_400, 300)] {
            let given = Duration::from_secs(given);
            assert_eq!(classified(429, Some(asked)), Disposition::Pause(given));
            for status in [404, 408, 421, 460, 500, 503] {
                let Disposition::Fault(_, failure) = classified(status, Some(asked)) else {
                    panic!("{status} is no failure");
                };
                assert_eq!(failure.retry_after, Some(given), "{status}");
            }
        }
        let Disposition::Fault(_, failure) = classified(400, Some(7)) else {
            panic!("400 is no fault");
        };
        assert_eq!(failure.retry_after, None);
    }
}
