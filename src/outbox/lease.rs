//! What a lane takes for an attempt, and what it says of it afterwards.

use std::{fmt, sync::Arc};

use bytes::Bytes;

use super::{EventSet, LaneKey};
use crate::{event::EventType, status::CaptureRecord};

/// How much a lane may take at once.
#[derive(Clone, Copy, Debug)]
pub struct LeaseBudget {
    /// Events at the most; at least 1. A pair is split only where this is 1.
    pub max_events: usize,
    /// Bytes of JSON at the most, with a comma after each event.
    pub max_bytes: usize,
}

impl LeaseBudget {
    /// Whether about as much was leased as it allows: there may be more that waits.
    #[must_use]
    pub fn is_used_up_by(&self, leased: &[LeasedCapture]) -> bool {
        let events = leased
            .iter()
            .flat_map(|capture| [&capture.identify, &capture.track]);
        let (mut count, mut bytes) = (0, 0);
        for event in events.flatten() {
            count += 1;
            bytes += event.len() + 1;
        }
        count >= self.max_events / 2 || bytes >= self.max_bytes / 2
    }
}

/// A capture with events that wait, as a lane takes it. Prints without them.
#[derive(Clone)]
pub struct LeasedCapture {
    /// Place in the order of acceptance.
    pub sequence: i64,
    /// Its status so far.
    pub record: Arc<CaptureRecord>,
    /// The identify event, if it is to be sent now.
    pub identify: Option<Bytes>,
    /// The track event, if it is to be sent now.
    pub track: Option<Bytes>,
    /// Whether what is stored does not match its checksum: it must not be sent.
    pub damaged: bool,
}

impl fmt::Debug for LeasedCapture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeasedCapture")
            .field("sequence", &self.sequence)
            .field("record", &self.record)
            .field("events", &self.event_count())
            .field("damaged", &self.damaged)
            .finish_non_exhaustive()
    }
}

impl LeasedCapture {
    /// How many events are to be sent now.
    #[must_use]
    pub fn event_count(&self) -> u32 {
        u32::from(self.identify.is_some()) + u32::from(self.track.is_some())
    }

    /// The bytes of an event that is to be sent now.
    #[must_use]
    pub fn payload(&self, event: EventType) -> Option<&Bytes> {
        match event {
            EventType::Identify => self.identify.as_ref(),
            EventType::Track => self.track.as_ref(),
        }
    }
}

/// What a lane makes durable after an attempt.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// The lane.
    pub lane: LaneKey,
    /// The captures of the attempt.
    pub captures: Vec<SettledCapture>,
}

/// What an attempt changed of one capture.
#[derive(Clone, Debug)]
pub struct SettledCapture {
    /// Place in the order of acceptance.
    pub sequence: i64,
    /// Its status from now on, as far as the attempt changed it.
    pub record: Arc<CaptureRecord>,
    /// The events that the attempt changed; the others stay as they are stored.
    pub changed: EventSet,
}
