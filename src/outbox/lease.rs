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

/// Whose events of a lane a lease takes. Users are named by their ids, and by an outbox as
/// it blinds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LeaseScope<User = String> {
    /// Those of all users.
    #[default]
    All,
    /// Those of all users but these few.
    Except(Vec<User>),
    /// Those of one user.
    Only(User),
}

impl<User> LeaseScope<User> {
    /// The same with other names of the users.
    #[must_use]
    pub fn map<Other>(&self, name: impl Fn(&User) -> Other) -> LeaseScope<Other> {
        match self {
            Self::All => LeaseScope::All,
            Self::Except(users) => LeaseScope::Except(users.iter().map(name).collect()),
            Self::Only(user) => LeaseScope::Only(name(user)),
        }
    }

    /// Whether it admits events whose user is looked up only where that matters.
    ///
    /// # Errors
    /// Those of the look-up.
    pub fn admits<Error>(
        &self,
        user: impl FnOnce() -> Result<Option<User>, Error>,
    ) -> Result<bool, Error>
    where
        User: PartialEq,
    {
        Ok(match self {
            Self::All => true,
            Self::Except(users) => user()?.is_none_or(|user| !users.contains(&user)),
            Self::Only(only) => user()?.as_ref() == Some(only),
        })
    }
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
    /// The user whose events these are, by the events themselves.
    #[must_use]
    pub fn user_id(&self) -> Option<String> {
        #[derive(serde::Deserialize)]
        struct Event {
            #[serde(rename = "userId")]
            user_id: String,
        }
        let event = self.identify.as_ref().or(self.track.as_ref())?;
        let event: Event = serde_json::from_slice(event).ok()?;
        Some(event.user_id)
    }

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
