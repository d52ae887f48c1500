//! Dead letters as SQL selects them.

use rusqlite::{Connection, Params, Row, params, types::Value};

use super::row::{record_of, unavailable};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{DeadLetter, DeadLetterCount, DeadLetterFilter, OutboxError, Selection},
    time::UnixMillis,
};

/// The rows that a filter lets through: with `NULL` where it lets all.
const FITS: &str = "
    (?1 IS NULL OR substr(l.integration_id, 1, instr(l.integration_id || '@', '@') - 1) IN (SELECT value FROM json_each(?1))) AND (?2 IS NULL OR d.reason = ?2)
    AND (?3 IS NULL OR d.millis >= ?3) AND (?4 IS NULL OR d.millis < ?4)";

/// The rows of the integrations in `?2`, with `NULL` of all.
const OWN: &str = "
    (?2 IS NULL OR substr(l.integration_id, 1, instr(l.integration_id || '@', '@') - 1) IN
        (SELECT value FROM json_each(?2)))";

/// Whether the integration was deleted: its events are never sent again.
const FORMER: &str =
    "EXISTS (SELECT 1 FROM integration i WHERE i.id = l.integration_id AND i.spec = x'')";

/// The values of [`FITS`].
fn values(filter: &DeadLetterFilter) -> [Value; 4] {
    let number = |number: Option<i64>| number.map_or(Value::Null, Value::Integer);
    [
        named(filter.integrations.as_deref()),
        number(filter.reason.map(|reason| i64::from(i32::from(reason)))),
        number(filter.start.map(|time| time.0)),
        number(filter.end.map(|time| time.0)),
    ]
}

/// Integrations as a JSON array for `json_each`; their ids need no escapes.
fn named(integrations: Option<&[IntegrationId]>) -> Value {
    integrations.map_or(Value::Null, |ids| {
        let quoted: Vec<String> = ids.iter().map(|id| format!("\"{id}\"")).collect();
        Value::Text(format!("[{}]", quoted.join(",")))
    })
}

/// Dead letters after an id, oldest first.
pub(super) fn list(
    connection: &Connection,
    filter: &DeadLetterFilter,
    after: i64,
    limit: usize,
) -> Result<Vec<DeadLetter>, OutboxError> {
    let sql = format!(
        "SELECT d.id, d.event, d.millis, length(d.payload), l.integration_id, c.capture_id, c.status
         FROM dead_letter d JOIN lane l ON l.id = d.lane JOIN capture c ON c.sequence = d.sequence
         WHERE {FITS} AND d.id > ?5 ORDER BY d.id LIMIT ?6"
    );
    let [integration, reason, start, end] = values(filter);
    let mut statement = connection.prepare_cached(&sql).map_err(unavailable)?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut rows = statement
        .query(params![integration, reason, start, end, after, limit])
        .map_err(unavailable)?;
    let mut listed = Vec::new();
    while let Some(row) = rows.next().map_err(unavailable)? {
        listed.push(dead_letter(row)?);
    }
    Ok(listed)
}

fn dead_letter(row: &Row<'_>) -> Result<DeadLetter, OutboxError> {
    let id: String = row.get(4).map_err(unavailable)?;
    let status: Vec<u8> = row.get(6).map_err(unavailable)?;
    let integration_id = IntegrationId::stored(&id)
        .ok_or_else(|| OutboxError::Unavailable("a damaged lane".to_owned()))?;
    Ok(DeadLetter {
        id: row.get(0).map_err(unavailable)?,
        event: event_of(row.get(1).map_err(unavailable)?),
        time: UnixMillis(row.get(2).map_err(unavailable)?),
        payload_bytes: row.get(3).map_err(unavailable)?,
        record: record_of(integration_id, row.get(5).map_err(unavailable)?, &status)?,
    })
}

/// The event under whose number a dead letter is stored.
pub(super) fn event_of(number: i64) -> EventType {
    if number == 2 {
        EventType::Track
    } else {
        EventType::Identify
    }
}

/// What a selection weighs.
pub(super) fn count(
    connection: &Connection,
    selection: &Selection,
    older_than: UnixMillis,
) -> rusqlite::Result<DeadLetterCount> {
    let columns = format!(
        "count(*), coalesce(sum(length(d.payload)), 0), coalesce(sum(c.accept_millis < ?5 AND NOT {FORMER}), 0),
         coalesce(sum({FORMER}), 0)"
    );
    match selection {
        Selection::Filter(filter) => {
            let sql = format!(
                "SELECT {columns} FROM dead_letter d JOIN lane l ON l.id = d.lane
                 JOIN capture c ON c.sequence = d.sequence WHERE {FITS}"
            );
            let [integration, reason, start, end] = values(filter);
            counted(
                connection,
                &sql,
                params![integration, reason, start, end, older_than.0],
            )
        }
        Selection::Ids { ids, integrations } => {
            let sql = format!(
                "SELECT {} FROM dead_letter d JOIN lane l ON l.id = d.lane
                 JOIN capture c ON c.sequence = d.sequence WHERE d.id = ?1 AND {OWN}",
                columns.replace("?5", "?3")
            );
            let own = named(integrations.as_deref());
            let mut sum = DeadLetterCount::default();
            for id in ids {
                let one = counted(connection, &sql, params![id, own, older_than.0])?;
                sum.events += one.events;
                sum.bytes += one.bytes;
                sum.older += one.older;
                sum.former += one.former;
            }
            Ok(sum)
        }
    }
}

fn counted(
    connection: &Connection,
    sql: &str,
    values: impl Params,
) -> rusqlite::Result<DeadLetterCount> {
    connection.prepare_cached(sql)?.query_row(values, |row| {
        Ok(DeadLetterCount {
            events: row.get(0)?,
            bytes: row.get(1)?,
            older: row.get(2)?,
            former: row.get(3)?,
        })
    })
}

/// The ids of the first selected dead letters; to be sent again where `replay` is set.
pub(super) fn first_ids(
    connection: &Connection,
    selection: &Selection,
    limit: usize,
    replay: bool,
) -> rusqlite::Result<Vec<i64>> {
    let may = if replay {
        format!("NOT {FORMER}")
    } else {
        "1".to_owned()
    };
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    match selection {
        Selection::Filter(filter) => {
            let sql = format!(
                "SELECT d.id FROM dead_letter d JOIN lane l ON l.id = d.lane
                 WHERE {FITS} AND {may} ORDER BY d.id LIMIT ?5"
            );
            let [integration, reason, start, end] = values(filter);
            let mut statement = connection.prepare_cached(&sql)?;
            statement
                .query_map(params![integration, reason, start, end, limit], |row| {
                    row.get(0)
                })?
                .collect()
        }
        Selection::Ids { ids, integrations } => {
            let sql = format!(
                "SELECT d.id FROM dead_letter d JOIN lane l ON l.id = d.lane
                 WHERE d.id = ?1 AND {OWN} AND {may}"
            );
            let mut statement = connection.prepare_cached(&sql)?;
            let own = named(integrations.as_deref());
            let mut found = Vec::new();
            for id in ids {
                if statement.exists(params![id, own])? {
                    found.push(*id);
                }
            }
            Ok(found)
        }
    }
}
