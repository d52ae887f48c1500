//! For load tests: counts a request's events without judging them.

use memchr::memmem;

use super::fault::{Facts, Fault};
use super::{Region, Sandbox};

/// Counts the events of a request, unless it is to misbehave without.
pub(super) fn take(region: Region, body: &str, sandbox: &Sandbox) -> Option<Fault> {
    let fault = sandbox.faults.decide(&Facts {
        region,
        write_key: None,
        events: &[],
    });
    let events = count(body);
    sandbox.store.count(|stats| {
        if fault.as_ref().is_none_or(|fault| fault.process) {
            stats.events_accepted += events;
        } else {
            stats.events_refused += events;
        }
        stats.largest_batch_events = stats.largest_batch_events.max(events);
    });
    fault
}

/// Each event has one `messageId`; in a text its quotes would be escaped.
fn count(body: &str) -> u64 {
    memmem::find_iter(body.as_bytes(), b"\"messageId\":").count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_counted_and_texts_are_not() {
        assert_eq!(count(r#"{"batch":[]}"#), 0);
        let two = r#"{"batch":[{"messageId":"a","x":"\"messageId\":"},{"messageId":"b"}]}"#;
        assert_eq!(count(two), 2);
    }
}
