//! Some of a capture's events: a set without memory of its own.

use crate::event::EventType;

/// Some of a capture's two events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventSet {
    identify: bool,
    track: bool,
}

impl EventSet {
    /// Both events.
    pub const BOTH: Self = Self {
        identify: true,
        track: true,
    };

    /// Whether an event is one of them.
    #[must_use]
    pub fn contains(self, event: EventType) -> bool {
        match event {
            EventType::Identify => self.identify,
            EventType::Track => self.track,
        }
    }

    /// The events in the order in which they are sent.
    pub fn iter(self) -> impl Iterator<Item = EventType> {
        EventType::ALL
            .into_iter()
            .filter(move |event| self.contains(*event))
    }

    /// How many they are.
    #[must_use]
    pub fn len(self) -> usize {
        usize::from(self.identify) + usize::from(self.track)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

impl FromIterator<EventType> for EventSet {
    fn from_iter<I: IntoIterator<Item = EventType>>(events: I) -> Self {
        let mut set = Self::default();
        for event in events {
            match event {
                EventType::Identify => set.identify = true,
                EventType::Track => set.track = true,
            }
        }
        set
    }
}
