//! What relays tell each other: lanes with new work, and captures that have changed. NOTIFY
//! is sent on its own, after the commit and for many changes at once: within the committing
//! transactions it would let them commit one at a time. What is lost here costs a moment,
//! since lanes and awaited captures are polled, too.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};

use super::{
    database::{Call, Database, lock},
    error::Effect,
    row::{RECORD_COLUMNS, RECORDS, bits, events_of, record_of},
};
use crate::{
    outbox::{Change, EventSet, LaneKey, OutboxError},
    status::CaptureRecord,
    time::UnixMillis,
};

/// The channel of LISTEN and NOTIFY.
const CHANNEL: &str = "segment_relay";
/// Lanes or changes of one payload: with 20 digits each below the 8,000 bytes that
/// PostgreSQL takes.
const MAX_ITEMS: usize = 300;
/// Changes that wait to be sent; more are dropped.
const MAX_CHANGES: usize = 50_000;
/// Least time between two notifications of a relay.
const INTERVAL: Duration = Duration::from_millis(20);

/// One change of a capture: its sequence, its record from now on, the changed events.
pub(super) type Changed = (i64, Arc<CaptureRecord>, EventSet);

/// What other relays are to hear.
#[derive(Default)]
pub(super) struct Outgoing {
    pending: Mutex<Pending>,
    wake: Notify,
}

#[derive(Default)]
struct Pending {
    lanes: HashSet<i64>,
    /// Sequences, with the events that have changed as bits.
    changes: Vec<(i64, i16)>,
}

/// A payload of NOTIFY.
#[derive(Serialize, Deserialize)]
struct News {
    relay: i64,
    lanes: Vec<i64>,
    /// Sequences, with the events that have changed as bits.
    changes: Vec<(i64, i16)>,
}

impl Call<'_> {
    /// Wakes lanes here, or at the relays that deliver them.
    pub(super) fn wake(&self, lanes: impl IntoIterator<Item = (i64, LaneKey)>) {
        let is_own = |lane: &LaneKey| self.session.prefers(lane.integration_id.as_str());
        let lanes = lanes.into_iter();
        let (own, others): (Vec<_>, Vec<_>) = lanes.partition(|(_, lane)| is_own(lane));
        let own = own.into_iter().map(|(_, lane)| lane);
        self.database.context.signals.wake_lanes(own);
        if !others.is_empty() {
            let outgoing = &self.database.outgoing;
            lock(&outgoing.pending)
                .lanes
                .extend(others.iter().map(|(lane, _)| *lane));
            outgoing.wake.notify_one();
        }
    }

    /// Wakes lanes by their numbers. What fails here is made up for by polling.
    pub(super) async fn wake_numbers(&self, lanes: &[i64]) {
        match self.lanes(lanes).await {
            Ok(lanes) => self.wake(lanes),
            Err(error) => tracing::debug!(%error, "lanes were not woken"),
        }
    }

    /// Tells watchers, here and elsewhere, of captures that were accepted.
    pub(super) fn tell_accepted(&self, accepted: Vec<Changed>) {
        let signals = &self.database.context.signals;
        if signals.is_watched() || self.session.relays().others_listen {
            self.tell(accepted, None);
        }
    }

    /// Tells watchers and waiting callers, here and elsewhere, of changes.
    pub(super) fn tell_changes(&self, changes: Vec<Changed>, time: UnixMillis) {
        self.tell(changes, Some(time));
    }

    /// Without a time it is that of the acceptance.
    fn tell(&self, changes: Vec<Changed>, time: Option<UnixMillis>) {
        let outgoing = &self.database.outgoing;
        if self.session.relays().others_listen {
            let mut pending = lock(&outgoing.pending);
            let room = MAX_CHANGES.saturating_sub(pending.changes.len());
            let told = changes.iter().take(room);
            pending
                .changes
                .extend(told.map(|(seq, _, events)| (*seq, bits(*events))));
            drop(pending);
            outgoing.wake.notify_one();
        }
        for (_, record, events) in changes {
            let time = time.unwrap_or(record.accept_time);
            self.database.announce(&record, events, time);
        }
    }
}

impl Database {
    fn announce(&self, record: &Arc<CaptureRecord>, events: EventSet, time: UnixMillis) {
        let signals = &self.context.signals;
        if record.is_final() {
            signals.settled(&record.integration_id, &record.capture_id);
        }
        if signals.is_watched() {
            for event in events.iter() {
                let record = Arc::clone(record);
                signals.publish(&Change {
                    record,
                    event,
                    time,
                });
            }
        }
    }

    /// Sends what is to be told, until the outbox closes.
    pub(super) async fn send_news(self: Arc<Self>) {
        let closing = &self.context.closing;
        while let Some(()) = closing
            .run_until_cancelled(self.outgoing.wake.notified())
            .await
        {
            if let Err(error) = self.notify().await {
                tracing::debug!(%error, "other relays were not told");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn notify(&self) -> Result<(), OutboxError> {
        const SQL: &str = "SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload";
        let Pending { lanes, changes } = std::mem::take(&mut *lock(&self.outgoing.pending));
        let lanes = Vec::from_iter(lanes);
        let call = self.call().await?;
        let relay = call.session.relay;
        let payload = |lanes: &[i64], changes: &[(i64, i16)]| {
            let (lanes, changes) = (lanes.to_vec(), changes.to_vec());
            let news = News {
                relay,
                lanes,
                changes,
            };
            serde_json::to_string(&news).unwrap_or_default()
        };
        let lanes = lanes.chunks(MAX_ITEMS).map(|lanes| payload(lanes, &[]));
        let changes = changes.chunks(MAX_ITEMS).map(|some| payload(&[], some));
        let payloads: Vec<String> = lanes.chain(changes).collect();
        call.apply(SQL, &[&CHANNEL, &payloads]).await.map(drop)
    }

    /// Hears what other relays tell, until the outbox closes. Connects again where that ends.
    pub(super) async fn hear_news(self: Arc<Self>) {
        let closing = &self.context.closing;
        loop {
            let pause = tokio::time::sleep(Duration::from_secs(1));
            let heard = async {
                if self.is_available()
                    && let Err(error) = self.listen().await
                {
                    tracing::debug!(%error, "LISTEN ended");
                }
                pause.await;
            };
            if closing.run_until_cancelled(heard).await.is_none() {
                return;
            }
        }
    }

    async fn listen(&self) -> Result<(), OutboxError> {
        let (sender, mut told) = mpsc::channel::<String>(1_024);
        let heard = move |payload: &str| {
            // A full channel drops it: polling makes up for it.
            let _ = sender.try_send(payload.to_owned());
        };
        let (client, _task) = self.connector.listen(heard).await?;
        let listening = client.batch_execute(&format!("LISTEN {CHANNEL}")).await;
        listening.map_err(|error| Effect::None.failed(&error))?;
        while let Some(payload) = told.recv().await {
            if let Err(error) = self.heard(&payload).await {
                tracing::debug!(%error, "what another relay told cannot be looked up");
            }
        }
        Ok(())
    }

    async fn heard(&self, payload: &str) -> Result<(), OutboxError> {
        let Ok(news) = serde_json::from_str::<News>(payload) else {
            return Ok(());
        };
        let call = self.call().await?;
        if news.relay == call.session.relay {
            return Ok(());
        }
        let signals = &self.context.signals;
        if !news.lanes.is_empty() {
            let lanes = call.lanes(&news.lanes).await?.into_iter();
            let lanes = lanes.map(|(_, lane)| lane);
            let is_own = |lane: &LaneKey| call.session.prefers(lane.integration_id.as_str());
            signals.wake_lanes(lanes.filter(is_own));
        }
        if news.changes.is_empty() || !(signals.is_watched() || signals.is_expected()) {
            return Ok(());
        }
        let sql = format!("SELECT c.seq, {RECORD_COLUMNS} FROM {RECORDS} WHERE c.seq = ANY ($1)");
        let mut changes: HashMap<i64, i16> = HashMap::new();
        for (seq, bits) in news.changes {
            *changes.entry(seq).or_default() |= bits;
        }
        let seqs = Vec::from_iter(changes.keys().copied());
        let now = UnixMillis::now();
        for row in call.rows(&sql, &[&seqs]).await? {
            let events = changes.get(&row.get(0)).copied().unwrap_or(0);
            let record = Arc::new(record_of(&row, 1)?);
            self.announce(&record, events_of(events), now);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_payload_is_below_the_bound() {
        let news = News {
            relay: i64::MIN,
            lanes: vec![i64::MIN; MAX_ITEMS],
            changes: Vec::new(),
        };
        let changes = News {
            relay: i64::MIN,
            lanes: Vec::new(),
            changes: vec![(i64::MAX, 3); MAX_ITEMS],
        };
        for news in [news, changes] {
            let payload = serde_json::to_string(&news).expect("written");
            assert!(payload.len() < 8_000, "{}", payload.len());
            let read: News = serde_json::from_str(&payload).expect("read");
            assert_eq!((read.lanes, read.changes), (news.lanes, news.changes));
        }
    }
}
