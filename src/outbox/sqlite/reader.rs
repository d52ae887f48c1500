//! The thread that reads: beside the writer, without waiting for it.

use rusqlite::{Connection, OptionalExtension, Row, params};
use tokio::sync::{mpsc, oneshot};

use super::{
    row::{crc32, record_of, region_number, region_of, unavailable},
    selection,
    subjects::{self, Scanned, SubjectScan},
};

use crate::{
    event::EventType,
    integration::IntegrationId,
    notice::Notice,
    outbox::{
        Backlog, DeadLetter, DeadLetterCount, DeadLetterFilter, LaneKey, LeaseBudget,
        LeasedCapture, OutboxError, Selection,
    },
    status::{CaptureRecord, EventStatus, State},
    time::UnixMillis,
    vault::unsealed_len,
};

type Reply<T> = oneshot::Sender<Result<T, OutboxError>>;

/// What the reader is asked.
#[derive(Debug)]
pub(super) enum ReadCommand {
    Lease {
        lane: LaneKey,
        budget: LeaseBudget,
        reply: Reply<Vec<LeasedCapture>>,
    },
    Find {
        integration_id: IntegrationId,
        capture_id: String,
        reply: Reply<Option<CaptureRecord>>,
    },
    WaitingLanes {
        reply: Reply<Vec<LaneKey>>,
    },
    Backlog {
        integration_id: IntegrationId,
        reply: Reply<Backlog>,
    },
    DeadLetters {
        filter: DeadLetterFilter,
        after: i64,
        limit: usize,
        reply: Reply<Vec<DeadLetter>>,
    },
    CountDeadLetters {
        selection: Selection,
        older_than: UnixMillis,
        reply: Reply<DeadLetterCount>,
    },
    Integrations {
        reply: Reply<Vec<(String, Vec<u8>)>>,
    },
    ScanSubjects {
        scan: SubjectScan,
        reply: Reply<Scanned>,
    },
    Receipts {
        before: Option<i64>,
        limit: usize,
        reply: Reply<Vec<(String, Vec<u8>)>>,
    },
    Notices {
        limit: usize,
        reply: Reply<Vec<Notice>>,
    },
    Close,
}

/// Answers until it is closed. Each answer sees all commits before it.
pub(super) fn run(connection: Connection, mut commands: mpsc::Receiver<ReadCommand>) {
    let connection = &connection;
    // Whoever asked may have gone; then nobody needs the answer.
    while let Some(command) = commands.blocking_recv() {
        match command {
            ReadCommand::Lease {
                lane,
                budget,
                reply,
            } => {
                let _ = reply.send(lease(connection, &lane, budget));
            }
            ReadCommand::Find {
                integration_id,
                capture_id,
                reply,
            } => {
                let _ = reply.send(find(connection, integration_id, capture_id));
            }
            ReadCommand::WaitingLanes { reply } => {
                let _ = reply.send(waiting_lanes(connection).map_err(unavailable));
            }
            ReadCommand::Backlog {
                integration_id,
                reply,
            } => {
                let _ = reply.send(backlog(connection, &integration_id).map_err(unavailable));
            }
            ReadCommand::DeadLetters {
                filter,
                after,
                limit,
                reply,
            } => {
                let _ = reply.send(selection::list(connection, &filter, after, limit));
            }
            ReadCommand::CountDeadLetters {
                selection,
                older_than,
                reply,
            } => {
                let counted = selection::count(connection, &selection, older_than);
                let _ = reply.send(counted.map_err(unavailable));
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
            ReadCommand::Close => return,
        }
    }
}

/// The number of a lane.
pub(super) const LANE_SQL: &str =
    "SELECT id FROM lane WHERE integration_id = ?1 AND region = ?2 AND shard = ?3";

/// The waiting captures of a lane in order. The order of the join and the index
/// are said outright: left to itself, SQLite sorts the whole backlog for each lease.
pub(super) const LEASE_SQL: &str = "
    SELECT q.sequence, q.identify, q.identify_crc, q.track, q.track_crc, c.capture_id, c.status
    FROM queue q INDEXED BY queue_by_lane CROSS JOIN capture c
    WHERE q.lane = ?1 AND c.sequence = q.sequence
    ORDER BY q.replay, q.sequence";

fn lease(
    connection: &Connection,
    lane: &LaneKey,
    budget: LeaseBudget,
) -> Result<Vec<LeasedCapture>, OutboxError> {
    let key = params![
        lane.integration_id.as_str(),
        region_number(lane.region),
        lane.shard
    ];
    let number: Option<i64> = connection
        .prepare_cached(LANE_SQL)
        .and_then(|mut statement| statement.query_row(key, |row| row.get(0)).optional())
        .map_err(unavailable)?;
    let Some(number) = number else {
        return Ok(Vec::new());
    };
    let mut statement = connection.prepare_cached(LEASE_SQL).map_err(unavailable)?;
    let mut rows = statement.query(params![number]).map_err(unavailable)?;
    let mut leased = Vec::new();
    let (mut events, mut bytes) = (0, 0);
    while let Some(row) = rows.next().map_err(unavailable)? {
        let mut capture = leased_capture(lane, row)?;
        if budget.max_events == 1 && capture.identify.is_some() {
            capture.track = None;
        }
        for payload in EventType::ALL
            .iter()
            .filter_map(|event| capture.payload(*event))
        {
            events += 1;
            bytes += unsealed_len(payload) + 1;
        }
        let fits = events <= budget.max_events && bytes <= budget.max_bytes;
        if !fits && !leased.is_empty() {
            break;
        }
        leased.push(capture);
        if events >= budget.max_events {
            break;
        }
    }
    Ok(leased)
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
    let record = decoded.unwrap_or_else(|_| unreadable());
    Ok(LeasedCapture {
        sequence,
        record,
        identify,
        track,
        damaged,
    })
}

fn find(
    connection: &Connection,
    integration_id: IntegrationId,
    capture_id: String,
) -> Result<Option<CaptureRecord>, OutboxError> {
    const SQL: &str = "SELECT status FROM capture WHERE integration_id = ?1 AND capture_id = ?2";
    let status = connection
        .prepare_cached(SQL)
        .and_then(|mut statement| {
            statement
                .query_row(params![integration_id.as_str(), capture_id], |row| {
                    row.get::<_, Vec<u8>>(0)
                })
                .optional()
        })
        .map_err(unavailable)?;
    status
        .map(|status| record_of(integration_id, capture_id, &status))
        .transpose()
}

fn waiting_lanes(connection: &Connection) -> rusqlite::Result<Vec<LaneKey>> {
    const SQL: &str = "SELECT integration_id, region, shard FROM lane WHERE waiting_events > 0";
    let mut statement = connection.prepare_cached(SQL)?;
    let mut rows = statement.query([])?;
    let mut lanes = Vec::new();
    while let Some(row) = rows.next()? {
        let id: String = row.get(0)?;
        // Only valid ids are ever stored.
        let Some(integration_id) = IntegrationId::new(&id) else {
            continue;
        };
        let region = region_of(row.get(1)?);
        lanes.push(LaneKey {
            integration_id,
            region,
            shard: row.get(2)?,
        });
    }
    Ok(lanes)
}

fn backlog(connection: &Connection, id: &IntegrationId) -> rusqlite::Result<Backlog> {
    const COUNTS: &str = "
        SELECT count(*), coalesce(sum(waiting_events), 0), coalesce(sum(waiting_bytes), 0)
        FROM lane WHERE integration_id = ?1 AND waiting_events > 0";
    const OLDEST: &str = "
        SELECT min((SELECT c.accept_millis FROM capture c
                    WHERE c.sequence = (SELECT min(q.sequence) FROM queue q WHERE q.lane = lane.id)))
        FROM lane WHERE integration_id = ?1 AND waiting_events > 0";
    let mut backlog =
        connection
            .prepare_cached(COUNTS)?
            .query_row(params![id.as_str()], |row| {
                Ok(Backlog {
                    lanes: row.get(0)?,
                    events: row.get(1)?,
                    bytes: row.get(2)?,
                    oldest: None,
                })
            })?;
    let mut statement = connection.prepare_cached(OLDEST)?;
    let oldest: Option<i64> = statement.query_row(params![id.as_str()], |row| row.get(0))?;
    backlog.oldest = oldest.map(UnixMillis);
    Ok(backlog)
}

/// The integrations as they are stored, with their ids.
fn integrations(connection: &Connection) -> rusqlite::Result<Vec<(String, Vec<u8>)>> {
    let mut statement =
        connection.prepare_cached("SELECT id, spec FROM integration ORDER BY id")?;
    statement
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
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
