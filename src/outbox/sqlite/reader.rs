//! The thread that reads: beside the writer, without waiting for it.

use std::sync::Arc;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{
    committer::parked::Parked,
    entry::{Origin, key_of, stored_key},
    lookup,
    overlay::{Filler, Shared, earlier},
    read_command::ReadCommand,
    read_queue::ReadReceiver,
    row::{crc32, record_of, region_number, unavailable},
    subjects,
};

use crate::{
    event::EventType,
    integration::IntegrationId,
    notice::Notice,
    outbox::{Backlog, LaneKey, LeaseBudget, LeaseScope, LeasedCapture, OutboxError},
    status::{CaptureRecord, EventStatus, State},
    time::UnixMillis,
    vault::unsealed_len,
};

/// Memory for pages, in KiB: each lane reads its own backlog in order.
pub(super) const CACHE_KIB: i64 = 4 * 1024;

impl ReadCommand {
    /// Answers it. The caller may go meanwhile.
    fn answer(self, connection: &Connection, shared: &Shared) {
        match self {
            ReadCommand::Lease {
                lane,
                budget,
                scope,
                reply,
            } => {
                let _ = reply.send(lease(connection, shared, &lane, budget, &scope));
            }
            ReadCommand::Find {
                integration_id,
                capture_id,
                reply,
            } => {
                let _ = reply.send(find(connection, shared, integration_id, capture_id));
            }
            ReadCommand::Backlog {
                integration_id,
                reply,
            } => {
                let _ = reply.send(backlog(connection, shared, &integration_id));
            }
            ReadCommand::DeadLetters { walk, want, reply } => {
                let piece = walk.go(connection, want);
                let looked_at = piece.as_ref().map_or(0, |piece| piece.looked_at);
                shared.note_scanned(looked_at);
                let _ = reply.send(piece);
            }
            ReadCommand::LastIncarnation { name, reply } => {
                let _ = reply.send(last_incarnation(connection, &name).map_err(unavailable));
            }
            ReadCommand::Integrations { reply } => {
                let _ = reply.send(integrations(connection).map_err(unavailable));
            }
            ReadCommand::ScanSubjects { scan, reply } => {
                let _ = reply.send(subjects::scan(connection, &scan).map_err(unavailable));
            }
            ReadCommand::Receipts {
                before,
                limit,
                reply,
            } => {
                let receipts = subjects::receipts(connection, before, limit);
                let _ = reply.send(receipts.map_err(unavailable));
            }
            ReadCommand::Notices { limit, reply } => {
                let _ = reply.send(notices(connection, limit).map_err(unavailable));
            }
            ReadCommand::Close => {}
        }
    }
}

/// Answers until it is closed. Each answer sees all commits before it.
pub(super) fn run(connection: Connection, shared: &Shared, mut commands: ReadReceiver) {
    let parked = Parked::here();
    while let Some(command) = commands.next(&parked) {
        let closing = matches!(command, ReadCommand::Close);
        if !command.is_abandoned() {
            command.answer(&connection, shared);
        }
        if closing {
            while let Some(command) = commands.rest() {
                command.answer(&connection, shared);
            }
            return;
        }
    }
}

/// The number of a lane.
pub(super) const LANE_SQL: &str =
    "SELECT id FROM lane WHERE integration_id = ?1 AND region = ?2 AND shard = ?3";

/// The waiting captures of a lane in order, live or replayed ones, after one of them.
/// The order of the join and the index are said outright: left to itself, SQLite sorts
/// the whole backlog for each lease.
pub(super) const LEASE_SQL: &str = "
    SELECT q.sequence, q.identify, q.identify_crc, q.track, q.track_crc, c.capture_id, c.status
    FROM queue q INDEXED BY queue_by_lane CROSS JOIN capture c
    WHERE q.lane = ?1 AND q.replay = ?2 AND q.sequence > ?3 AND c.sequence = q.sequence
    ORDER BY q.sequence";

/// A lease that is being filled: what the database has before what came after it, and
/// replayed captures behind both.
struct Lease<'a> {
    lane: &'a LaneKey,
    budget: LeaseBudget,
    scope: &'a LeaseScope<i64>,
    filler: Filler,
    leased: Vec<LeasedCapture>,
    shared: &'a Shared,
}

pub(super) fn lease(
    connection: &Connection,
    shared: &Shared,
    lane: &LaneKey,
    budget: LeaseBudget,
    scope: &LeaseScope<i64>,
) -> Result<Vec<LeasedCapture>, OutboxError> {
    // What is in the database from now on stands in the overlay as well.
    let hold = shared.hold();
    let fresh = shared.lock().fresh(lane, budget, scope);
    let mut lease = Lease {
        lane,
        budget,
        scope,
        filler: Filler::new(budget),
        leased: Vec::new(),
        shared,
    };
    let number = if fresh.stored_wait {
        lane_number(connection, lane)?
    } else {
        None
    };
    let mut room = true;
    if let Some(number) = number {
        let (passed, more) = lease.stored(connection, number, false, fresh.passed)?;
        shared.lock().pass(lane, passed);
        room = more;
    }
    for entry in &fresh.captures {
        room = room && lease.take(entry.leased(budget));
    }
    if let Some(number) = number.filter(|_| room) {
        lease.stored(connection, number, true, 0)?;
    }
    drop(hold);
    Ok(lease.leased)
}

impl Lease<'_> {
    /// Takes from the database; returns up to where nothing waits any more, and whether
    /// there is room for more.
    fn stored(
        &mut self,
        connection: &Connection,
        number: i64,
        replay: bool,
        after: i64,
    ) -> Result<(i64, bool), OutboxError> {
        let mut passed = after;
        let mut statement = connection.prepare_cached(LEASE_SQL).map_err(unavailable)?;
        let mut rows = statement
            .query(params![number, replay, after])
            .map_err(unavailable)?;
        let mut skipped_all = true;
        while let Some(row) = rows.next().map_err(unavailable)? {
            let sequence = row.get(0).map_err(unavailable)?;
            let newer = self.shared.lock().get(sequence).cloned();
            let waits = match &newer {
                // It was put into the database just now, and its turn comes.
                Some(entry) if matches!(entry.origin, Origin::New { .. }) => break,
                Some(entry) => entry.waiting.map(|bytes| bytes.is_some()),
                None => [true, true],
            };
            if waits == [false, false] {
                if skipped_all {
                    passed = sequence;
                }
                continue;
            }
            skipped_all = false;
            let subject = || subjects::of(connection, sequence);
            if !self.scope.admits(subject).map_err(unavailable)? {
                continue;
            }
            let mut capture = leased_capture(self.lane, row)?;
            if let Some(entry) = newer {
                capture.record = Arc::clone(&entry.record);
                capture.identify = capture.identify.filter(|_| waits[0]);
                capture.track = capture.track.filter(|_| waits[1]);
            }
            if self.budget.max_events == 1 && capture.identify.is_some() {
                capture.track = None;
            }
            if !self.take(capture) {
                return Ok((passed, false));
            }
        }
        Ok((passed, !self.filler.is_full()))
    }

    /// Whether it fitted.
    fn take(&mut self, capture: LeasedCapture) -> bool {
        let payloads = EventType::ALL
            .iter()
            .filter_map(|event| capture.payload(*event).map(Bytes::as_ref));
        let fits = !self.filler.is_full() && self.filler.take(payloads.map(unsealed_len));
        if fits {
            self.leased.push(capture);
        }
        fits
    }
}

fn lane_number(connection: &Connection, lane: &LaneKey) -> Result<Option<i64>, OutboxError> {
    let key = params![
        lane.integration_id.as_str(),
        region_number(lane.region),
        lane.shard
    ];
    connection
        .prepare_cached(LANE_SQL)
        .and_then(|mut statement| statement.query_row(key, |row| row.get(0)).optional())
        .map_err(unavailable)
}

fn leased_capture(lane: &LaneKey, row: &Row<'_>) -> Result<LeasedCapture, OutboxError> {
    let column = |error: rusqlite::Error| unavailable(error);
    let sequence = row.get(0).map_err(column)?;
    let identify: Option<Vec<u8>> = row.get(1).map_err(column)?;
    let track: Option<Vec<u8>> = row.get(3).map_err(column)?;
    let crcs: [Option<u32>; 2] = [row.get(2).map_err(column)?, row.get(4).map_err(column)?];
    let capture_id: String = row.get(5).map_err(column)?;
    let status: Vec<u8> = row.get(6).map_err(column)?;
    let sound = [&identify, &track]
        .into_iter()
        .zip(crcs)
        .all(|(payload, crc)| payload.as_deref().map(crc32) == crc);
    let decoded = record_of(lane.integration_id.clone(), capture_id.clone(), &status);
    let damaged = !sound || decoded.is_err();
    if damaged {
        tracing::error!(%lane, sequence, "a stored capture is damaged; it is not sent");
    }
    let unreadable = || CaptureRecord {
        integration_id: lane.integration_id.clone(),
        capture_id,
        region: lane.region,
        mapping_version: 0,
        accept_time: UnixMillis::default(),
        queue_time: UnixMillis::default(),
        identify: EventStatus::new(State::Queued),
        track: EventStatus::new(State::Queued),
        attempts: Vec::new(),
        trace: None,
    };
    let record = Arc::new(decoded.unwrap_or_else(|_| unreadable()));
    Ok(LeasedCapture {
        sequence,
        record,
        identify: identify.map(Bytes::from),
        track: track.map(Bytes::from),
        damaged,
    })
}

fn find(
    connection: &Connection,
    shared: &Shared,
    integration_id: IntegrationId,
    capture_id: String,
) -> Result<Option<CaptureRecord>, OutboxError> {
    let key = key_of(&integration_id, &capture_id);
    if let Some(entry) = shared.lock().find(key) {
        return Ok(Some(CaptureRecord::clone(&entry.record)));
    }
    // Before the database: what leaves memory meanwhile is there by then.
    let recent = shared.recent.find(stored_key(key)).sequences;
    let found = lookup::find(connection, &recent, key, &integration_id, &capture_id);
    found
        .map_err(unavailable)?
        .map(|(_, status)| record_of(integration_id, capture_id, &status))
        .transpose()
}

fn backlog(
    connection: &Connection,
    shared: &Shared,
    id: &IntegrationId,
) -> Result<Backlog, OutboxError> {
    const OLDEST: &str = "
        SELECT c.accept_millis FROM queue q CROSS JOIN capture c
        WHERE c.sequence = q.sequence AND q.sequence =
          (SELECT sequence FROM queue INDEXED BY queue_by_lane
           WHERE lane = ?1 AND replay = ?3 AND sequence > ?2 ORDER BY sequence LIMIT 1)";
    let (mut backlog, stored) = shared.lock().backlog(id);
    for (lane, passed) in stored {
        let Some(number) = lane_number(connection, &lane)? else {
            continue;
        };
        for replay in [false, true] {
            let oldest: Option<i64> = connection
                .prepare_cached(OLDEST)
                .and_then(|mut statement| {
                    let values = params![number, passed, replay];
                    statement.query_row(values, |row| row.get(0)).optional()
                })
                .map_err(unavailable)?;
            backlog.oldest = earlier(backlog.oldest, oldest.map(UnixMillis));
        }
    }
    Ok(backlog)
}

/// The integrations as they are stored, with their ids.
fn integrations(connection: &Connection) -> rusqlite::Result<Vec<(String, Vec<u8>)>> {
    let mut statement = connection
        .prepare_cached("SELECT id, spec FROM integration WHERE spec <> x'' ORDER BY id")?;
    statement
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

/// The incarnation of the last integration of a name.
fn last_incarnation(connection: &Connection, name: &IntegrationId) -> rusqlite::Result<u32> {
    const SQL: &str = "
        SELECT id FROM integration WHERE id = ?1
        UNION ALL SELECT id FROM integration WHERE id >= ?1 || '@' AND id < ?1 || 'A'";
    let mut statement = connection.prepare_cached(SQL)?;
    let mut ids = statement.query_map([name.name()], |row| row.get::<_, String>(0))?;
    ids.try_fold(0, |last, id| {
        let number = IntegrationId::stored(&id?).map_or(0, |id| id.incarnation());
        Ok(last.max(number))
    })
}

fn notices(connection: &Connection, limit: usize) -> rusqlite::Result<Vec<Notice>> {
    let mut statement =
        connection.prepare_cached("SELECT name, millis, body FROM notice ORDER BY id LIMIT ?1")?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    statement
        .query_map(params![limit], |row| {
            Ok(Notice {
                id: row.get(0)?,
                time: UnixMillis(row.get(1)?),
                body: row.get(2)?,
            })
        })?
        .collect()
}
