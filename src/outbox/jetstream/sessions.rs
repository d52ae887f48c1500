//! The relays that live. A session is a key of the bucket that its relay writes anew
//! all the time. One that stands still for the length of a lease is ended by whoever sees
//! it, by its revision: then its relay can't write it any more, and its lanes are free.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use async_nats::{
    connection::State,
    jetstream::kv::{self, Operation, UpdateErrorKind},
};
use futures_util::StreamExt;
use sha2::{Digest, Sha256};

use super::{
    Layout, Shared,
    wire::{Wire, unavailable},
};
use crate::outbox::{LaneKey, OutboxError};

/// How often a session is written.
const RENEWAL: Duration = Duration::from_millis(500);
/// Wait before something that failed is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// How long it can be seen that a session was ended.
const MARK_TTL: Duration = Duration::from_secs(24 * 3600);
/// Values of a session: whether somebody watches deliveries there.
const WATCHES: &str = "watches";
const QUIET: &str = "quiet";
const KEY_PREFIX: &str = "session.";

/// The sessions that are known, and the relay's own.
pub(super) struct Sessions {
    store: kv::Store,
    stream: String,
    lease: Duration,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    own: Option<Own>,
    /// Without the own one.
    others: HashMap<String, Seen>,
}

struct Own {
    name: String,
    revision: u64,
    good_until: Until,
}

struct Seen {
    /// Whether somebody watches there.
    watches: bool,
    revision: u64,
    since: Instant,
}

/// A moment on both clocks: the steady one may stand still while a machine sleeps, and
/// the other one may be put back.
#[derive(Clone, Copy)]
struct Until(Instant, SystemTime);

impl Until {
    fn after(span: Duration) -> Self {
        Self(Instant::now() + span, SystemTime::now() + span)
    }

    fn covers(self, span: Duration) -> bool {
        Instant::now() + span <= self.0 && SystemTime::now() + span <= self.1
    }
}

impl Sessions {
    /// Takes a session, and looks at those of others.
    pub(super) async fn start(
        wire: &Wire,
        layout: &Layout,
        lease: Duration,
    ) -> Result<Self, OutboxError> {
        let store = wire
            .context
            .get_key_value(layout.bucket())
            .await
            .map_err(unavailable)?;
        let sessions = Self {
            store,
            stream: layout.bucket_stream(),
            lease,
            known: Mutex::default(),
        };
        sessions.begin().await?;
        Ok(sessions)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn begin(&self) -> Result<(), OutboxError> {
        let name = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        let good_until = Until::after(self.lease);
        let created = self.store.create(key(&name), QUIET.into()).await;
        let revision = created.map_err(unavailable)?;
        tracing::info!(session = %name, "took a session");
        let mut known = self.lock();
        known.others.remove(&name);
        known.own = Some(Own {
            name,
            revision,
            good_until,
        });
        Ok(())
    }

    /// The own session, if it is good for at least so long.
    pub(super) fn own(&self, span: Duration) -> Option<String> {
        let known = self.lock();
        let own = known.own.as_ref()?;
        own.good_until.covers(span).then(|| own.name.clone())
    }

    /// The own session's name, however long it is good.
    pub(super) fn name(&self) -> Option<String> {
        self.lock().own.as_ref().map(|own| own.name.clone())
    }

    /// Whether others live beside this relay.
    pub(super) fn has_others(&self) -> bool {
        !self.lock().others.is_empty()
    }

    /// Whether somebody watches deliveries at another relay.
    pub(super) fn others_watch(&self) -> bool {
        self.lock().others.values().any(|other| other.watches)
    }

    /// Whether this relay is the one that a lane prefers: the same for all lanes of an
    /// integration, since its rate and its condition are kept by one relay.
    pub(super) fn prefers_own(&self, lane: &LaneKey) -> bool {
        self.prefers(lane.integration_id.as_str())
    }

    /// Whether this relay is the one that does what is to be done once.
    pub(super) fn prefers(&self, what: &str) -> bool {
        let known = self.lock();
        let Some(own) = &known.own else { return false };
        let mine = weight(&own.name, what);
        known.others.keys().all(|other| weight(other, what) <= mine)
    }

    /// Whether a session has ended. One that nobody has heard of gets the length of a
    /// lease to be heard of.
    pub(super) async fn has_ended(&self, wire: &Wire, name: &str) -> Result<bool, OutboxError> {
        {
            let known = self.lock();
            if known.own.as_ref().is_some_and(|own| own.name == name) {
                return Ok(false);
            }
        }
        let subject = format!("$KV.{}.{}", self.store.name, key(name));
        let found = wire.last(&self.stream, &subject).await?;
        let ended = match &found {
            Some((_, headers)) => {
                headers.get("KV-Operation").is_some() || headers.get("Nats-Marker-Reason").is_some()
            }
            None => false,
        };
        let mut known = self.lock();
        if ended {
            known.others.remove(name);
            return Ok(true);
        }
        let revision = found.map_or(0, |(stored, _)| stored.sequence);
        known.note(name, revision, false);
        Ok(revision == 0 && known.others[name].since.elapsed() > self.lease)
    }

    /// Renews the own session until the outbox closes.
    pub(super) async fn keep(shared: Arc<Shared>) {
        let mut failing_since = None;
        loop {
            tokio::select! {
                () = shared.closing.cancelled() => return,
                () = tokio::time::sleep(RENEWAL) => {}
            }
            if shared.wire.client.connection_state() != State::Connected {
                // It would only time out.
                shared.signals.set_writable(false);
                continue;
            }
            match shared.sessions.renew(shared.signals.is_watched()).await {
                Ok(Renewed::Same) => {
                    if failing_since.take().is_some() {
                        tracing::info!("JetStream answers again");
                    }
                }
                Ok(Renewed::Anew) => {
                    failing_since = None;
                    tracing::warn!(
                        "the session had been ended by another relay; its lanes are lost"
                    );
                    shared.lanes.forget_all();
                }
                Err(error) => {
                    let since: &mut Instant = failing_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > RENEWAL {
                        shared.signals.set_writable(false);
                    }
                    tracing::warn!(%error, "the session cannot be renewed; trying again");
                }
            }
            shared.sessions.end_the_dead().await;
        }
    }

    async fn renew(&self, watched: bool) -> Result<Renewed, OutboxError> {
        let own = self
            .lock()
            .own
            .as_ref()
            .map(|own| (own.name.clone(), own.revision));
        let Some((name, revision)) = own else {
            self.begin().await?;
            return Ok(Renewed::Anew);
        };
        // From before it is asked: the others count from when it arrives.
        let good_until = Until::after(self.lease);
        let value = if watched { WATCHES } else { QUIET };
        match self.store.update(key(&name), value.into(), revision).await {
            Ok(revision) => {
                self.lock().own = Some(Own {
                    name,
                    revision,
                    good_until,
                });
                Ok(Renewed::Same)
            }
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                // Ended, or written by an attempt whose answer was lost.
                match self.store.entry(key(&name)).await.map_err(unavailable)? {
                    Some(entry)
                        if entry.operation == Operation::Put && entry.revision > revision =>
                    {
                        if let Some(own) = &mut self.lock().own {
                            own.revision = entry.revision;
                        }
                        Ok(Renewed::Same)
                    }
                    Some(entry) if entry.operation == Operation::Put => {
                        Err(unavailable("a replica is behind"))
                    }
                    _ => {
                        self.lock().own = None;
                        self.begin().await?;
                        Ok(Renewed::Anew)
                    }
                }
            }
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn end_the_dead(&self) {
        let dead: Vec<(String, u64)> = {
            let known = self.lock();
            let quiet = |seen: &Seen| seen.since.elapsed() > self.lease;
            let others = known.others.iter().filter(|(_, seen)| quiet(seen));
            others
                .map(|(name, seen)| (name.clone(), seen.revision))
                .collect()
        };
        for (name, revision) in dead {
            if revision == 0 {
                self.lock().others.remove(&name);
                continue;
            }
            let ended = self.end_by_revision(&name, revision).await;
            match ended {
                Ok(()) => {
                    tracing::warn!(session = %name, "a relay stood still; its session is ended");
                    self.lock().others.remove(&name);
                }
                // It has moved: the watch tells, or the next read does.
                Err(error) => {
                    tracing::debug!(session = %name, %error, "not ended");
                    if let Ok(Some(entry)) = self.store.entry(key(&name)).await {
                        let mut known = self.lock();
                        if entry.operation == Operation::Put {
                            known.note(&name, entry.revision, entry.value == WATCHES);
                        } else {
                            known.others.remove(&name);
                        }
                    }
                }
            }
        }
    }

    async fn end_by_revision(&self, name: &str, revision: u64) -> Result<(), kv::PurgeError> {
        let ended = self
            .store
            .purge_expect_revision_with_ttl(key(name), revision, MARK_TTL);
        ended.await.map(drop)
    }

    /// Follows the sessions of others until the outbox closes.
    pub(super) async fn follow(shared: Arc<Shared>) {
        loop {
            let watch = shared
                .sessions
                .store
                .watch_with_history(format!("{KEY_PREFIX}*"))
                .await;
            if let Ok(mut watch) = watch {
                loop {
                    let next = tokio::select! {
                        () = shared.closing.cancelled() => return,
                        next = watch.next() => next,
                    };
                    match next {
                        Some(Ok(entry)) => shared.sessions.saw(&entry),
                        _ => break,
                    }
                }
            }
            tokio::select! {
                () = shared.closing.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    fn saw(&self, entry: &kv::Entry) {
        let Some(name) = entry.key.strip_prefix(KEY_PREFIX) else {
            return;
        };
        let mut known = self.lock();
        if known.own.as_ref().is_some_and(|own| own.name == name) {
            return;
        }
        if entry.operation == Operation::Put {
            known.note(name, entry.revision, entry.value == WATCHES);
        } else {
            known.others.remove(name);
        }
    }

    /// Ends the own session, so that others take the lanes at once.
    pub(super) async fn end(&self) {
        let own = self.lock().own.take();
        if let Some(own) = own
            && let Err(error) = self.end_by_revision(&own.name, own.revision).await
        {
            tracing::warn!(%error, "the session could not be ended; others wait for its lease");
        }
    }
}

enum Renewed {
    Same,
    Anew,
}

impl Known {
    fn note(&mut self, name: &str, revision: u64, watches: bool) {
        let fresh = Seen {
            watches,
            revision,
            since: Instant::now(),
        };
        let seen = self.others.entry(name.to_owned()).or_insert(fresh);
        if seen.revision < revision {
            *seen = Seen {
                watches,
                revision,
                since: Instant::now(),
            };
        }
    }
}

fn key(name: &str) -> String {
    format!("{KEY_PREFIX}{name}")
}

/// Rendezvous hashing: a name's weight for something.
fn weight(name: &str, what: &str) -> u64 {
    let hash = Sha256::new()
        .chain_update(name)
        .chain_update(what)
        .finalize();
    u64::from_le_bytes(hash[..8].try_into().unwrap_or_default())
}
