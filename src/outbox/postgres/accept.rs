//! Stores captures: those that arrive during a transaction share the next one.
//!
//! 1. `BEGIN`, insert into `captures` what is new, read the sums of `backlog`.
//! 2. Past a bound: roll back, and again without what found no room.
//! 3. Insert into `queue`, count, `COMMIT`. Then the callers are answered.
//! 4. What was not inserted is a duplicate, a conflict, or mapped with an old integration.

mod items;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use futures_util::future::{join3, join4};

use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::{
    READ,
    connect::Connection,
    counts::Load,
    database::{Database, Session, lane_number},
    error::Effect,
    row::{RECORD_COLUMNS, record_of},
};
use crate::{
    integration::IntegrationId,
    outbox::{
        Content, EventSet, LaneKey, NewCapture, OutboxError, Submitted, record::encode_status,
        sealing::SealedCapture,
    },
    status::EventStatus,
    vault::unsealed_len,
};

pub(super) use items::{COUNT, OTHER_SLOT, columns, id_of};
use items::{ENQUEUE, Fate, GUARD, INSERT, Item, SLOT, SUMS, answers, first_state, new_record};

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

pub(super) type Channel = (mpsc::Sender<Submission>, mpsc::Receiver<Submission>);

pub(super) fn channel() -> Channel {
    mpsc::channel(QUEUE)
}

/// The committer of an integration.
pub(super) fn committer_of(id: &IntegrationId) -> usize {
    crc32fast::hash(id.as_str().as_bytes()) as usize % COMMITTERS
}

/// Commits groups until the outbox closes.
pub(super) async fn run(database: Arc<Database>, mut arriving: mpsc::Receiver<Submission>) {
    let context = Arc::clone(&database.context);
    loop {
        let first = tokio::select! {
            () = context.closing.cancelled() => return,
            first = arriving.recv() => first,
        };
        let Some(first) = first else { return };
        let mut count = first.captures.len();
        let mut group = vec![first];
        while count < context.options.group_commit_max {
            let Ok(next) = arriving.try_recv() else { break };
            count += next.captures.len();
            group.push(next);
        }
        let begun = Instant::now();
        let (mut captures, mut callers) = (Vec::with_capacity(count), Vec::new());
        for Submission {
            captures: own,
            reply,
        } in group
        {
            callers.push((own.len(), reply));
            captures.extend(own);
        }
        let stored = database.accept(captures).await;
        let metrics = &context.options.metrics;
        metrics.commit(count as u64, begun.elapsed(), stored.is_ok());
        answer(callers, stored);
    }
}

type Caller = (usize, oneshot::Sender<Result<Vec<Submitted>, OutboxError>>);

fn answer(callers: Vec<Caller>, stored: Result<Vec<Submitted>, OutboxError>) {
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

impl Database {
    /// Stores captures; one answer each, in their order.
    async fn accept(&self, captures: Vec<SealedCapture>) -> Result<Vec<Submitted>, OutboxError> {
        let session = self.session()?;
        let connection = self.connection().await?;
        let mut items = self.items(&session, &connection, captures).await?;
        let mut tries = 0;
        while !self.store(&session, &connection, &mut items).await? {
            tries += 1;
            if tries == TRIES {
                return Err(OutboxError::Unavailable(
                    "other relays fill the backlog".to_owned(),
                ));
            }
        }
        self.resolve(&connection, &mut items).await?;
        self.announce_accepted(&session, &items);
        Ok(answers(items))
    }

    async fn items(
        &self,
        session: &Session,
        connection: &Connection,
        captures: Vec<SealedCapture>,
    ) -> Result<Vec<Item>, OutboxError> {
        let ids: HashSet<&IntegrationId> = captures
            .iter()
            .map(|sealed| &sealed.capture.integration_id)
            .collect();
        let ids: Vec<_> = ids.into_iter().collect();
        self.keys(session, connection, &ids).await?;
        let mut first: HashMap<(i64, Uuid), usize> = HashMap::with_capacity(captures.len());
        let mut items = Vec::with_capacity(captures.len());
        for SealedCapture { capture, subject } in captures {
            let integration = session.key(&capture.integration_id);
            let integration = integration.ok_or_else(|| self.away())?;
            let id = id_of(&capture.capture_id);
            let place = items.len();
            let earlier = *first.entry((integration, id)).or_insert(place);
            let (shard, load) = match &capture.content {
                Content::Skip { .. } => (0, Load::default()),
                Content::Send { shard, events } => {
                    let bytes = unsealed_len(&events.identify) + unsealed_len(&events.track);
                    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
                    (*shard, Load { events: 2, bytes })
                }
            };
            items.push(Item {
                lane: lane_number(integration, capture.region, shard),
                fate: if earlier < place {
                    Fate::Repeats(earlier)
                } else {
                    Fate::New
                },
                capture,
                subject,
                integration,
                id,
                load,
            });
        }
        Ok(items)
    }

    /// One transaction. Returns whether it was committed, or has to be tried again without
    /// the items that found no room.
    async fn store(
        &self,
        session: &Session,
        connection: &Connection,
        items: &mut [Item],
    ) -> Result<bool, OutboxError> {
        self.refuse_beyond_bounds(items);
        let new: Vec<usize> = (0..items.len())
            .filter(|place| matches!(items[*place].fate, Fate::New))
            .collect();
        if new.is_empty() {
            return Ok(true);
        }
        let inserted = self.insert(connection, items, &new).await?;
        let mut by_id: HashMap<(i64, Uuid), i64> = inserted.into_iter().collect();
        let stored: Vec<(usize, i64)> = new
            .into_iter()
            .filter_map(|place| {
                let item = &items[place];
                let seq = by_id.remove(&(item.integration, item.id))?;
                Some((place, seq))
            })
            .collect();
        // Again, now that the sums are those of the transaction.
        if stored.is_empty() || self.refuse_beyond_bounds(items) {
            let rolled_back = connection.batch_execute("ROLLBACK");
            connection.commit(READ, rolled_back).await?;
            return Ok(stored.is_empty());
        }
        self.enqueue(session, connection, items, &stored).await?;
        for (place, seq) in stored {
            let item = &mut items[place];
            item.fate = Fate::Stored(seq, Arc::new(new_record(&item.capture)));
        }
        Ok(true)
    }

    /// Marks new items for which there is no room. Returns whether there are any.
    fn refuse_beyond_bounds(&self, items: &mut [Item]) -> bool {
        let counts = self.counts();
        let (mut own, mut all) = (HashMap::<i64, Load>::new(), Load::default());
        let mut refused = false;
        for item in items.iter_mut() {
            if !matches!(item.fate, Fate::New) || item.load.events == 0 {
                continue;
            }
            let own = own.entry(item.integration).or_default();
            let (mut more, mut more_of_all) = (*own, all);
            more.add(item.load);
            more_of_all.add(item.load);
            if let Some(quota) = counts.full(item.integration, more, more_of_all) {
                item.fate = Fate::Full(quota);
                refused = true;
            } else {
                (*own, all) = (more, more_of_all);
            }
        }
        refused
    }

    /// Begins the transaction; returns what was inserted, with its sequence.
    async fn insert(
        &self,
        connection: &Connection,
        items: &[Item],
        new: &[usize],
    ) -> Result<Vec<((i64, Uuid), i64)>, OutboxError> {
        let insert = connection.prepared(INSERT).await?;
        let sums = connection.prepared(SUMS).await?;
        let rows: Vec<&Item> = new.iter().map(|place| &items[*place]).collect();
        let integrations: Vec<i64> = rows.iter().map(|item| item.integration).collect();
        let lanes: Vec<i64> = rows.iter().map(|item| item.lane).collect();
        let ids: Vec<Uuid> = rows.iter().map(|item| item.id).collect();
        let of = |value: fn(&NewCapture) -> i64| -> Vec<i64> {
            rows.iter().map(|item| value(&item.capture)).collect()
        };
        let digests = rows.iter().map(|item| item.capture.digest);
        let digests: Vec<Uuid> = digests.map(Uuid::from_bytes).collect();
        let subjects: Vec<Option<i64>> = rows.iter().map(|item| item.subject).collect();
        let versions = of(|new| new.mapping_version.cast_signed());
        let times = of(|new| new.accept_time.0);
        let revisions = of(|new| new.revision.cast_signed());
        let names = rows.iter().map(|item| item.capture.capture_id.as_str());
        let names: Vec<&str> = names.collect();
        let statuses: Vec<Vec<u8>> = rows
            .iter()
            .map(|item| encode_status(&EventStatus::new(first_state(&item.capture))))
            .collect();
        let traces: Vec<Option<Vec<u8>>> = rows
            .iter()
            .map(|item| item.capture.trace.map(|trace| trace.to_bytes().to_vec()))
            .collect();
        let distinct: Vec<i64> = integrations
            .iter()
            .copied()
            .collect::<HashSet<_>>()
            .into_iter()
            .collect();
        let work = async {
            let (begun, inserted, sums) = join3(
                connection.batch_execute("BEGIN"),
                connection.query(
                    &insert,
                    &[
                        &integrations,
                        &lanes,
                        &ids,
                        &digests,
                        &subjects,
                        &versions,
                        &times,
                        &revisions,
                        &names,
                        &statuses,
                        &traces,
                    ],
                ),
                connection.query(&sums, &[&distinct]),
            )
            .await;
            begun?;
            Ok((inserted?, sums?))
        };
        connection.enter_transaction();
        let (inserted, sums) = connection.run(READ, work).await?;
        self.note_sums(&sums)?;
        let inserted = inserted.iter();
        Ok(inserted
            .map(|row| ((row.get(1), row.get(2)), row.get(0)))
            .collect())
    }

    /// Notes what waits, as a transaction has read it.
    fn note_sums(&self, rows: &[tokio_postgres::Row]) -> Result<(), OutboxError> {
        let required = self.context.connection.require_synchronous_standby;
        let mut counts = self.counts();
        for row in rows {
            let load = Load {
                events: row.get(1),
                bytes: row.get(2),
            };
            counts.set(row.get(0), load);
            if required && row.get::<_, &str>(3).is_empty() {
                return Err(no_standby());
            }
        }
        Ok(())
    }

    /// Puts the payloads of inserted items into the queue, counts them, and commits.
    async fn enqueue(
        &self,
        session: &Session,
        connection: &Connection,
        items: &[Item],
        stored: &[(usize, i64)],
    ) -> Result<(), OutboxError> {
        let guard = connection.prepared(GUARD).await?;
        let enqueue = connection.prepared(ENQUEUE).await?;
        let count = connection.prepared(COUNT).await?;
        let (mut lanes, mut seqs) = (Vec::<i64>::new(), Vec::<i64>::new());
        let mut sizes = [Vec::<i32>::new(), Vec::new()];
        let mut payloads = [Vec::<&[u8]>::new(), Vec::new()];
        let mut loads = HashMap::<i64, Load>::new();
        for (place, seq) in stored {
            let item = &items[*place];
            let Content::Send { events, .. } = &item.capture.content else {
                continue;
            };
            lanes.push(item.lane);
            seqs.push(*seq);
            for (place, payload) in [&events.identify, &events.track].into_iter().enumerate() {
                sizes[place].push(i32::try_from(unsealed_len(payload)).unwrap_or(i32::MAX));
                payloads[place].push(payload);
            }
            loads.entry(item.integration).or_default().add(item.load);
        }
        let [identify_sizes, track_sizes] = &sizes;
        let [identify, track] = &payloads;
        let (keys, events, bytes) = columns(&loads);
        let distinct: HashSet<i64> = stored
            .iter()
            .map(|(place, _)| items[*place].integration)
            .collect();
        let distinct: Vec<i64> = distinct.into_iter().collect();
        let work = async {
            let (guarded, queued, counted, committed) = join4(
                connection.query(&guard, &[&distinct]),
                connection.execute(
                    &enqueue,
                    &[&lanes, &seqs, identify_sizes, track_sizes, identify, track],
                ),
                connection.execute(&count, &[&session.relay, &keys, &events, &bytes, &SLOT]),
                connection.batch_execute("COMMIT"),
            )
            .await;
            guarded?;
            queued?;
            counted?;
            committed
        };
        connection.commit(Effect::Commit, work).await?;
        self.confirm_commit(connection).await?;
        let mut counts = self.counts();
        for (integration, load) in loads {
            let mut sum = counts.of(integration);
            sum.add(load);
            counts.set(integration, sum);
        }
        Ok(())
    }

    /// Refuses to call a commit durable whose wait for the standby ended because none is
    /// required any more.
    async fn confirm_commit(&self, connection: &Connection) -> Result<(), OutboxError> {
        if self.context.connection.require_synchronous_standby {
            const SQL: &str = "SELECT current_setting('synchronous_standby_names')";
            let row = connection.row(Effect::Commit, SQL, &[]).await?;
            if row.get::<_, &str>(0).is_empty() {
                return Err(OutboxError::OutcomeUnknown(no_standby().to_string()));
            }
        }
        Ok(())
    }

    /// Finds out what became of items that were not inserted.
    async fn resolve(
        &self,
        connection: &Connection,
        items: &mut [Item],
    ) -> Result<(), OutboxError> {
        let open: Vec<usize> = (0..items.len())
            .filter(|place| matches!(items[*place].fate, Fate::New | Fate::Full(_)))
            .collect();
        if open.is_empty() {
            return Ok(());
        }
        let of_open = open.iter().map(|place| &items[*place]);
        let (keys, ids): (Vec<i64>, Vec<Uuid>) =
            of_open.map(|item| (item.integration, item.id)).unzip();
        let sql = format!(
            "SELECT c.digest, c.integration, c.id, {RECORD_COLUMNS}
             FROM unnest($1::int8[], $2::uuid[]) AS i (integration, id)
             JOIN captures c ON c.integration = i.integration AND c.id = i.id"
        );
        let rows = connection.rows(READ, &sql, &[&keys, &ids]).await?;
        let found: HashMap<(i64, Uuid), &tokio_postgres::Row> = rows
            .iter()
            .map(|row| ((row.get(1), row.get(2)), row))
            .collect();
        if !found.is_empty() {
            // A capture may have been committed without its standby. This commit waits for the
            // standby, and so for all before it.
            const COMMIT: &str = "SELECT pg_logical_emit_message(true, 'segment-relay', '')";
            connection.rows(Effect::Commit, COMMIT, &[]).await?;
        }
        for place in open {
            let item = &mut items[place];
            let submitted = match found.get(&(item.integration, item.id)) {
                Some(row) if *row.get::<_, Uuid>(0).as_bytes() == item.capture.digest => {
                    let id = item.capture.integration_id.clone();
                    Submitted::Duplicate(Arc::new(record_of(id, row, 3)?))
                }
                Some(_) => Submitted::Conflict,
                None => match item.fate {
                    Fate::Full(quota) => Submitted::Full(quota),
                    _ => Submitted::Stale,
                },
            };
            item.fate = Fate::Known(submitted);
        }
        Ok(())
    }

    /// Tells delivery and watchers of what was stored.
    fn announce_accepted(&self, session: &Session, items: &[Item]) {
        let (mut lanes, mut records) = (HashSet::<LaneKey>::new(), Vec::new());
        for item in items {
            let Fate::Stored(seq, record) = &item.fate else {
                continue;
            };
            if let Content::Send { shard, .. } = item.capture.content {
                lanes.insert(LaneKey {
                    integration_id: record.integration_id.clone(),
                    region: record.region,
                    shard,
                });
            }
            records.push((*seq, Arc::clone(record), EventSet::BOTH));
        }
        self.tell_lanes(session, lanes);
        self.tell_accepted(session, records);
    }
}

fn no_standby() -> OutboxError {
    OutboxError::Unavailable(
        "there is no synchronous standby, and [postgres] require_synchronous_standby is set"
            .to_owned(),
    )
}
