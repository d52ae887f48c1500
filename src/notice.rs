//! What people are told of an integration: the body of a webhook.

use serde_json::{Map, Value, json};

use crate::{
    integration::{Integration, IntegrationId},
    time::UnixMillis,
};

/// What happened to an integration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// It was created.
    Created,
    /// It was changed.
    Updated,
    /// It was deleted.
    Deleted,
    /// It has gone from the configuration file while events wait.
    Removed,
    /// Its deliveries are held.
    Paused,
    /// Its deliveries go on.
    Resumed,
    /// A test pair was sent.
    Tested,
    /// Segment refuses its write key: its events wait for a person.
    Parked,
    /// Segment refuses all of its events: they wait for a person.
    Suspended,
    /// Its deliveries have failed for long.
    Broken,
    /// It delivers again.
    Healthy,
}

impl Happening {
    /// What an update means for deliveries, where it holds them or lets them go on.
    #[must_use]
    pub fn of_pause(before: &Integration, now: &Integration) -> Option<Self> {
        match (before.paused, now.paused) {
            (false, true) => Some(Self::Paused),
            (true, false) => Some(Self::Resumed),
            _ => None,
        }
    }

    /// Its name in webhooks and in the audit log.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "integration.created",
            Self::Updated => "integration.updated",
            Self::Deleted => "integration.deleted",
            Self::Removed => "integration.removed",
            Self::Paused => "integration.paused",
            Self::Resumed => "integration.resumed",
            Self::Tested => "integration.tested",
            Self::Parked => "integration.parked",
            Self::Suspended => "integration.suspended",
            Self::Broken => "integration.broken",
            Self::Healthy => "integration.healthy",
        }
    }
}

/// A message to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// `webhook-id`: the same for each attempt.
    pub id: String,
    /// When it happened.
    pub time: UnixMillis,
    /// The body, JSON.
    pub body: Vec<u8>,
}

impl Notice {
    /// A message about an integration. `facts` go beside its id; never a secret.
    #[must_use]
    pub fn new(
        happening: Happening,
        id: &IntegrationId,
        facts: &[(&str, Value)],
        time: UnixMillis,
    ) -> Self {
        let mut data = Map::new();
        data.insert("integration_id".to_owned(), id.name().into());
        for (name, fact) in facts {
            data.insert((*name).to_owned(), fact.clone());
        }
        let body = json!({ "type": happening.as_str(), "timestamp": time.to_iso(), "data": data });
        Self {
            id: format!("msg_{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)),
            time,
            body: body.to_string().into_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_has_the_form_of_standard_webhooks_and_an_id_of_its_own() {
        let id = IntegrationId::new("acme").expect("valid");
        let facts = [("data_region", Value::from("EU"))];
        let time = UnixMillis(1_615_507_200_000);
        let notice = Notice::new(Happening::Parked, &id, &facts, time);
        assert_eq!(
            String::from_utf8_lossy(&notice.body),
            r#"{"type":"integration.parked","timestamp":"2021-03-12T00:00:00.000Z","data":{"integration_id":"acme","data_region":"EU"}}"#
        );
        assert_ne!(
            notice.id,
            Notice::new(Happening::Parked, &id, &facts, time).id
        );
    }
}
