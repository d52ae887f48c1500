//! What relays tell each other beside the streams: which lanes may have something to do, and
//! which captures have changed. What is lost here costs a moment: lanes are looked for
//! anyway, and states can be read.

use std::sync::Arc;

use futures_util::StreamExt;
use prost::Message;

use super::{
    Shared,
    message::{NewState, News, decode},
    names::{lane_token, parse_lane},
};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{Change, LaneKey, record},
    status::CaptureRecord,
    time::UnixMillis,
};

/// Captures of one message.
const CHUNK: usize = 500;

impl Shared {
    /// Tells of lanes that may have something to do, here and elsewhere.
    pub(super) async fn tell_lanes(&self, lanes: &[LaneKey]) {
        let own = lanes.iter().filter(|lane| self.sessions.prefers_own(lane));
        self.signals.wake_lanes(own.cloned());
        if self.sessions.has_others() {
            let lanes = lanes.iter().map(lane_token).collect();
            self.tell(News {
                lanes,
                ..News::default()
            })
            .await;
        }
    }

    /// Tells of changes, here and elsewhere.
    pub(super) async fn announce(
        &self,
        changes: Vec<(CaptureRecord, Vec<EventType>)>,
        time: UnixMillis,
    ) {
        if self.sessions.has_others() {
            for some in changes.chunks(CHUNK) {
                let states = some.iter().map(|(record, events)| NewState {
                    integration_id: record.integration_id.to_string(),
                    capture_id: record.capture_id.clone(),
                    status: record::encode(record),
                    events: events.iter().map(|event| bit(*event)).sum(),
                    millis: time.0,
                });
                self.tell(News {
                    changes: states.collect(),
                    ..News::default()
                })
                .await;
            }
        }
        for (record, events) in changes {
            self.announce_here(record, &events, time);
        }
    }

    /// Tells whoever watches of captures that were accepted.
    pub(super) async fn announce_accepted(&self, records: Vec<CaptureRecord>) {
        let (Some(first), others) = (records.first(), self.sessions.others_watch()) else {
            return;
        };
        let time = first.accept_time;
        let changes = records
            .into_iter()
            .map(|record| (record, EventType::ALL.to_vec()));
        if others {
            self.announce(changes.collect(), time).await;
            return;
        }
        for (record, events) in changes {
            let time = record.accept_time;
            self.announce_here(record, &events, time);
        }
    }

    fn announce_here(&self, record: CaptureRecord, events: &[EventType], time: UnixMillis) {
        if record.is_final() {
            self.signals
                .settled(&record.integration_id, &record.capture_id);
        }
        if self.signals.is_watched() {
            let record = Arc::new(record);
            for event in events {
                let record = Arc::clone(&record);
                self.signals.publish(Change {
                    record,
                    event: *event,
                    time,
                });
            }
        }
    }

    async fn tell(&self, mut news: News) {
        news.session = self.sessions.name().unwrap_or_default();
        let payload = news.encode_to_vec().into();
        if let Err(error) = self.wire.client.publish(self.layout.news(), payload).await {
            tracing::debug!(%error, "other relays were not told");
        }
    }

    fn heard(&self, news: News) {
        let lanes = news.lanes.iter().filter_map(|lane| parse_lane(lane));
        let own = lanes.filter(|lane| self.sessions.prefers_own(lane));
        self.signals.wake_lanes(own);
        if !self.signals.is_watched() && !self.signals.is_expected() {
            return;
        }
        for state in news.changes {
            let Some(id) = IntegrationId::new(&state.integration_id) else {
                continue;
            };
            let Ok(record) = record::decode(id, state.capture_id, &state.status) else {
                continue;
            };
            let events = EventType::ALL
                .into_iter()
                .filter(|event| state.events & bit(*event) != 0);
            let events: Vec<_> = events.collect();
            self.announce_here(record, &events, UnixMillis(state.millis));
        }
    }
}

fn bit(event: EventType) -> u32 {
    match event {
        EventType::Identify => 1,
        EventType::Track => 2,
    }
}

/// Hears what other relays tell, until the outbox closes.
pub(super) async fn follow(shared: Arc<Shared>) {
    let Ok(mut told) = shared.wire.client.subscribe(shared.layout.news()).await else {
        return;
    };
    loop {
        let next = tokio::select! {
            () = shared.closing.cancelled() => return,
            next = told.next() => next,
        };
        let Some(message) = next else { return };
        let Ok(news) = decode::<News>("news", message.payload) else {
            continue;
        };
        if Some(&news.session) != shared.sessions.name().as_ref() {
            shared.heard(news);
        }
    }
}
