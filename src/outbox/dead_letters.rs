//! Dead letters: events that were refused for good or given up, kept with their
//! payload until somebody replays or discards them.

use std::collections::BTreeMap;

use crate::{
    event::EventType, integration::IntegrationId, proto::DeliveryReason, status::CaptureRecord,
    time::UnixMillis,
};

/// Which dead letters are meant. What is `None` lets everything through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeadLetterFilter {
    /// Of integrations of these names, deleted ones included.
    pub integrations: Option<Vec<IntegrationId>>,
    /// With this reason.
    pub reason: Option<DeliveryReason>,
    /// Given up at this time or later.
    pub start: Option<UnixMillis>,
    /// Given up before this time.
    pub end: Option<UnixMillis>,
}

/// What a replay or a discard takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All that fit.
    Filter(DeadLetterFilter),
    /// Those of these ids; unknown ones are passed over.
    Ids {
        /// The ids.
        ids: Vec<i64>,
        /// Others than those of integrations of these names are passed over too.
        integrations: Option<Vec<IntegrationId>>,
    },
}

impl Selection {
    /// The names of the integrations to which it is bound.
    #[must_use]
    pub fn integrations(&self) -> Option<&[IntegrationId]> {
        match self {
            Self::Filter(filter) => filter.integrations.as_deref(),
            Self::Ids { integrations, .. } => integrations.as_deref(),
        }
    }
}

/// One dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Names it; counts up in the order in which events were given up.
    pub id: i64,
    /// Its capture.
    pub record: CaptureRecord,
    /// Which of the capture's events.
    pub event: EventType,
    /// When it was given up.
    pub time: UnixMillis,
    /// Size of the kept payload.
    pub payload_bytes: u64,
}

/// How many dead letters were replayed or discarded, of which integrations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken(BTreeMap<IntegrationId, u64>);

impl Taken {
    /// Adds some of an integration; of all its incarnations by their name.
    pub fn add(&mut self, id: &IntegrationId, events: u64) {
        if events > 0 {
            *self.0.entry(id.of_incarnation(1)).or_default() += events;
        }
    }

    /// Adds others.
    pub fn append(&mut self, others: &Self) {
        for (id, events) in &others.0 {
            self.add(id, *events);
        }
    }

    /// How many they are together.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.0.values().sum()
    }

    /// How many of each integration, by its name.
    pub fn each(&self) -> impl ExactSizeIterator<Item = (&str, u64)> {
        self.0.iter().map(|(id, events)| (id.name(), *events))
    }
}

/// What dead letters weigh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeadLetterCount {
    /// How many.
    pub events: u64,
    /// Their bytes of JSON.
    pub bytes: u64,
    /// How many of them were accepted before a given time.
    pub older: u64,
    /// How many of them belong to deleted integrations.
    pub former: u64,
}
