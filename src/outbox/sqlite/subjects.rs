//! Whose data is where. The table is read whole, in pieces: an index would cost every
//! capture what an erasure needs now and then.

use rusqlite::{Connection, OptionalExtension, params};

use super::row::region_of;
use crate::{
    integration::IntegrationId,
    outbox::{LaneKey, SubjectQuery},
};

/// Rows of one piece: about a millisecond of the reader's time.
const PIECE: i64 = 10_000;

/// A piece of a search.
#[derive(Clone, Debug)]
pub(super) struct SubjectScan {
    /// The person's numbers; one for each user id.
    pub(super) subjects: Vec<i64>,
    pub(super) query: SubjectQuery,
    pub(super) after: i64,
}

/// What a piece held.
#[derive(Debug, Default)]
pub(super) struct Scanned {
    /// Captures, and the lane in which events of theirs wait.
    pub(super) found: Vec<(i64, Option<LaneKey>)>,
    /// Where the next piece begins; `None` after the last one.
    pub(super) next: Option<i64>,
}

/// Searches one piece.
pub(super) fn scan(connection: &Connection, scan: &SubjectScan) -> rusqlite::Result<Scanned> {
    const END: &str = "SELECT max(sequence) FROM
        (SELECT sequence FROM subject WHERE sequence > ?1 ORDER BY sequence LIMIT ?2)";
    const FOUND: &str = "
        SELECT sequence FROM subject
        WHERE sequence > ?1 AND sequence <= ?2 AND subject IN (SELECT value FROM json_each(?3))
        ORDER BY sequence";
    let end: Option<i64> = connection
        .prepare_cached(END)?
        .query_row(params![scan.after, PIECE], |row| row.get(0))?;
    let Some(end) = end else {
        return Ok(Scanned::default());
    };
    let subjects: Vec<String> = scan.subjects.iter().map(i64::to_string).collect();
    let subjects = format!("[{}]", subjects.join(","));
    let mut statement = connection.prepare_cached(FOUND)?;
    let sequences: Vec<i64> = statement
        .query_map(params![scan.after, end, subjects], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut found = Vec::new();
    for sequence in sequences {
        if let Some(lane) = lane_of(connection, &scan.query, sequence)? {
            found.push((sequence, lane));
        }
    }
    Ok(Scanned {
        found,
        next: Some(end),
    })
}

/// Whose data a capture is.
pub(super) fn of(connection: &Connection, sequence: i64) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached("SELECT subject FROM subject WHERE sequence = ?1")?
        .query_row([sequence], |row| row.get(0))
        .optional()
}

/// The lane in which a capture waits, if it does; `None` where it is another
/// integration's.
#[expect(clippy::option_option, reason = "both are asked")]
fn lane_of(
    connection: &Connection,
    query: &SubjectQuery,
    sequence: i64,
) -> rusqlite::Result<Option<Option<LaneKey>>> {
    const SQL: &str = "
        SELECT c.integration_id, l.region, l.shard FROM capture c
        LEFT JOIN queue q ON q.sequence = c.sequence LEFT JOIN lane l ON l.id = q.lane
        WHERE c.sequence = ?1";
    let mut statement = connection.prepare_cached(SQL)?;
    let mut rows = statement.query(params![sequence])?;
    let Some(row) = rows.next()? else {
        return Ok(None);
    };
    let id: String = row.get(0)?;
    let wanted = |id: &IntegrationId| {
        query
            .integration_id
            .as_ref()
            .is_none_or(|only| only.name() == id.name())
    };
    let Some(integration_id) = IntegrationId::stored(&id).filter(wanted) else {
        return Ok(None);
    };
    let lane = match (row.get::<_, Option<i64>>(1)?, row.get(2)?) {
        (Some(region), Some(shard)) => Some(LaneKey {
            integration_id,
            region: region_of(region),
            shard,
        }),
        _ => None,
    };
    Ok(Some(lane))
}

/// Receipts of erasures, newest first, as they are stored.
pub(super) fn receipts(
    connection: &Connection,
    before: Option<i64>,
    limit: usize,
) -> rusqlite::Result<Vec<(String, Vec<u8>)>> {
    const SQL: &str = "
        SELECT CAST(id AS TEXT), receipt FROM erasure
        WHERE ?1 IS NULL OR id < ?1 ORDER BY id DESC LIMIT ?2";
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut statement = connection.prepare_cached(SQL)?;
    statement
        .query_map(params![before, limit], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}
