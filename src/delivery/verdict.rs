//! What an answer means for the events of a request.

use std::time::Duration;

use crate::{
    proto::DeliveryReason,
    segment::{Answer, Reply},
};

/// Shortest and longest wait that an answer may ask for: what Segment's own
/// SDKs clip it to.
const RETRY_AFTER_SECONDS: (u64, u64) = (1, 300);

/// What an answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Segment's endpoint took the events.
    Delivered,
    /// It may work later; waits grow.
    Retry(DeliveryReason),
    /// Segment asks for a pause; it does not count as a failure.
    Pause(Duration),
    /// The write key is refused; a backlog is worth more than a rotated key.
    Unauthorized,
    /// Something in the request is bad: it is split until the bad event is alone.
    Poisoned,
    /// No repetition mends it.
    Rejected,
}

/// Sorts an answer as Segment's newest Node SDK does, but for 400, 401, 403 and
/// 413, which that one drops.
#[must_use]
pub fn judge(answer: &Answer) -> Verdict {
    let (status, retry_after) = match &answer.reply {
        Reply::Status {
            status,
            retry_after,
        } => (*status, *retry_after),
        Reply::NotTaken { .. } => return Verdict::Retry(DeliveryReason::NotTaken),
        Reply::TimedOut => return Verdict::Retry(DeliveryReason::Timeout),
        Reply::Broken { .. } => return Verdict::Retry(DeliveryReason::Network),
    };
    match status {
        200..=299 => Verdict::Delivered,
        400 | 413 => Verdict::Poisoned,
        401 | 403 => Verdict::Unauthorized,
        429 => retry_after.map_or(Verdict::Retry(DeliveryReason::RateLimited), |wait| {
            let (shortest, longest) = RETRY_AFTER_SECONDS;
            Verdict::Pause(wait.clamp(Duration::from_secs(shortest), Duration::from_secs(longest)))
        }),
        408 | 410 | 460 => Verdict::Retry(DeliveryReason::ServerError),
        // 511 asks for a new OAuth token, which the relay does not use.
        501 | 505 | 511 => Verdict::Rejected,
        402..=499 => Verdict::Rejected,
        _ => Verdict::Retry(DeliveryReason::ServerError),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::UnixMillis;

    fn judged(status: u16, retry_after: Option<u64>) -> Verdict {
        judge(&Answer {
            reply: Reply::Status {
                status,
                retry_after: retry_after.map(Duration::from_secs),
            },
            started: UnixMillis(0),
            latency: Duration::ZERO,
        })
    }

    #[test]
    fn every_status_is_sorted_as_the_table_says() {
        for status in 100..=599 {
            let expected = match status {
                200..=299 => Verdict::Delivered,
                400 | 413 => Verdict::Poisoned,
                401 | 403 => Verdict::Unauthorized,
                429 => Verdict::Retry(DeliveryReason::RateLimited),
                408 | 410 | 460 => Verdict::Retry(DeliveryReason::ServerError),
                400..=499 | 501 | 505 | 511 => Verdict::Rejected,
                _ => Verdict::Retry(DeliveryReason::ServerError),
            };
            assert_eq!(judged(status, None), expected, "{status}");
        }
    }

    #[test]
    fn a_pause_is_clipped_to_what_the_sdks_take() {
        for (asked, given) in [(0, 1), (7, 7), (300, 300), (86_400, 300)] {
            assert_eq!(
                judged(429, Some(asked)),
                Verdict::Pause(Duration::from_secs(given))
            );
        }
    }
}
