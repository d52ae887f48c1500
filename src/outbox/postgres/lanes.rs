//! Lanes: one holder each, for a time by the database's clock, with a fencing number that
//! every lease and settlement names.

use std::time::{Duration, Instant};

use tokio_postgres::Row;

use super::{
    database::{Call, Database, Held, key_of, lane_key},
    error::{Effect, damaged},
    row::{RECORD_COLUMNS, id_of, record_of},
    sql::{Arguments, Part, arguments, columns},
};
use crate::outbox::{LaneKey, LeaseBudget, LeaseScope, LeasedCapture, OutboxError};

/// How much longer than a request to Segment a lease lasts.
const LEASE_MARGIN: Duration = Duration::from_secs(3);
/// What has to be left of that margin when a request begins.
const SEND_MARGIN: Duration = Duration::from_millis(500);
/// Guess of a capture's payload, until a lease has measured it.
const MEAN_BYTES: usize = 100;

impl Database {
    /// Whether a request that begins now ends within the lease of its lane.
    pub(super) fn may_send(&self, lane: &LaneKey) -> bool {
        let Ok(session) = self.session() else {
            return false;
        };
        let held = session.held();
        let held = session.lane(lane).and_then(|lane| held.get(&lane));
        held.is_some_and(|held| held.since.elapsed() + SEND_MARGIN < LEASE_MARGIN)
    }

    /// The first waiting events of a lane, if this relay holds it or can have it.
    pub(super) async fn lease(
        &self,
        key: &LaneKey,
        budget: LeaseBudget,
        scope: &LeaseScope,
    ) -> Result<Vec<LeasedCapture>, OutboxError> {
        let id = &key.integration_id;
        if !self.session()?.prefers(id.as_str()) {
            return Ok(Vec::new());
        }
        let call = self.call().await?;
        call.key(id).await?;
        let session = &call.session;
        let Some(lane) = session.lane(key) else {
            return Ok(Vec::new());
        };
        let mean_bytes = session.held().get(&lane).map(|held| held.mean_bytes);
        let mean_bytes = mean_bytes.unwrap_or(MEAN_BYTES).max(1);
        // A quarter more than fits on average; the rest is left unread.
        let limit = budget
            .max_events
            .min(budget.max_bytes / mean_bytes * 5 / 4 + 1);
        let number = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        let (limit, max_bytes) = (number(limit), number(budget.max_bytes));
        let length = self.context.options.request_timeout + LEASE_MARGIN;
        let length = i64::try_from(length.as_millis()).unwrap_or(i64::MAX);
        let since = Instant::now();
        let (condition, users) = match scope.map(|user| session.sealing.subject(user)) {
            LeaseScope::All => ("$6::int8[] IS NOT NULL", Vec::new()),
            LeaseScope::Except(users) => (EXCEPT_USERS, users),
            LeaseScope::Only(user) => (ONLY_USERS, vec![user]),
        };
        let from = READ_FROM.replace("{scope}", condition);
        let read = format!("{READ} {RECORD_COLUMNS} {from}");
        let relay = &session.relay;
        let statements: [(&str, Arguments<'_>); 2] = [
            (TAKE, &[&lane, relay, &length]),
            (
                &read,
                &[&lane, relay, &limit, &max_bytes, &id.as_str(), &users],
            ),
        ];
        // A lost answer costs nothing: the lease ends by itself.
        let taken = call.transact_with(Effect::None, Part::Whole, &statements);
        let answers = taken.await?;
        let Some(taken) = answers[0].first() else {
            // A lease that was lost, or that is withheld for a while: the fence tells.
            return Ok(Vec::new());
        };
        if !session.has_read(key_of(lane), taken.get(1)) {
            // Another relay has changed it: not with the former write key. The registry reads
            // it and wakes the lane.
            self.context.note_change();
            return Ok(Vec::new());
        }
        let mut leased = within_budget(&answers[1], budget)?;
        for capture in &mut leased {
            session.sealing.leased(capture)?;
        }
        let bytes: usize = leased.iter().map(payload_bytes).sum();
        let held = Held {
            integration_id: id.clone(),
            fence: taken.get(0),
            since,
            mean_bytes: bytes.checked_div(leased.len()).unwrap_or(mean_bytes),
        };
        session.held().insert(lane, held);
        Ok(leased)
    }

    /// Gives up lanes that other relays prefer and in which nothing is under way.
    pub(super) async fn release_lanes(&self) -> Result<(), OutboxError> {
        const SQL: &str = "
            UPDATE lanes l SET holder = NULL, expires = NULL
            FROM unnest($1::int8[], $2::int8[]) AS i (lane, fence)
            WHERE l.lane = i.lane AND l.fence = i.fence AND l.holder = $3 AND NOT l.busy
            RETURNING l.lane";
        let session = self.session()?;
        let is_others = |held: &Held| !session.prefers(held.integration_id.as_str());
        let lanes: Vec<(i64, i64)> = {
            let held = session.held();
            let others = held.iter().filter(|(_, held)| is_others(held));
            others.map(|(lane, held)| (*lane, held.fence)).collect()
        };
        if lanes.is_empty() {
            return Ok(());
        }
        let call = self.call().await?;
        let rows = columns!(lanes, one => one.0, one.1);
        let mut arguments = arguments(&rows);
        arguments.push(&session.relay);
        for row in call.rows(SQL, &arguments).await? {
            session.held().remove(&row.get::<_, i64>(0));
        }
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
            ) SELECT w.lane, i.integration_id FROM waiting w JOIN integrations i ON i.key = w.lane / 8
            WHERE w.lane IS NOT NULL";
        let rows = self.call().await?.rows(SQL, &[]).await?;
        let lanes = rows.iter().map(lane_of).collect::<Result<Vec<_>, _>>()?;
        for lane in &lanes {
            // Also where the integration was deleted: its events are given up here.
            self.context.note_waiting(&lane.integration_id, self.place);
        }
        Ok(lanes)
    }
}

impl Call<'_> {
    /// Lanes by their numbers.
    pub(super) async fn lanes(&self, lanes: &[i64]) -> Result<Vec<(i64, LaneKey)>, OutboxError> {
        const SQL: &str = "
            SELECT l.lane, i.integration_id
            FROM unnest($1::int8[]) AS l (lane) JOIN integrations i ON i.key = l.lane / 8";
        let rows = self.rows(SQL, &[&lanes]).await?;
        let lanes = rows.iter().map(|row| Ok((row.get(0), lane_of(row)?)));
        lanes.collect()
    }

    /// Gives up all lanes in which nothing is under way, and the registration.
    pub(super) async fn leave(&self) -> Result<(), OutboxError> {
        const LANES: &str = "
            UPDATE lanes SET holder = NULL, expires = NULL
            WHERE lane = ANY ($1) AND holder = $2 AND NOT busy";
        const RELAY: &str = "DELETE FROM relays WHERE relay = $1";
        let lanes: Vec<i64> = self.session.held().drain().map(|(lane, _)| lane).collect();
        let relay = &self.session.relay;
        self.apply(LANES, &[&lanes, relay]).await?;
        self.apply(RELAY, &[relay]).await.map(drop)
    }
}

fn lane_of(row: &Row) -> Result<LaneKey, OutboxError> {
    Ok(lane_key(id_of(row, 1)?, row.get(0)))
}

/// Bytes of a leased capture in a request.
fn payload_bytes(capture: &LeasedCapture) -> usize {
    let payloads = [&capture.identify, &capture.track];
    payloads.into_iter().flatten().map(|it| it.len() + 1).sum()
}

/// As many of the rows as the budget allows, and at least one.
fn within_budget(rows: &[Row], budget: LeaseBudget) -> Result<Vec<LeasedCapture>, OutboxError> {
    let mut leased = Vec::with_capacity(rows.len());
    let (mut events, mut bytes) = (0, 0);
    for row in rows {
        let payload = |column: usize| {
            let stored = row.try_get::<_, Option<&[u8]>>(column);
            let stored = stored.map_err(|_| damaged("payload"))?;
            Ok::<_, OutboxError>(stored.map(bytes::Bytes::copy_from_slice))
        };
        let identify = payload(3)?;
        // A pair is split only where one event is asked for.
        let alone = budget.max_events == 1 && identify.is_some();
        let track = if alone { None } else { payload(4)? };
        let mut damaged = false;
        for (column, payload) in [(1, &identify), (2, &track)] {
            if let Some(payload) = payload {
                let size = usize::try_from(row.get::<_, i32>(column)).unwrap_or(0);
                (events, bytes) = (events + 1, bytes + size + 1);
                // An import leaves nothing of a payload that it found damaged.
                damaged |= payload.is_empty();
            }
        }
        if !leased.is_empty() && (events > budget.max_events || bytes > budget.max_bytes) {
            break;
        }
        leased.push(LeasedCapture {
            sequence: row.get(0),
            record: record_of(row, 5)?.into(),
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

/// Without some users, or of them alone.
const EXCEPT_USERS: &str = "NOT EXISTS (
                SELECT 1 FROM captures o WHERE o.seq = queue.seq AND o.subject = ANY ($6))";
const ONLY_USERS: &str = "EXISTS (
                SELECT 1 FROM captures o WHERE o.seq = queue.seq AND o.subject = ANY ($6))";

/// The first rows of a lane that this relay holds.
const READ: &str = "SELECT q.seq, q.identify_bytes, q.track_bytes, q.identify, q.track,";
const READ_FROM: &str = "
    FROM (SELECT own.*, (sum(identify_bytes::int8 + track_bytes) OVER (
            ORDER BY replayed, seq ROWS UNBOUNDED PRECEDING))::int8 AS bytes
        FROM (SELECT * FROM queue WHERE lane = $1
            AND EXISTS (SELECT 1 FROM lanes WHERE lane = $1 AND holder = $2
                AND coalesce(blocked_until < clock_timestamp(), true))
            AND {scope} ORDER BY replayed, seq LIMIT $3) AS own) AS q
    JOIN captures c ON c.seq = q.seq, (SELECT $5::text AS integration_id) AS i
    WHERE q.bytes - q.identify_bytes - q.track_bytes < $4::int8
    ORDER BY q.replayed, q.seq";
