//! What an imagined Segment dislikes: events, sizes and sources.

use std::time::Duration;

use fastrand::Rng;

use super::segment::Arrival;
use crate::{event::EventType, segment::Reply};

/// How an event or a source fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Status(u16),
    Hang,
    Reset,
    Page,
    /// Another way each time.
    Mixed,
}

impl Fault {
    pub(super) fn reply(self, rng: &mut Rng) -> Reply {
        match self {
            Self::Mixed => {
                let kinds = [
                    Self::Status(500),
                    Self::Status(404),
                    Self::Hang,
                    Self::Reset,
                ];
                kinds[rng.usize(0..kinds.len())].reply(rng)
            }
            Self::Status(status) => Reply::Status {
                status,
                retry_after: None,
            },
            Self::Hang => Reply::TimedOut,
            Self::Reset => Reply::Broken {
                error: "the connection broke".to_owned(),
                sent: true,
            },
            Self::Page => Reply::NotTaken {
                status: 200,
                body: "an HTML page",
            },
        }
    }

    /// Whether an event with it may be given up before its age.
    pub(super) fn is_refusal(self) -> bool {
        matches!(self, Self::Status(400..=403 | 413))
    }
}

const OF_EVENTS: [Fault; 13] = [
    Fault::Status(400),
    Fault::Status(500),
    Fault::Status(403),
    Fault::Hang,
    Fault::Status(413),
    Fault::Reset,
    Fault::Status(402),
    Fault::Page,
    Fault::Status(404),
    Fault::Mixed,
    Fault::Status(503),
    Fault::Status(408),
    Fault::Status(421),
];

/// Some events fail whenever they come.
pub(super) fn of_event(arrival: &Arrival) -> Option<Fault> {
    let number: u64 = arrival.capture.parse().unwrap_or(0);
    let fails = number % 23 == 7 && (arrival.event == EventType::Track || number.is_multiple_of(2));
    let kind = usize::try_from(number / 23).unwrap_or(0) % OF_EVENTS.len();
    fails.then_some(OF_EVENTS[kind])
}

/// How a source fails as a whole.
pub(super) fn of_source(rng: &mut Rng) -> Fault {
    let statuses = [400, 401, 403, 404, 402, 421, 500, 503, 413];
    match rng.usize(0..13) {
        0 => Fault::Hang,
        1 => Fault::Reset,
        2 => Fault::Page,
        3 => Fault::Mixed,
        any => Fault::Status(statuses[any - 4]),
    }
}

/// A reply that asks to wait.
pub(super) fn slow_down(rng: &mut Rng, status: u16) -> Reply {
    Reply::Status {
        status,
        retry_after: Some(Duration::from_secs(rng.u64(0..400))),
    }
}
