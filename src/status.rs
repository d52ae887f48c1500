//! What becomes of an event: its states, and the one function that moves it
//! from one to the next.
//!
//! | from                | delivered | retry    | dead letter  |
//! | ------------------- | --------- | -------- | ------------ |
//! | Queued, Retrying    | Delivered | Retrying | DeadLettered |
//! | Delivered, Skipped, DeadLettered | – | –   | –            |
//!
//! A replay by hand moves DeadLettered back to Queued. A skipped capture gives way to a new one
//! with its id ([`CaptureRecord::binds_id`]).

use std::time::Duration;

use crate::{
    event::EventType,
    integration::IntegrationId,
    proto::{DeliveryReason, DeliveryState},
    region::Region,
    time::UnixMillis,
    trace::TraceLink,
};

/// Longest error text that is kept, in bytes.
const MAX_ERROR_BYTES: usize = 256;
/// Attempts that are kept of one capture: the first, and the newest of the others.
pub const MAX_ATTEMPTS_KEPT: usize = 17;

/// Where an event is on its way to Segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Stored, not tried yet.
    Queued,
    /// Tried without success; will be tried again.
    Retrying {
        /// Why the last attempt failed.
        reason: DeliveryReason,
        /// Not tried again before.
        next_attempt: UnixMillis,
    },
    /// Segment's endpoint answered 2xx.
    Delivered {
        /// When it answered.
        at: UnixMillis,
    },
    /// There was nothing to send.
    Skipped {
        /// Why.
        reason: DeliveryReason,
    },
    /// Refused for good or given up.
    DeadLettered {
        /// Why.
        reason: DeliveryReason,
        /// When.
        at: UnixMillis,
    },
}

impl State {
    /// Whether no attempt will follow by itself.
    #[must_use]
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Retrying { .. })
    }

    /// The schema's state.
    #[must_use]
    pub fn to_proto(self) -> DeliveryState {
        match self {
            Self::Queued => DeliveryState::Queued,
            Self::Retrying { .. } => DeliveryState::Retrying,
            Self::Delivered { .. } => DeliveryState::Delivered,
            Self::Skipped { .. } => DeliveryState::Skipped,
            Self::DeadLettered { .. } => DeliveryState::DeadLettered,
        }
    }

    /// Its name in metrics and spans.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Retrying { .. } => "retrying",
            Self::Delivered { .. } => "delivered",
            Self::Skipped { .. } => "skipped",
            Self::DeadLettered { .. } => "dead_lettered",
        }
    }

    /// Why the event is in this state; unspecified where there is nothing to explain.
    #[must_use]
    pub fn reason(self) -> DeliveryReason {
        match self {
            Self::Queued | Self::Delivered { .. } => DeliveryReason::Unspecified,
            Self::Retrying { reason, .. }
            | Self::Skipped { reason }
            | Self::DeadLettered { reason, .. } => reason,
        }
    }
}

/// What is decided about an event after an attempt, or without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Segment took it.
    Delivered,
    /// It is tried again.
    Retry {
        /// Why the attempt failed.
        reason: DeliveryReason,
        /// Not before.
        next_attempt: UnixMillis,
    },
    /// It is given up.
    DeadLetter {
        /// Why.
        reason: DeliveryReason,
    },
}

/// One request to Segment, as far as it concerns one capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Whether it carried the identify event.
    pub identify: bool,
    /// Whether it carried the track event.
    pub track: bool,
    /// When it was started.
    pub time: UnixMillis,
    /// HTTP status of the answer; 0 where none came.
    pub http_status: u16,
    /// Until the end of the answer, or the failure.
    pub latency: Duration,
    /// What went wrong, for programs; unspecified after a success.
    pub reason: DeliveryReason,
    /// What went wrong, for people; empty after a success.
    pub error: String,
}

impl Attempt {
    /// Whether it carried the event of this type.
    #[must_use]
    pub fn carried(&self, event: EventType) -> bool {
        match event {
            EventType::Identify => self.identify,
            EventType::Track => self.track,
        }
    }
}

/// The status of one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventStatus {
    /// Where it is.
    pub state: State,
    /// How many requests have carried it.
    pub attempt_count: u32,
    /// HTTP status of the last attempt; 0 where none was answered.
    pub last_http_status: u16,
    /// What went wrong at the last attempt; empty after a success.
    pub last_error: String,
    /// Since when it has failed alone, while its source took others: its own failures.
    pub failing_since: Option<UnixMillis>,
}

impl EventStatus {
    /// The status of an event that has just been stored.
    #[must_use]
    pub fn new(state: State) -> Self {
        Self {
            state,
            attempt_count: 0,
            last_http_status: 0,
            last_error: String::new(),
            failing_since: None,
        }
    }

    /// Moves the event on. Returns whether it was moved: one in a final state
    /// stays as it is, so that a late answer can't bring it back.
    pub fn advance(&mut self, outcome: Outcome, now: UnixMillis) -> bool {
        if self.state.is_final() {
            return false;
        }
        self.state = match outcome {
            Outcome::Delivered => State::Delivered { at: now },
            Outcome::Retry {
                reason,
                next_attempt,
            } => State::Retrying {
                reason,
                next_attempt,
            },
            Outcome::DeadLetter { reason } => State::DeadLettered { reason, at: now },
        };
        true
    }

    /// Queues a dead letter again. Returns whether it was one.
    pub fn replay(&mut self) -> bool {
        let dead = matches!(self.state, State::DeadLettered { .. });
        if dead {
            self.state = State::Queued;
            self.failing_since = None;
        }
        dead
    }

    fn count(&mut self, attempt: &Attempt) {
        self.attempt_count = self.attempt_count.saturating_add(1);
        self.last_http_status = attempt.http_status;
        self.last_error.clone_from(&attempt.error);
    }
}

/// All that is known of a capture once it is stored, but for its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureRecord {
    /// Whose capture it is.
    pub integration_id: IntegrationId,
    /// The idempotency key.
    pub capture_id: String,
    /// Whose endpoint gets the events.
    pub region: Region,
    /// Version of the mappings that formed the events.
    pub mapping_version: u64,
    /// When it was stored.
    pub accept_time: UnixMillis,
    /// When its events were queued: when it was stored, or last replayed.
    pub queue_time: UnixMillis,
    /// The identify event.
    pub identify: EventStatus,
    /// The track event.
    pub track: EventStatus,
    /// At most [`MAX_ATTEMPTS_KEPT`], oldest first.
    pub attempts: Vec<Attempt>,
    /// The call that brought it, where it was traced.
    pub trace: Option<TraceLink>,
}

impl CaptureRecord {
    /// Whether another capture with this id is a repetition or a mistake. A capture that was
    /// skipped has sent nothing and leaves its id free; one that was erased keeps it.
    #[must_use]
    pub fn binds_id(&self) -> bool {
        EventType::ALL.into_iter().any(|event| {
            let state = self.event(event).state;
            !matches!(state, State::Skipped { reason } if reason != DeliveryReason::Erased)
        })
    }

    /// Leaves of a capture that is erased that it was there, and which events were delivered.
    /// Returns the events whose state has changed.
    pub fn forget_history(&mut self) -> Vec<EventType> {
        self.attempts.clear();
        let mut changed = Vec::new();
        for event in EventType::ALL {
            let erased = State::Skipped {
                reason: DeliveryReason::Erased,
            };
            let state = match self.event(event).state {
                state @ State::Delivered { .. } => state,
                state => {
                    if state != erased {
                        changed.push(event);
                    }
                    erased
                }
            };
            *self.event_mut(event) = EventStatus::new(state);
        }
        changed
    }

    /// The status of one event.
    #[must_use]
    pub fn event(&self, event: EventType) -> &EventStatus {
        match event {
            EventType::Identify => &self.identify,
            EventType::Track => &self.track,
        }
    }

    /// The status of one event, to change.
    pub fn event_mut(&mut self, event: EventType) -> &mut EventStatus {
        match event {
            EventType::Identify => &mut self.identify,
            EventType::Track => &mut self.track,
        }
    }

    /// Whether both events are in a final state.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.identify.state.is_final() && self.track.state.is_final()
    }

    /// Notes an attempt in the history and at the events that it carried.
    pub fn note_attempt(&mut self, mut attempt: Attempt) {
        truncate_to_char(&mut attempt.error, MAX_ERROR_BYTES);
        for event in EventType::ALL {
            if attempt.carried(event) {
                self.event_mut(event).count(&attempt);
            }
        }
        if self.attempts.len() >= MAX_ATTEMPTS_KEPT {
            self.attempts.remove(1);
        }
        if self.attempts.is_empty() {
            // Most need no second one; a vector would make room for four.
            self.attempts.reserve_exact(1);
        }
        self.attempts.push(attempt);
    }
}

fn truncate_to_char(text: &mut String, max_bytes: usize) {
    let mut end = max_bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_000);

    fn all_states() -> [State; 5] {
        let reason = DeliveryReason::Network;
        [
            State::Queued,
            State::Retrying {
                reason,
                next_attempt: NOW,
            },
            State::Delivered { at: NOW },
            State::Skipped { reason },
            State::DeadLettered { reason, at: NOW },
        ]
    }

    #[test]
    fn only_waiting_events_move_and_final_ones_stay() {
        let reason = DeliveryReason::ServerError;
        let outcomes = [
            (Outcome::Delivered, State::Delivered { at: NOW }),
            (
                Outcome::Retry {
                    reason,
                    next_attempt: UnixMillis(5),
                },
                State::Retrying {
                    reason,
                    next_attempt: UnixMillis(5),
                },
            ),
            (
                Outcome::DeadLetter { reason },
                State::DeadLettered { reason, at: NOW },
            ),
        ];
        for from in all_states() {
            for (outcome, to) in outcomes {
                let mut status = EventStatus::new(from);
                let waits = matches!(from, State::Queued | State::Retrying { .. });
                assert_eq!(status.advance(outcome, NOW), waits);
                assert_eq!(status.state, if waits { to } else { from });
            }
        }
    }

    #[test]
    fn the_history_keeps_the_first_attempt_and_the_newest() {
        let mut record = CaptureRecord {
            integration_id: IntegrationId::new("acme").expect("valid"),
            capture_id: "c".into(),
            region: Region::NonEu,
            mapping_version: 1,
            accept_time: NOW,
            queue_time: NOW,
            identify: EventStatus::new(State::Queued),
            track: EventStatus::new(State::Queued),
            attempts: Vec::new(),
            trace: None,
        };
        for number in 0..40_u16 {
            record.note_attempt(Attempt {
                identify: true,
                track: number > 0,
                time: UnixMillis(number.into()),
                http_status: number,
                latency: Duration::ZERO,
                reason: DeliveryReason::ServerError,
                error: "ü".repeat(200),
            });
        }
        let kept: Vec<u16> = record.attempts.iter().map(|a| a.http_status).collect();
        assert_eq!(kept.len(), MAX_ATTEMPTS_KEPT);
        assert_eq!((kept[0], kept[1], kept[16]), (0, 24, 39));
        assert_eq!(
            (record.identify.attempt_count, record.track.attempt_count),
            (40, 39)
        );
        assert_eq!(record.identify.last_error.len(), 256);
    }
}
