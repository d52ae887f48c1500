//! Stores captures: those that arrive during a transaction share the next one.
//!
//! 1. `BEGIN`, insert into `captures` what is new, read the sums of `backlog`.
//! 2. Past a bound: roll back, and again without what found no room.
//! 3. Insert into `queue`, count, `COMMIT`. Then the callers are answered.
//! 4. What was not inserted is a duplicate, a conflict, or mapped with an old integration.
//!
//! A skipped capture leaves its id free (`Outbox::submit`): the row is updated. Of several in a
//! group the last one is stored, or the one before it where that finds no room.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    counts::{COUNT, Load, Loads, SLOT},
    database::{Call, Database, lane_key, lane_number},
    row::{RECORD_COLUMNS, RECORDS, record_of},
    sql::{Arguments, Part, arguments, columns},
};
use crate::{
    integration::IntegrationId,
    outbox::{
        Content, EventSet, NewCapture, OutboxError, Quota, Submitted, record::encode_status,
        sealing::SealedCapture,
    },
    status::{CaptureRecord, EventStatus, State},
    trace::TraceLink,
    vault::unsealed_len,
};

/// Submissions that wait for a committer; a full queue makes callers wait.
const QUEUE: usize = 4_096;
/// Committers of a database. Captures of an integration keep to one, and so to their order.
pub(super) const COMMITTERS: usize = 4;
/// Transactions tried for one group while others fill the backlog.
const TRIES: usize = 4;

/// Captures to store, and who waits for the answer.
pub(super) struct Submission {
    pub(super) captures: Vec<SealedCapture>,
    pub(super) reply: oneshot::Sender<Result<Vec<Submitted>, OutboxError>>,
}

pub(super) fn channel() -> (mpsc::Sender<Submission>, mpsc::Receiver<Submission>) {
    mpsc::channel(QUEUE)
}

/// The committer of an integration.
pub(super) fn committer_of(id: &IntegrationId) -> usize {
    crc32fast::hash(id.as_str().as_bytes()) as usize % COMMITTERS
}

/// Commits groups until the outbox closes.
pub(super) async fn run(database: Arc<Database>, mut arriving: mpsc::Receiver<Submission>) {
    let context = Arc::clone(&database.context);
    while let Some(Some(first)) = context.closing.run_until_cancelled(arriving.recv()).await {
        let (mut captures, mut callers) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        while let Some(submission) = next {
            callers.push((submission.captures.len(), submission.reply));
            captures.extend(submission.captures);
            let has_room = captures.len() < context.options.group_commit_max;
            next = has_room.then(|| arriving.try_recv().ok()).flatten();
        }
        let (count, begun) = (captures.len() as u64, Instant::now());
        let stored = database.accept(captures).await;
        let metrics = &context.options.metrics;
        metrics.commit(count, begun.elapsed(), stored.is_ok());
        let mut stored = stored.map(Vec::into_iter);
        for (count, reply) in callers {
            let own = match &mut stored {
                Ok(all) => Ok(all.by_ref().take(count).collect()),
                Err(error) => Err(error.clone()),
            };
            // An error says that the caller has gone.
            let _ = reply.send(own);
        }
    }
}

/// A capture on its way into the tables.
struct Item {
    capture: NewCapture,
    subject: Option<i64>,
    integration: i64,
    lane: i64,
    id: Uuid,
    load: Load,
    /// An earlier item of the group with the same id in whose place this one is stored.
    replaces: Option<usize>,
    fate: Fate,
}

enum Fate {
    /// To be inserted.
    New,
    /// Inserted as this sequence.
    Stored(i64, Arc<CaptureRecord>),
    /// There is no room, unless it is stored already.
    Full(Quota),
    /// The same id as an earlier item of the group.
    Repeats(usize),
    /// A later item of the group is stored in its place, unless that finds no room.
    Replaced(usize),
    Known(Submitted),
}

impl Item {
    fn is_new(&self) -> bool {
        matches!(self.fate, Fate::New)
    }

    /// Whether it is not known yet what became of an item.
    fn is_open(items: &[Self], place: usize) -> bool {
        match items[place].fate {
            Fate::New | Fate::Full(_) => true,
            Fate::Replaced(by) => Self::is_open(items, by),
            Fate::Stored(..) | Fate::Repeats(_) | Fate::Known(_) => false,
        }
    }

    /// What became of an item that was not inserted, by digest and record of what is stored.
    fn known(&self, stored: Option<([u8; 16], CaptureRecord)>) -> Submitted {
        if let Some((digest, record)) = stored {
            if !self.capture.replaces(&record, &digest) {
                return match digest == self.capture.digest {
                    true => Submitted::Duplicate(Arc::new(record)),
                    false => Submitted::Conflict,
                };
            }
            if let Fate::Replaced(_) = self.fate {
                // What replaced it repeats what is stored.
                return Submitted::Accepted(Arc::new(self.record()));
            }
        }
        match self.fate {
            Fate::Full(quota) => Submitted::Full(quota),
            _ => Submitted::Stale,
        }
    }

    fn state(&self) -> State {
        match &self.capture.content {
            Content::Send { .. } => State::Queued,
            Content::Skip { reason } => State::Skipped { reason: *reason },
        }
    }

    fn record(&self) -> CaptureRecord {
        let capture = &self.capture;
        CaptureRecord {
            integration_id: capture.integration_id.clone(),
            capture_id: capture.capture_id.clone(),
            region: capture.region,
            mapping_version: capture.mapping_version,
            accept_time: capture.accept_time,
            queue_time: capture.accept_time,
            identify: EventStatus::new(self.state()),
            track: EventStatus::new(self.state()),
            attempts: Vec::new(),
            trace: capture.trace.clone(),
        }
    }
}

/// The key of a capture id.
pub(super) fn key_of_id(capture_id: &str) -> Uuid {
    let mut half = [0; 16];
    half.copy_from_slice(&Sha256::digest(capture_id)[..16]);
    Uuid::from_bytes(half)
}

impl Database {
    /// Stores captures; one answer each, in their order.
    async fn accept(&self, captures: Vec<SealedCapture>) -> Result<Vec<Submitted>, OutboxError> {
        let call = self.call().await?;
        let mut items = call.items(captures).await?;
        let mut tries = 0;
        while !call.store(&mut items).await? {
            tries += 1;
            if tries == TRIES {
                let text = "other relays fill the backlog".to_owned();
                return Err(OutboxError::Unavailable(text));
            }
        }
        call.resolve(&mut items).await?;
        call.announce(&items);
        Ok(answers(&items))
    }

    /// Marks new items for which there is no room. Returns whether there are any.
    fn refuse_beyond_bounds(&self, items: &mut [Item]) -> bool {
        let counts = self.counts();
        let (mut room, mut refused, mut revived) = (counts.room(), false, Vec::new());
        let with_events = items.iter_mut();
        for item in with_events.filter(|it| it.is_new() && it.load.events > 0) {
            if let Err(quota) = room.take(item.integration, item.load) {
                item.fate = Fate::Full(quota);
                refused = true;
                revived.extend(item.replaces);
            }
        }
        for place in revived {
            items[place].fate = Fate::New;
        }
        refused
    }
}

impl Call<'_> {
    async fn items(&self, captures: Vec<SealedCapture>) -> Result<Vec<Item>, OutboxError> {
        let ids = captures.iter().map(|sealed| &sealed.capture.integration_id);
        let ids: BTreeSet<&IntegrationId> = ids.collect();
        self.make_keys(&Vec::from_iter(ids)).await?;
        let mut first: HashMap<(i64, Uuid), usize> = HashMap::with_capacity(captures.len());
        let mut items: Vec<Item> = Vec::with_capacity(captures.len());
        for (place, SealedCapture { capture, subject }) in captures.into_iter().enumerate() {
            let integration = self.session.key(&capture.integration_id);
            let integration = integration.ok_or_else(|| self.database.away())?;
            let id = key_of_id(&capture.capture_id);
            let earlier = *first.entry((integration, id)).or_insert(place);
            let before = items.get(earlier);
            let replaces = before
                .is_some_and(|before| capture.replaces(&before.record(), &before.capture.digest));
            if replaces {
                items[earlier].fate = Fate::Replaced(place);
                first.insert((integration, id), place);
            }
            let (shard, load) = match &capture.content {
                Content::Skip { .. } => (0, Load::default()),
                Content::Send { shard, events } => {
                    let bytes = unsealed_len(&events.identify) + unsealed_len(&events.track);
                    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
                    (*shard, Load { events: 2, bytes })
                }
            };
            let lane = lane_number(integration, capture.region, shard);
            let fate = match earlier < place && !replaces {
                true => Fate::Repeats(earlier),
                false => Fate::New,
            };
            items.push(Item {
                capture,
                subject,
                integration,
                lane,
                id,
                load,
                replaces: replaces.then_some(earlier),
                fate,
            });
        }
        Ok(items)
    }

    /// One transaction. Returns whether it was committed, or has to be tried again without
    /// the items that found no room.
    async fn store(&self, items: &mut [Item]) -> Result<bool, OutboxError> {
        let database = self.database;
        database.refuse_beyond_bounds(items);
        let new: Vec<&Item> = items.iter().filter(|item| item.is_new()).collect();
        if new.is_empty() {
            return Ok(true);
        }
        let keys = Vec::from_iter(BTreeSet::from_iter(new.iter().map(|item| item.integration)));
        let rows = columns!(new, item =>
            item.integration, item.lane, item.id, Uuid::from_bytes(item.capture.digest),
            item.subject, item.capture.mapping_version.cast_signed(),
            item.capture.accept_time.0, item.capture.revision.cast_signed(),
            item.capture.capture_id.as_str(), encode_status(&EventStatus::new(item.state())),
            item.capture.trace.as_ref().map(TraceLink::to_bytes));
        let found = self
            .transact(
                Part::First,
                &[(INSERT, &arguments(&rows)), (SUMS, &[&keys])],
            )
            .await?;
        drop(rows);
        self.note_sums(&found[1])?;
        let inserted = found[0].iter();
        let inserted = inserted.map(|row| ((row.get(1), row.get(2)), row.get(0)));
        let inserted: HashMap<(i64, Uuid), i64> = inserted.collect();
        // Again, now that the sums are those of the transaction.
        if inserted.is_empty() || database.refuse_beyond_bounds(items) {
            self.rollback().await?;
            return Ok(inserted.is_empty());
        }
        let new = items.iter_mut().filter(|item| item.is_new());
        let stored =
            new.filter_map(|item| Some((*inserted.get(&(item.integration, item.id))?, item)));
        let mut stored: Vec<(i64, &mut Item)> = stored.collect();
        self.enqueue(&stored, &keys).await?;
        for (seq, item) in &mut stored {
            item.fate = Fate::Stored(*seq, Arc::new(item.record()));
        }
        Ok(true)
    }

    /// Notes what waits, as a transaction has read it.
    fn note_sums(&self, rows: &[Row]) -> Result<(), OutboxError> {
        let required = self.database.context.connection.require_synchronous_standby;
        let mut counts = self.database.counts();
        for row in rows {
            counts.set(row.get(0), Load::of(row, 1));
            if required && row.get::<_, &str>(3).is_empty() {
                return Err(OutboxError::Unavailable(NO_STANDBY.to_owned()));
            }
        }
        Ok(())
    }

    /// Puts the payloads of inserted items into the queue, counts them, and commits.
    async fn enqueue(&self, stored: &[(i64, &mut Item)], keys: &[i64]) -> Result<(), OutboxError> {
        let with_events = stored
            .iter()
            .filter_map(|(seq, item)| match &item.capture.content {
                Content::Send { events, .. } => Some((item.lane, *seq, events)),
                Content::Skip { .. } => None,
            });
        let with_events: Vec<_> = with_events.collect();
        let size = |payload: &[u8]| i32::try_from(unsealed_len(payload)).unwrap_or(i32::MAX);
        let rows = columns!(with_events, one =>
            one.0, one.1, size(&one.2.identify), size(&one.2.track),
            one.2.identify.as_slice(), one.2.track.as_slice());
        let mut loads = Loads::default();
        for (_, item) in stored.iter().filter(|(_, item)| item.load.events > 0) {
            loads.add(item.integration, item.load);
        }
        let counted = loads.columns();
        let mut counted = arguments(&counted);
        counted.push(&self.session.relay);
        counted.push(&SLOT);
        let statements: [(&str, Arguments<'_>); 3] = [
            (GUARD, &[&keys]),
            (ENQUEUE, &arguments(&rows)),
            (COUNT, &counted),
        ];
        self.transact(Part::Last, &statements).await?;
        self.confirm_commit().await?;
        let mut counts = self.database.counts();
        for (_, item) in stored {
            counts.add(item.integration, item.load);
        }
        Ok(())
    }

    /// Refuses to call a commit durable whose wait for the standby ended because none is
    /// required any more.
    async fn confirm_commit(&self) -> Result<(), OutboxError> {
        const SQL: &str = "SELECT current_setting('synchronous_standby_names')";
        if self.database.context.connection.require_synchronous_standby {
            let asked = self.row(SQL, &[]).await;
            let row = asked.map_err(|error| OutboxError::OutcomeUnknown(error.to_string()))?;
            if row.get::<_, &str>(0).is_empty() {
                return Err(OutboxError::OutcomeUnknown(NO_STANDBY.to_owned()));
            }
        }
        Ok(())
    }

    /// Finds out what became of items that were not inserted.
    async fn resolve(&self, items: &mut [Item]) -> Result<(), OutboxError> {
        let open = (0..items.len()).filter(|place| Item::is_open(items, *place));
        let open: Vec<usize> = open.collect();
        if open.is_empty() {
            return Ok(());
        }
        let sql = format!(
            "SELECT c.digest, c.integration, c.id, {RECORD_COLUMNS}
             FROM unnest($1::int8[], $2::uuid[]) AS o (integration, id), {RECORDS}
             WHERE c.integration = o.integration AND c.id = o.id"
        );
        let keys = columns!(open, place => items[*place].integration, items[*place].id);
        let rows = self.rows(&sql, &arguments(&keys)).await?;
        drop(keys);
        let found = rows.iter().map(|row| ((row.get(1), row.get(2)), row));
        let found: HashMap<(i64, Uuid), &Row> = found.collect();
        if !found.is_empty() {
            // A capture may have been committed without its standby. This commit waits for the
            // standby, and so for all before it.
            const COMMIT: &str = "SELECT pg_logical_emit_message(true, 'segment-relay', '')";
            self.apply(COMMIT, &[]).await?;
        }
        for place in open {
            let item = &mut items[place];
            let stored = found.get(&(item.integration, item.id));
            let stored =
                stored.map(|row| Ok((row.get::<_, Uuid>(0).into_bytes(), record_of(row, 3)?)));
            item.fate = Fate::Known(item.known(stored.transpose()?));
        }
        Ok(())
    }

    /// Tells delivery and watchers of what was stored.
    fn announce(&self, items: &[Item]) {
        let (mut lanes, mut records) = (BTreeSet::new(), Vec::new());
        for item in items {
            let Fate::Stored(seq, record) = &item.fate else {
                continue;
            };
            if item.load.events > 0 {
                let id = record.integration_id.clone();
                lanes.insert((item.lane, lane_key(id, item.lane)));
            }
            records.push((*seq, Arc::clone(record), EventSet::BOTH));
        }
        self.wake(lanes);
        self.tell_accepted(records);
    }
}

fn answers(items: &[Item]) -> Vec<Submitted> {
    let mut answers: Vec<Submitted> = Vec::with_capacity(items.len());
    for item in items {
        let answer = match &item.fate {
            Fate::Stored(_, record) => Submitted::Accepted(Arc::clone(record)),
            Fate::Replaced(_) => Submitted::Accepted(Arc::new(item.record())),
            Fate::Known(known) => known.clone(),
            Fate::Full(quota) => Submitted::Full(*quota),
            Fate::New => Submitted::Stale,
            Fate::Repeats(first) => {
                let same = items[*first].capture.digest == item.capture.digest;
                match &answers[*first] {
                    Submitted::Accepted(record) | Submitted::Duplicate(record) if same => {
                        Submitted::Duplicate(Arc::clone(record))
                    }
                    Submitted::Accepted(_) | Submitted::Duplicate(_) => Submitted::Conflict,
                    other => other.clone(),
                }
            }
        };
        answers.push(answer);
    }
    answers
}

const NO_STANDBY: &str =
    "there is no synchronous standby, and [postgres] require_synchronous_standby is set";

/// Sequences follow the order of arrival. Rows are inserted in the order of their ids, so that
/// two relays that store the same captures do not wait for each other.
const INSERT: &str = "
    INSERT INTO captures (seq, integration, lane, id, digest, subject, mapping_version,
        accept_millis, queue_millis, capture_id, identify, track, trace)
    SELECT i.seq, i.integration, i.lane, i.id, i.digest, i.subject, i.mapping_version,
        i.accept_millis, i.accept_millis, i.capture_id, i.status, i.status, i.trace
    FROM (SELECT nextval('capture_seq') AS seq, ordered.*
        FROM (SELECT * FROM unnest($1::int8[], $2::int8[], $3::uuid[], $4::uuid[], $5::int8[],
                $6::int8[], $7::int8[], $8::int8[], $9::text[], $10::bytea[], $11::bytea[])
            WITH ORDINALITY AS t (integration, lane, id, digest, subject, mapping_version,
                accept_millis, revision, capture_id, status, trace, place)
            ORDER BY place) AS ordered) AS i
    WHERE EXISTS (SELECT 1 FROM integrations own WHERE own.key = i.integration
        AND own.state = 'active' AND i.revision IN (0, own.revision))
    ORDER BY i.integration, i.id
    ON CONFLICT (integration, id) DO UPDATE
    SET seq = excluded.seq, lane = excluded.lane, digest = excluded.digest,
        subject = excluded.subject, mapping_version = excluded.mapping_version,
        accept_millis = excluded.accept_millis, queue_millis = excluded.queue_millis,
        stored_at = excluded.stored_at, identify = excluded.identify, track = excluded.track,
        attempts = NULL, trace = excluded.trace
    -- Skipped (state 4) and not erased (reason 14): `CaptureRecord::binds_id`.
    WHERE substring(captures.identify FOR 2) = '\\x0804'
        AND substring(captures.track FOR 2) = '\\x0804'
        AND '\\x0804100e' NOT IN
            (substring(captures.identify FOR 4), substring(captures.track FOR 4))
        AND (substring(excluded.identify FOR 2) <> '\\x0804'
            OR captures.digest <> excluded.digest)
    RETURNING seq, integration, id";

const SUMS: &str = "
    SELECT k.key, coalesce(sum(b.events), 0)::int8, coalesce(sum(b.bytes), 0)::int8,
        current_setting('synchronous_standby_names')
    FROM unnest($1::int8[]) AS k (key) LEFT JOIN backlog b ON b.integration = k.key
    GROUP BY k.key";

/// Fails, by a division by zero, where an integration began to move to another database since
/// the captures were inserted: the move waits for the transactions that it has found.
const GUARD: &str = "
    SELECT 1 / (NOT EXISTS (SELECT 1 FROM integrations
        WHERE key = ANY ($1::int8[]) AND state <> 'active'))::int4";

const ENQUEUE: &str = "
    INSERT INTO queue (lane, replayed, seq, identify_bytes, track_bytes, identify, track)
    SELECT i.lane, false, i.seq, i.identify_bytes, i.track_bytes, i.identify, i.track
    FROM unnest($1::int8[], $2::int8[], $3::int4[], $4::int4[], $5::bytea[], $6::bytea[])
        AS i (lane, seq, identify_bytes, track_bytes, identify, track)";
