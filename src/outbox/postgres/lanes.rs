//! Lanes: one holder each, for a time by the database's clock, with a fencing number that
//! every lease and settlement names.

use std::time::{Duration, Instant};

use futures_util::future::join4;

use super::{
    READ,
    connect::Connection,
    database::{Database, Held, Session, key_of},
    error::{Effect, damaged},
    row::{RECORD_COLUMNS, record_of},
};
use crate::outbox::{LaneKey, LeaseBudget, LeasedCapture, OutboxError};

/// How much longer than a request to Segment a lease lasts.
const LEASE_MARGIN: Duration = Duration::from_secs(3);
/// What has to be left of that margin when a request begins.
const SEND_MARGIN: Duration = Duration::from_millis(500);

/// Guess of a capture's payload, until a lease has measured it.
const MEAN_BYTES: usize = 100;

impl Database {
    /// How long a lease of this relay lasts.
    fn lease_length(&self) -> Duration {
        self.context.options.request_timeout + LEASE_MARGIN
    }

    /// Whether a request that begins now ends within the lease of its lane.
    pub(super) fn may_send(&self, lane: &LaneKey) -> bool {
        let held = self.session().ok().and_then(|session| {
            let lane = session.lane(lane)?;
            session.held().get(&lane).copied()
        });
        held.is_some_and(|held| held.since.elapsed() + SEND_MARGIN < LEASE_MARGIN)
    }

    /// The first waiting events of a lane, if this relay holds it or can have it.
    pub(super) async fn lease(
        &self,
        key: &LaneKey,
        budget: LeaseBudget,
    ) -> Result<Vec<LeasedCapture>, OutboxError> {
        let session = self.session()?;
        if !session.prefers(key.integration_id.as_str()) {
            return Ok(Vec::new());
        }
        let connection = self.connection().await?;
        self.keys(&session, &connection, &[&key.integration_id])
            .await?;
        let lane = session.lane(key).ok_or_else(|| self.away())?;
        let before = session.held().get(&lane).copied();
        let mean_bytes = before.map_or(MEAN_BYTES, |held| held.mean_bytes).max(1);
        // A quarter more than fits on average; the rest is left unread.
        let fitting = budget.max_bytes / mean_bytes * 5 / 4 + 1;
        let limit = budget.max_events.min(fitting);
        let since = Instant::now();
        let (taken, rows) = self
            .take_and_read(&session, &connection, lane, (limit, budget.max_bytes))
            .await?;
        let Some((fence, revision)) = taken else {
            // A lease that was lost, or that is withheld for a while: the fence tells.
            return Ok(Vec::new());
        };
        if !session.has_read(key_of(lane), revision) {
            // Another relay has changed it: not with the former write key. The registry reads
            // it and wakes the lane.
            self.context.changes.send_modify(|count| *count += 1);
            return Ok(Vec::new());
        }
        let mut leased = within_budget(key, &rows, budget)?;
        for capture in &mut leased {
            session.sealing.leased(capture)?;
        }
        let bytes: usize = leased.iter().map(payload_bytes).sum();
        let held = Held {
            fence,
            since,
            mean_bytes: bytes.checked_div(leased.len()).unwrap_or(mean_bytes),
        };
        session.held().insert(lane, held);
        Ok(leased)
    }

    /// Takes or renews the lane and reads what waits, in one transaction and one round trip.
    async fn take_and_read(
        &self,
        session: &Session,
        connection: &Connection,
        lane: i64,
        (limit, max_bytes): (usize, usize),
    ) -> Result<(Option<(i64, i64)>, Vec<tokio_postgres::Row>), OutboxError> {
        let read = format!("{READ_QUEUE} {RECORD_COLUMNS} {READ_QUEUE_FROM}");
        let take = connection.prepared(TAKE).await?;
        let read = connection.prepared(&read).await?;
        let length = i64::try_from(self.lease_length().as_millis()).unwrap_or(i64::MAX);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let max_bytes = i64::try_from(max_bytes).unwrap_or(i64::MAX);
        let work = async {
            let (begun, taken, rows, committed) = join4(
                connection.batch_execute("BEGIN"),
                connection.query_opt(&take, &[&lane, &session.relay, &length]),
                connection.query(&read, &[&lane, &session.relay, &limit, &max_bytes]),
                connection.batch_execute("COMMIT"),
            )
            .await;
            begun?;
            let taken = taken?.map(|row| (row.get(0), row.get(1)));
            committed?;
            Ok((taken, rows?))
        };
        // A lost answer costs nothing: the lease ends by itself.
        connection.run(Effect::None, work).await
    }

    /// Gives up lanes that other relays prefer and in which nothing is under way.
    pub(super) async fn release_lanes(&self, session: &Session) -> Result<(), OutboxError> {
        let mut others = Vec::new();
        for (lane, held) in session.held().iter() {
            let id = session.id(key_of(*lane));
            if id.is_none_or(|id| !session.prefers(id.as_str())) {
                others.push((*lane, held.fence));
            }
        }
        self.release(session, others).await
    }

    /// Gives up lanes in which nothing is under way.
    async fn release(&self, session: &Session, lanes: Vec<(i64, i64)>) -> Result<(), OutboxError> {
        if lanes.is_empty() {
            return Ok(());
        }
        let (lanes, fences): (Vec<i64>, Vec<i64>) = lanes.into_iter().unzip();
        const SQL: &str = "
            UPDATE lanes l SET holder = NULL, expires = NULL
            FROM unnest($1::int8[], $2::int8[]) AS i (lane, fence)
            WHERE l.lane = i.lane AND l.fence = i.fence AND l.holder = $3 AND NOT l.busy
            RETURNING l.lane";
        let connection = self.connection().await?;
        for row in connection
            .rows(Effect::None, SQL, &[&lanes, &fences, &session.relay])
            .await?
        {
            session.held().remove(&row.get::<_, i64>(0));
        }
        Ok(())
    }

    /// Gives up all lanes in which nothing is under way, and the registration.
    pub(super) async fn leave(&self, session: &Session) -> Result<(), OutboxError> {
        let lanes: Vec<i64> = session.held().drain().map(|(lane, _)| lane).collect();
        const LANES: &str = "
            UPDATE lanes SET holder = NULL, expires = NULL
            WHERE lane = ANY ($1) AND holder = $2 AND NOT busy";
        const RELAY: &str = "DELETE FROM relays WHERE relay = $1";
        let connection = self.connection().await?;
        connection
            .count(Effect::None, LANES, &[&lanes, &session.relay])
            .await?;
        connection
            .count(Effect::None, RELAY, &[&session.relay])
            .await?;
        Ok(())
    }

    /// The lanes in which events wait: one index probe each.
    pub(super) async fn waiting_lanes(&self) -> Result<Vec<LaneKey>, OutboxError> {
        const SQL: &str = "
            WITH RECURSIVE waiting (lane) AS (
                (SELECT lane FROM queue ORDER BY lane LIMIT 1)
                UNION ALL
                SELECT (SELECT q.lane FROM queue q WHERE q.lane > w.lane ORDER BY q.lane LIMIT 1)
                FROM waiting w WHERE w.lane IS NOT NULL
            ) SELECT lane FROM waiting WHERE lane IS NOT NULL";
        let session = self.session()?;
        let connection = self.connection().await?;
        let rows = connection.rows(READ, SQL, &[]).await?;
        let lanes: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        let keys = lanes.iter().map(|lane| key_of(*lane));
        self.learn_ids(&session, &connection, keys).await?;
        let lanes: Vec<LaneKey> = lanes
            .into_iter()
            .filter_map(|lane| session.lane_key(lane))
            .collect();
        for lane in &lanes {
            // Also where the integration was deleted: its events are given up here.
            self.context.note_waiting(&lane.integration_id, self.place);
        }
        Ok(lanes)
    }
}

/// Bytes of a leased capture in a request.
fn payload_bytes(capture: &LeasedCapture) -> usize {
    let payloads = [&capture.identify, &capture.track];
    payloads.into_iter().flatten().map(|it| it.len() + 1).sum()
}

/// As many of the rows as the budget allows, and at least one.
fn within_budget(
    key: &LaneKey,
    rows: &[tokio_postgres::Row],
    budget: LeaseBudget,
) -> Result<Vec<LeasedCapture>, OutboxError> {
    let mut leased = Vec::with_capacity(rows.len());
    let (mut events, mut bytes) = (0, 0);
    for row in rows {
        let size = |place: usize| usize::try_from(row.get::<_, i32>(place)).unwrap_or(0);
        let payload = |place: usize| {
            let stored = row.try_get::<_, Option<&[u8]>>(place);
            let stored = stored.map_err(|_| damaged("payload"))?;
            Ok::<_, OutboxError>(stored.map(bytes::Bytes::copy_from_slice))
        };
        let identify = payload(3)?;
        // A pair is split only where one event is asked for.
        let alone = budget.max_events == 1 && identify.is_some();
        let track = if alone { None } else { payload(4)? };
        // An import leaves nothing of a payload that it found damaged.
        let payloads = [&identify, &track].into_iter().flatten();
        let damaged = payloads.map(bytes::Bytes::len).any(|len| len == 0);
        let sizes = [(&identify, size(1)), (&track, size(2))];
        for (payload, size) in sizes {
            if payload.is_some() {
                (events, bytes) = (events + 1, bytes + size + 1);
            }
        }
        if !leased.is_empty() && (events > budget.max_events || bytes > budget.max_bytes) {
            break;
        }
        leased.push(LeasedCapture {
            sequence: row.get(0),
            record: record_of(key.integration_id.clone(), row, 5)?.into(),
            damaged,
            identify,
            track,
        });
        if events >= budget.max_events {
            break;
        }
    }
    Ok(leased)
}

/// Takes a free lane with the next fencing number, or renews the own lease.
const TAKE: &str = "
    UPDATE lanes SET
        fence = fence + CASE WHEN holder = $2 THEN 0 ELSE 1 END,
        holder = $2,
        expires = clock_timestamp() + $3::int8::float8 * interval '1 millisecond',
        busy = EXISTS (SELECT 1 FROM queue WHERE queue.lane = $1)
    WHERE lane = $1
        AND (holder = $2 OR holder IS NULL OR expires < clock_timestamp())
        AND coalesce(blocked_until < clock_timestamp(), true)
        AND EXISTS (SELECT 1 FROM integrations i WHERE i.key = $1::int8 / 8 AND i.state = 'active')
    RETURNING fence, (SELECT revision FROM integrations WHERE key = $1::int8 / 8)";

/// The first rows of a lane that this relay holds.
const READ_QUEUE: &str = "SELECT q.seq, q.identify_bytes, q.track_bytes, q.identify, q.track,";
const READ_QUEUE_FROM: &str = "
    FROM (SELECT own.*, (sum(identify_bytes::int8 + track_bytes) OVER (
            ORDER BY replayed, seq ROWS UNBOUNDED PRECEDING))::int8 AS bytes
        FROM (SELECT * FROM queue WHERE lane = $1
            AND EXISTS (SELECT 1 FROM lanes WHERE lane = $1 AND holder = $2
                AND coalesce(blocked_until < clock_timestamp(), true))
            ORDER BY replayed, seq LIMIT $3) AS own) AS q
    JOIN captures c ON c.seq = q.seq
    WHERE q.bytes - q.identify_bytes - q.track_bytes < $4::int8
    ORDER BY q.replayed, q.seq";
