//! What relays tell each other: lanes with new work, and captures that have changed. NOTIFY
//! is sent on its own, after the commit and for many changes at once: within the committing
//! transactions it would let them commit one at a time. What is lost here costs a moment,
//! since lanes and awaited captures are polled, too.

use std::{
    collections::HashSet,
    fmt::Write,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::{Notify, mpsc};

use super::{
    READ,
    database::{Database, Session, key_of, lock},
    error::Effect,
    row::{RECORD_COLUMNS, event_number, record_of},
    settle::Changed,
};
use crate::{
    event::EventType,
    outbox::{Change, EventSet, LaneKey, OutboxError},
    status::CaptureRecord,
    time::UnixMillis,
};

/// The channel of LISTEN and NOTIFY.
pub(super) const CHANNEL: &str = "segment_relay";
/// Longest payload: PostgreSQL takes less than 8,000 bytes.
const MAX_PAYLOAD: usize = 7_900;
/// Changes that wait to be sent; more are dropped.
const MAX_CHANGES: usize = 50_000;
/// Least time between two notifications of a relay.
const INTERVAL: Duration = Duration::from_millis(20);

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

impl Outgoing {
    fn add(&self, lanes: impl Iterator<Item = i64>, changes: impl Iterator<Item = (i64, i16)>) {
        let mut pending = lock(&self.pending);
        pending.lanes.extend(lanes);
        let room = MAX_CHANGES.saturating_sub(pending.changes.len());
        pending.changes.extend(changes.take(room));
        drop(pending);
        self.wake.notify_one();
    }
}

impl Database {
    /// Wakes lanes here, or at the relays that deliver them.
    pub(super) fn tell_lanes(&self, session: &Session, lanes: impl IntoIterator<Item = LaneKey>) {
        let (own, others): (Vec<_>, Vec<_>) = lanes
            .into_iter()
            .partition(|lane| session.prefers(lane.integration_id.as_str()));
        self.context.signals.wake_lanes(own);
        if !others.is_empty() {
            let others = others.iter().filter_map(|lane| session.lane(lane));
            self.outgoing.add(others, std::iter::empty());
        }
    }

    /// Tells watchers, here and elsewhere, of captures that were accepted.
    pub(super) fn tell_accepted(&self, session: &Session, accepted: Vec<Changed>) {
        if !self.context.signals.is_watched() && !session.relays().others_listen {
            return;
        }
        self.tell_elsewhere(session, &accepted);
        for (_, record, events) in accepted {
            let time = record.accept_time;
            self.announce(&record, events, time);
        }
    }

    /// Tells watchers and waiting callers, here and elsewhere, of changes.
    pub(super) fn tell_changes(&self, session: &Session, changes: Vec<Changed>, time: UnixMillis) {
        self.tell_elsewhere(session, &changes);
        for (_, record, events) in changes {
            self.announce(&record, events, time);
        }
    }

    fn tell_elsewhere(&self, session: &Session, changes: &[Changed]) {
        if session.relays().others_listen {
            let changes = changes.iter().map(|(seq, _, events)| (*seq, bits(*events)));
            self.outgoing.add(std::iter::empty(), changes);
        }
    }

    fn announce(&self, record: &Arc<CaptureRecord>, events: EventSet, time: UnixMillis) {
        let signals = &self.context.signals;
        if record.is_final() {
            signals.settled(&record.integration_id, &record.capture_id);
        }
        if signals.is_watched() {
            for event in events.iter() {
                let record = Arc::clone(record);
                signals.publish(Change {
                    record,
                    event,
                    time,
                });
            }
        }
    }

    /// Sends what is to be told, until the outbox closes.
    pub(super) async fn send_news(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.context.closing.cancelled() => return,
                () = self.outgoing.wake.notified() => {}
            }
            let pending = std::mem::take(&mut *lock(&self.outgoing.pending));
            if let Err(error) = self.notify(pending).await {
                tracing::debug!(%error, "other relays were not told");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn notify(&self, pending: Pending) -> Result<(), OutboxError> {
        let session = self.session()?;
        let lanes = pending.lanes.iter().map(ToString::to_string);
        let changes = pending.changes.iter();
        let changes = changes.map(|(seq, events)| format!("{seq}:{events}"));
        let mut payloads = payloads(session.relay, 'l', lanes);
        payloads.extend(self::payloads(session.relay, 'c', changes));
        if payloads.is_empty() {
            return Ok(());
        }
        let connection = self.connection().await?;
        const SQL: &str = "SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload";
        connection
            .rows(Effect::None, SQL, &[&CHANNEL, &payloads])
            .await
            .map(drop)
    }

    /// Hears what other relays tell, until the outbox closes. Connects again where that ends.
    pub(super) async fn hear_news(self: Arc<Self>) {
        while !self.context.closing.is_cancelled() {
            if self.is_available()
                && let Err(error) = self.listen().await
            {
                tracing::debug!(%error, "LISTEN ended");
            }
            tokio::select! {
                () = self.context.closing.cancelled() => return,
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
    }

    async fn listen(&self) -> Result<(), OutboxError> {
        let (sender, mut told) = mpsc::channel::<String>(1_024);
        let heard = move |payload: &str| {
            // A full channel drops it: polling makes up for it.
            let _ = sender.try_send(payload.to_owned());
        };
        let (client, task) = self.connector.listen(heard).await?;
        let listening = client.batch_execute(&format!("LISTEN {CHANNEL}")).await;
        listening.map_err(|error| Effect::None.failed(&error))?;
        loop {
            let payload = tokio::select! {
                () = self.context.closing.cancelled() => break,
                payload = told.recv() => payload,
            };
            let Some(payload) = payload else { break };
            if let Err(error) = self.heard(&payload).await {
                tracing::debug!(%error, "what another relay told cannot be looked up");
            }
        }
        task.abort();
        Ok(())
    }

    async fn heard(&self, payload: &str) -> Result<(), OutboxError> {
        let session = self.session()?;
        let mut words = payload.split(' ');
        let relay: Option<i64> = words.next().and_then(|word| word.parse().ok());
        let kind = words.next();
        if relay == Some(session.relay) {
            return Ok(());
        }
        if kind == Some("l") {
            let lanes: Vec<i64> = words.filter_map(|word| word.parse().ok()).collect();
            let connection = self.connection().await?;
            let keys = lanes.iter().map(|lane| key_of(*lane));
            self.learn_ids(&session, &connection, keys).await?;
            let lanes = lanes.into_iter().filter_map(|lane| session.lane_key(lane));
            let own = lanes.filter(|lane| session.prefers(lane.integration_id.as_str()));
            self.context.signals.wake_lanes(own);
            return Ok(());
        }
        let signals = &self.context.signals;
        if !signals.is_watched() && !signals.is_expected() {
            return Ok(());
        }
        let changes = words.filter_map(|word| {
            let (seq, events) = word.split_once(':')?;
            Some((seq.parse().ok()?, events.parse().ok()?))
        });
        self.look_up(&session, changes.collect()).await
    }

    /// Reads captures that another relay has changed, and announces them.
    async fn look_up(
        &self,
        session: &Session,
        changes: Vec<(i64, i16)>,
    ) -> Result<(), OutboxError> {
        let (seqs, events): (Vec<i64>, Vec<i16>) = changes.into_iter().unzip();
        let sql = format!(
            "SELECT i.events, c.integration, {RECORD_COLUMNS}
             FROM unnest($1::int8[], $2::int2[]) AS i (seq, events)
             JOIN captures c ON c.seq = i.seq"
        );
        let connection = self.connection().await?;
        let rows = connection.rows(READ, &sql, &[&seqs, &events]).await?;
        let keys = rows.iter().map(|row| row.get(1));
        self.learn_ids(session, &connection, keys).await?;
        let now = UnixMillis::now();
        for row in &rows {
            let Some(id) = session.id(row.get(1)) else {
                continue;
            };
            let record = Arc::new(record_of(id, row, 2)?);
            let events = row.get::<_, i16>(0);
            let of = |event: &EventType| events & event_number(*event) != 0;
            self.announce(
                &record,
                EventType::ALL.into_iter().filter(of).collect(),
                now,
            );
        }
        Ok(())
    }
}

fn bits(events: EventSet) -> i16 {
    events.iter().map(event_number).sum()
}

/// Words in payloads that are short enough.
fn payloads(relay: i64, kind: char, words: impl Iterator<Item = String>) -> Vec<String> {
    let mut payloads: Vec<String> = Vec::new();
    for word in words {
        let fits = |payload: &&mut String| payload.len() + word.len() < MAX_PAYLOAD;
        match payloads.last_mut().filter(fits) {
            Some(payload) => {
                let _ = write!(payload, " {word}");
            }
            None => payloads.push(format!("{relay} {kind} {word}")),
        }
    }
    payloads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_hold_all_words_and_stay_below_the_bound() {
        let words = (0..5_000).map(|number| format!("{number}:3"));
        let made = payloads(7, 'c', words.clone());
        assert!(made.len() > 1 && made.iter().all(|one| one.len() < 8_000));
        let read: Vec<String> = made
            .iter()
            .flat_map(|one| one.split(' ').skip(2).map(str::to_owned))
            .collect();
        assert_eq!(read, words.collect::<Vec<_>>());
        assert!(payloads(7, 'l', std::iter::empty()).is_empty());
    }
}
