//! Takes what an embedded outbox held. It takes no session, so no lane is delivered from here.

use std::{collections::HashMap, sync::Arc, time::Duration};

use prost::Message;

use super::{
    JetStreamError, NatsHandle,
    chunk::{Packer, ToPack},
    message::{Dead, Payload, StoredRecord, Waiting, decode},
    state::StateStore,
    wire::{StoreError, ToStore},
};
use crate::{
    event::EventType,
    outbox::{
        OutboxError, record,
        sealing::Sealing,
        sqlite::export::{Exported, StoredPayload},
    },
    status::{CaptureRecord, State},
    time::UnixMillis,
    vault::Vault,
};

/// Tries of one piece.
const TRIES: u32 = 60;
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// Marks of moved captures have this bit, with their place in the embedded outbox: a
/// second run knows them again.
const MOVED: u64 = 1 << 63;

/// The shared outbox, as it is filled.
pub(in crate::outbox) struct Import {
    handle: NatsHandle,
    pub(in crate::outbox) state: StateStore,
    pub(in crate::outbox) sealing: Arc<Sealing>,
    remember: Duration,
    origin: u64,
}

/// What became of a piece.
#[derive(Debug, Default)]
pub(in crate::outbox) struct Imported {
    /// Those that the shared outbox has now, by their place in the embedded one.
    pub(in crate::outbox) moved: Vec<i64>,
    /// Those whose id the shared outbox knows with the same content.
    pub(in crate::outbox) known: Vec<i64>,
    /// Those whose id it knows with other content.
    pub(in crate::outbox) conflicts: Vec<(i64, String)>,
}

impl Import {
    pub(in crate::outbox) async fn open(
        handle: NatsHandle,
        vault: &Arc<Vault>,
        index_key: &[u8; 32],
        remember: Duration,
    ) -> Result<Self, JetStreamError> {
        handle.refuse_misfits().await?;
        let state = StateStore::open(&handle.wire, &handle.layout).await?;
        if state.index().await?.is_none() {
            state.adopt_index(vault, index_key).await?;
        }
        let stored = state.index_key(vault).await?;
        if *stored != *index_key {
            return Err(JetStreamError::Refused(
                "the shared outbox holds captures of another origin, whose ids and people are blinded \
                 with another key; let this embedded outbox be drained by its own relay instead"
                    .to_owned(),
            ));
        }
        let sealing = Arc::new(Sealing::new(Arc::clone(vault), index_key, false));
        let mut origin = [0; 8];
        origin.copy_from_slice(&index_key[..8]);
        Ok(Self {
            handle,
            state,
            sealing,
            remember,
            origin: u64::from_le_bytes(origin),
        })
    }

    /// Stores captures in their order; all are of one partition or another.
    pub(in crate::outbox) async fn take(
        &self,
        captures: Vec<Exported>,
        now: UnixMillis,
    ) -> Result<Imported, OutboxError> {
        let mut imported = Imported::default();
        let mut partitions: HashMap<usize, Vec<Exported>> = HashMap::new();
        for capture in captures {
            let partition = self.handle.layout.partition(&capture.integration_id);
            partitions.entry(partition).or_default().push(capture);
        }
        for (partition, own) in partitions {
            self.take_own(partition, own, now, &mut imported).await?;
        }
        Ok(imported)
    }

    async fn take_own(
        &self,
        partition: usize,
        mut left: Vec<Exported>,
        now: UnixMillis,
        imported: &mut Imported,
    ) -> Result<(), OutboxError> {
        let mut tries = 0;
        while !left.is_empty() {
            let mut packer = Packer::new(&self.handle.layout);
            for capture in &left {
                self.pack(&mut packer, capture, now)?;
            }
            match self.handle.wire.store(packer.finish()).await {
                Ok(_) => {
                    imported
                        .moved
                        .extend(left.drain(..).map(|one| one.sequence));
                    return Ok(());
                }
                Err(StoreError::Conflict) => self.sort_out(partition, &mut left, imported).await?,
                Err(error) => {
                    tracing::warn!(%error, "trying again");
                    tokio::time::sleep(TRY_AGAIN).await;
                }
            }
            tries += 1;
            if tries > TRIES {
                return Err(super::wire::unavailable("captures cannot be stored"));
            }
        }
        Ok(())
    }

    /// Takes out those that the shared outbox knows.
    async fn sort_out(
        &self,
        partition: usize,
        left: &mut Vec<Exported>,
        imported: &mut Imported,
    ) -> Result<(), OutboxError> {
        let layout = &self.handle.layout;
        let subject = |one: &Exported| layout.record(&one.integration_id, &one.capture_id);
        let subjects: Vec<String> = left.iter().map(subject).collect();
        let mut known = HashMap::new();
        for stored in self
            .handle
            .wire
            .last_of_each(&layout.stream(partition), &subjects)
            .await?
        {
            known.insert(
                stored.subject,
                decode::<StoredRecord>("record", stored.payload)?,
            );
        }
        for one in std::mem::take(left) {
            match known.get(&subject(&one)) {
                None => left.push(one),
                Some(stored) if stored.mark == self.mark(&one) => imported.moved.push(one.sequence),
                Some(stored) if stored.digest == one.digest => imported.known.push(one.sequence),
                Some(_) => {
                    let name = format!("{}/{}", one.integration_id, one.capture_id);
                    imported.conflicts.push((one.sequence, name));
                }
            }
        }
        Ok(())
    }

    fn mark(&self, one: &Exported) -> u64 {
        (self.origin ^ one.sequence.unsigned_abs()) | MOVED
    }

    /// Adds a capture, and its dead letters, to a batch.
    fn pack(
        &self,
        packer: &mut Packer,
        one: &Exported,
        now: UnixMillis,
    ) -> Result<(), OutboxError> {
        let layout = &self.handle.layout;
        let id = &one.integration_id;
        let record: CaptureRecord = record::decode(id.clone(), one.capture_id.clone(), &one.status)
            .map_err(|error| super::message::damaged("record", &error))?;
        let fresh = |event| record.event(event).state == State::Queued;
        let dead = |event| matches!(record.event(event).state, State::DeadLettered { .. });
        let waiting = one.waiting.as_ref().zip(one.lane.clone());
        let waiting = waiting.map(|(([identify, track], replayed), lane)| {
            let payloads = Waiting {
                record: None,
                identify: identify.clone().map(Payload::from),
                track: track.clone().map(Payload::from),
            };
            (lane, usize::from(*replayed), payloads)
        });
        let left = self.remember.saturating_sub(now.since(one.accept_time));
        let keep = left.max(Duration::from_secs(60));
        let stored = StoredRecord {
            capture_id: one.capture_id.clone(),
            digest: one.digest.clone(),
            status: one.status.clone(),
            subject: one.subject,
            mark: self.mark(one),
            shard: one.lane.as_ref().map(|lane| u32::from(lane.shard)),
            // One that was tried has a history that outcomes can't tell.
            kept_until: now.plus(keep).0,
            own: waiting.is_none() || !EventType::ALL.into_iter().all(fresh),
            ..StoredRecord::default()
        };
        packer.add(ToPack {
            id: id.clone(),
            stored,
            expected: 0,
            keep: (!EventType::ALL.into_iter().any(dead)).then_some(keep),
            waiting,
        });
        for (event, time, payload) in &one.dead {
            let letter = Dead {
                capture_id: one.capture_id.clone(),
                event: event.to_proto() as i32,
                millis: time.0,
                payload: Some(Payload::from(payload.clone())),
                shard: one.lane.as_ref().map_or(0, |lane| u32::from(lane.shard)),
            };
            packer.add_message(ToStore {
                subject: layout.dead(id, &one.capture_id, *event),
                payload: letter.encode_to_vec().into(),
                expected: None,
                keep: None,
            });
        }
        Ok(())
    }
}

impl From<StoredPayload> for Payload {
    /// With the checksum that it had: what was damaged on the old disk is given up as damaged,
    /// and not sent.
    fn from(stored: StoredPayload) -> Self {
        Self {
            bytes: stored.bytes.into(),
            crc: stored.crc,
        }
    }
}
