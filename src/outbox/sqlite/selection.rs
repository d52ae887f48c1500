//! Dead letters as they are selected: by the lanes of the integrations that are meant, a piece
//! at a time. So a caller pays for its own rows, and leases are answered between the pieces.

use std::{cmp::Reverse, collections::BinaryHeap, sync::Arc};

use rusqlite::{Connection, OptionalExtension, params};

use super::row::{record_of, unavailable};
use crate::{
    event::EventType,
    integration::IntegrationId,
    outbox::{DeadLetter, DeadLetterCount, DeadLetterFilter, OutboxError, Selection},
    time::UnixMillis,
};

/// Rows and lanes that one piece looks at: about two milliseconds of the reader's time.
const PIECE: usize = 400;

/// A way through the selected dead letters in the order of their ids.
#[derive(Debug)]
pub(super) struct Walk {
    selection: Arc<Selection>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// All of them after an id.
    All(i64),
    /// Those of some integrations after an id.
    Own {
        after: i64,
        /// Integrations whose lanes are not known yet.
        names: Vec<IntegrationId>,
        /// The next id of each lane that has one.
        heads: BinaryHeap<Reverse<(i64, i64)>>,
    },
    /// These ids, the last one first.
    Ids(Vec<i64>),
}

/// What is wanted of them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Want {
    /// The first ones, whole.
    Letters(usize),
    /// What all of them weigh, and how many were accepted before this time.
    Count(UnixMillis),
    /// The ids of the first ones; only of those that can be sent again where `replay` is set.
    Ids { most: usize, replay: bool },
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) letters: Vec<DeadLetter>,
    pub(super) count: DeadLetterCount,
    pub(super) ids: Vec<i64>,
}

impl Found {
    pub(super) fn append(&mut self, more: Self) {
        self.letters.extend(more.letters);
        self.ids.extend(more.ids);
        self.count.events += more.count.events;
        self.count.bytes += more.count.bytes;
        self.count.older += more.count.older;
        self.count.former += more.count.former;
    }

    /// Whether no more is wanted.
    pub(super) fn is_enough(&self, want: Want) -> bool {
        match want {
            Want::Letters(most) => self.letters.len() >= most,
            Want::Count(_) => false,
            Want::Ids { most, .. } => self.ids.len() >= most,
        }
    }
}

/// A piece of a walk.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) found: Found,
    /// The rest of the way; `None` at its end.
    pub(super) rest: Option<Walk>,
    /// Rows and lanes that were looked at.
    pub(super) looked_at: usize,
}

impl Walk {
    /// Through all that are selected after an id.
    pub(super) fn new(selection: Arc<Selection>, after: i64) -> Self {
        let source = match &*selection {
            Selection::Ids { ids, .. } => {
                let mut ids = ids.clone();
                ids.sort_unstable_by_key(|id| Reverse(*id));
                Source::Ids(ids)
            }
            Selection::Filter(DeadLetterFilter {
                integrations: Some(names),
                ..
            }) => Source::Own {
                after,
                names: names.clone(),
                heads: BinaryHeap::new(),
            },
            Selection::Filter(_) => Source::All(after),
        };
        Self { selection, source }
    }

    /// The next piece.
    pub(super) fn go(mut self, connection: &Connection, want: Want) -> Result<Piece, OutboxError> {
        let mut found = Found::default();
        let mut looked_at = 0;
        while looked_at < PIECE && !found.is_enough(want) {
            let step = self.source.step(connection).map_err(unavailable)?;
            looked_at += step.cost;
            match step.id {
                Some(id) => self.look_at(connection, id, want, &mut found)?,
                None if step.cost == 0 => {
                    return Ok(Piece {
                        found,
                        rest: None,
                        looked_at,
                    });
                }
                None => {}
            }
        }
        Ok(Piece {
            found,
            rest: Some(self),
            looked_at,
        })
    }

    fn look_at(
        &self,
        connection: &Connection,
        id: i64,
        want: Want,
        found: &mut Found,
    ) -> Result<(), OutboxError> {
        let Some(row) = Row::read(connection, id)? else {
            return Ok(());
        };
        if !row.fits(&self.selection) {
            return Ok(());
        }
        match want {
            Want::Letters(_) => found.letters.push(row.letter()?),
            Want::Count(older_than) => {
                found.count.events += 1;
                found.count.bytes += row.bytes;
                let older = row.accept_millis < older_than.0 && !row.former;
                found.count.older += u64::from(older);
                found.count.former += u64::from(row.former);
            }
            Want::Ids { replay, .. } if replay && row.former => {}
            Want::Ids { .. } => found.ids.push(id),
        }
        Ok(())
    }
}

/// A step of a walk: an id, if it came to one; it is over where that has cost nothing.
struct Step {
    id: Option<i64>,
    cost: usize,
}

impl Source {
    fn step(&mut self, connection: &Connection) -> rusqlite::Result<Step> {
        let step = |id: Option<i64>| Step {
            cost: usize::from(id.is_some()),
            id,
        };
        match self {
            Self::Ids(ids) => Ok(step(ids.pop())),
            Self::All(after) => {
                const NEXT: &str = "SELECT id FROM dead_letter WHERE id > ?1 ORDER BY id LIMIT 1";
                let next = connection
                    .prepare_cached(NEXT)?
                    .query_row(params![*after], |row| row.get(0))
                    .optional()?;
                *after = next.unwrap_or(*after);
                Ok(step(next))
            }
            Self::Own {
                after,
                names,
                heads,
            } => {
                if let Some(name) = names.pop() {
                    let lanes = lanes_of(connection, &name)?;
                    for lane in &lanes {
                        let head = next_in(connection, *lane, *after)?;
                        heads.extend(head.map(|id| Reverse((id, *lane))));
                    }
                    let cost = 1 + lanes.len();
                    return Ok(Step { id: None, cost });
                }
                let Some(Reverse((id, lane))) = heads.pop() else {
                    return Ok(step(None));
                };
                let head = next_in(connection, lane, id)?;
                heads.extend(head.map(|id| Reverse((id, lane))));
                Ok(step(Some(id)))
            }
        }
    }
}

/// The lanes of all incarnations of a name.
fn lanes_of(connection: &Connection, name: &IntegrationId) -> rusqlite::Result<Vec<i64>> {
    // `name@2` and so on: A comes after @.
    const SQL: &str = "
        SELECT id FROM lane WHERE integration_id = ?1
        UNION ALL
        SELECT id FROM lane WHERE integration_id >= ?1 || '@' AND integration_id < ?1 || 'A'";
    let mut statement = connection.prepare_cached(SQL)?;
    statement
        .query_map([name.name()], |row| row.get(0))?
        .collect()
}

/// The next dead letter of a lane.
fn next_in(connection: &Connection, lane: i64, after: i64) -> rusqlite::Result<Option<i64>> {
    const SQL: &str = "
        SELECT id FROM dead_letter INDEXED BY dead_letter_by_lane
        WHERE lane = ?1 AND id > ?2 ORDER BY id LIMIT 1";
    connection
        .prepare_cached(SQL)?
        .query_row(params![lane, after], |row| row.get(0))
        .optional()
}

/// A dead letter's row with those that it belongs to.
struct Row {
    id: i64,
    event: i64,
    reason: i64,
    millis: i64,
    bytes: u64,
    integration: String,
    capture_id: String,
    status: Vec<u8>,
    accept_millis: i64,
    /// The integration was deleted: its events are never sent again.
    former: bool,
}

impl Row {
    fn read(connection: &Connection, id: i64) -> Result<Option<Self>, OutboxError> {
        const SQL: &str = "
            SELECT d.event, d.reason, d.millis, length(d.payload), l.integration_id, c.capture_id,
                c.status, c.accept_millis,
                EXISTS (SELECT 1 FROM integration i WHERE i.id = l.integration_id AND i.spec = x'')
            FROM dead_letter d JOIN lane l ON l.id = d.lane JOIN capture c ON c.sequence = d.sequence
            WHERE d.id = ?1";
        let read = |row: &rusqlite::Row<'_>| {
            Ok(Self {
                id,
                event: row.get(0)?,
                reason: row.get(1)?,
                millis: row.get(2)?,
                bytes: row.get(3)?,
                integration: row.get(4)?,
                capture_id: row.get(5)?,
                status: row.get(6)?,
                accept_millis: row.get(7)?,
                former: row.get(8)?,
            })
        };
        connection
            .prepare_cached(SQL)
            .and_then(|mut statement| statement.query_row(params![id], read).optional())
            .map_err(unavailable)
    }

    fn fits(&self, selection: &Selection) -> bool {
        let name = self.integration.split('@').next().unwrap_or("");
        let own = |names: &Option<Vec<IntegrationId>>| {
            names
                .as_ref()
                .is_none_or(|names| names.iter().any(|one| one.name() == name))
        };
        match selection {
            Selection::Ids { integrations, .. } => own(integrations),
            Selection::Filter(filter) => {
                let reason = filter.reason.map(|reason| i64::from(i32::from(reason)));
                own(&filter.integrations)
                    && reason.is_none_or(|reason| reason == self.reason)
                    && filter.start.is_none_or(|start| self.millis >= start.0)
                    && filter.end.is_none_or(|end| self.millis < end.0)
            }
        }
    }

    fn letter(self) -> Result<DeadLetter, OutboxError> {
        let integration_id = IntegrationId::stored(&self.integration)
            .ok_or_else(|| OutboxError::Unavailable("a damaged lane".to_owned()))?;
        Ok(DeadLetter {
            id: self.id,
            event: event_of(self.event),
            time: UnixMillis(self.millis),
            payload_bytes: self.bytes,
            record: record_of(integration_id, self.capture_id, &self.status)?,
        })
    }
}

/// Whether a dead letter is there and selected: to be sent again where `replay` is set.
pub(super) fn is_selected(
    connection: &Connection,
    selection: &Selection,
    id: i64,
    replay: bool,
) -> Result<bool, OutboxError> {
    let row = Row::read(connection, id)?;
    Ok(row.is_some_and(|row| row.fits(selection) && !(replay && row.former)))
}

/// The event under whose number a dead letter is stored.
pub(super) fn event_of(number: i64) -> EventType {
    if number == 2 {
        EventType::Track
    } else {
        EventType::Identify
    }
}
