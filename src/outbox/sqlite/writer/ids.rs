//! The index of ids. Its keys are hashes, so new ones belong everywhere in it: put there
//! at once, those of one flush would touch most of its pages. They stand in memory first
//! (`recent`), and in a run of the flush that brought them, in which nobody looks for
//! anything: it is for the next start. They leave for the index in the order of their keys, as
//! many as come in, so that a flush touches one stretch of it. A run goes once all its keys
//! have left.

mod turn;

use std::{collections::BTreeSet, sync::Arc};

use foldhash::HashSet;
use rusqlite::{Connection, Transaction, params};

use super::Rests;
use crate::outbox::sqlite::recent::{Place, Recent};
use turn::{FIRST, Turn};

/// Keys in memory, of 16 bytes and what a tree adds to them; in tests so few that those of
/// the reference model leave too.
const ROOM: usize = if cfg!(test) { 6 } else { 512 * 1024 };
/// When so many are too many, they leave together: while the round stands still, small
/// flushes share a run.
const STEP: usize = if cfg!(test) { 2 } else { 4 * 1024 };
/// A run with room for more keys takes those of the next flush too: a page of the database.
const RUN_KEYS: usize = if cfg!(test) { 3 } else { 512 };
/// Keys that are looked up in memory at once.
const PIECE: usize = if cfg!(test) { 2 } else { 256 };
const PLACE_BYTES: usize = 16;

/// What is known of a run.
#[derive(Debug)]
struct Run {
    id: i64,
    /// When its keys came.
    turn: Turn,
    keys: usize,
    /// Sequences of its captures.
    first: i64,
    last: i64,
}

/// See the module's description.
#[derive(Debug)]
pub(in crate::outbox::sqlite) struct Ids {
    recent: Arc<Recent>,
    turn: Turn,
    /// Oldest first.
    runs: Vec<Run>,
    /// Keys that the transaction under way puts into the index.
    leaving: HashSet<Place>,
    /// Sequences and keys, in this order, of captures in runs that the transaction under way
    /// forgets: a run is a stretch of sequences.
    forgotten: BTreeSet<(i64, i64)>,
    changed: bool,
}

impl Ids {
    /// Reads what has not left; `recent` stands for it from now on.
    pub(in crate::outbox::sqlite) fn load(
        connection: &Connection,
        recent: Arc<Recent>,
    ) -> rusqlite::Result<Self> {
        const TURN: &str = "SELECT lap, key, sequence FROM id_turn";
        const RUNS: &str = "SELECT id, lap, key, sequence, places FROM id_run ORDER BY id";
        let turn = |row: &rusqlite::Row<'_>, from| {
            Ok::<_, rusqlite::Error>(Turn {
                lap: row.get(from)?,
                place: (row.get(from + 1)?, row.get(from + 2)?),
            })
        };
        let now = connection.query_row(TURN, [], |row| turn(row, 0))?;
        let (mut places, mut runs) = (Vec::new(), Vec::new());
        let mut statement = connection.prepare(RUNS)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (came, stored) = (turn(row, 1)?, decode(row.get_ref(4)?.as_blob()?));
            runs.push(Run::of(row.get(0)?, came, &stored));
            places.extend(stored.iter().filter(|place| !came.has_left(**place, now)));
        }
        recent.replace(places.into_iter().collect());
        Ok(Self {
            recent,
            turn: now,
            runs,
            leaving: HashSet::default(),
            forgotten: BTreeSet::new(),
            changed: false,
        })
    }

    /// Adds new keys, in the order of their captures.
    pub(super) fn add(
        &mut self,
        transaction: &Transaction<'_>,
        keys: &[Place],
        rests: &mut Rests<'_>,
    ) -> rusqlite::Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        self.add_run(transaction, keys)?;
        // Next to each other in the tree, they are quicker to place.
        let mut in_order = keys.to_vec();
        in_order.sort_unstable();
        self.recent.add(&in_order, || rests.end_piece());
        let in_memory = self.recent.len().saturating_sub(self.leaving.len());
        let excess = in_memory.saturating_sub(ROOM);
        if excess < STEP {
            return Ok(());
        }
        // So that a large one is no work of one flush.
        self.leave(transaction, excess.min(2 * keys.len().max(STEP)), rests)
    }

    fn add_run(&mut self, transaction: &Transaction<'_>, keys: &[Place]) -> rusqlite::Result<()> {
        const NEW: &str = "INSERT INTO id_run (lap, key, sequence, places) VALUES (?1, ?2, ?3, ?4)";
        let turn = self.turn;
        let open = self.runs.last_mut();
        let open = open.filter(|run| run.turn == turn && run.keys + keys.len() <= RUN_KEYS);
        if let Some(run) = open {
            let mut places = read_run(transaction, run.id)?;
            places.extend(keys);
            write_run(transaction, run.id, &places)?;
            *run = Run::of(run.id, turn, &places);
            return Ok(());
        }
        let (key, sequence) = turn.place;
        let row = params![turn.lap, key, sequence, encode(keys)];
        transaction.prepare_cached(NEW)?.execute(row)?;
        let id = transaction.last_insert_rowid();
        self.runs.push(Run::of(id, turn, keys));
        Ok(())
    }

    /// Puts the next `most` keys of the round into the index. They stay in memory until that
    /// is durable.
    fn leave(
        &mut self,
        transaction: &Transaction<'_>,
        most: usize,
        rests: &mut Rests<'_>,
    ) -> rusqlite::Result<()> {
        const ADD: &str = "INSERT INTO capture_key (key, sequence) VALUES (?1, ?2)";
        let mut add = transaction.prepare_cached(ADD)?;
        let mut left = most;
        while left > 0 {
            let from = self.turn.place;
            let next = self.recent.behind(from, left.min(PIECE));
            let Some(last) = next.last() else {
                if from == FIRST {
                    break;
                }
                self.turn = self.turn.next_lap();
                continue;
            };
            self.turn.place = *last;
            left -= next.len();
            for place in next {
                // One that comes round again has left before.
                if self.leaving.insert(place) {
                    add.execute(params![place.0, place.1])?;
                    rests.row();
                }
            }
        }
        self.changed = true;
        Ok(())
    }

    /// Removes the key of a capture that is forgotten.
    pub(in crate::outbox::sqlite) fn remove(
        &mut self,
        transaction: &Transaction<'_>,
        place: Place,
    ) -> rusqlite::Result<()> {
        const REMOVE: &str = "DELETE FROM capture_key WHERE key = ?1 AND sequence = ?2";
        if !self.leaving.contains(&place) && self.recent.forget(place) {
            self.forgotten.insert((place.1, place.0));
            return Ok(());
        }
        let mut remove = transaction.prepare_cached(REMOVE)?;
        remove.execute(params![place.0, place.1]).map(drop)
    }

    /// Writes down what the transaction has changed, at its end.
    pub(in crate::outbox::sqlite) fn store(
        &mut self,
        transaction: &Transaction<'_>,
    ) -> rusqlite::Result<()> {
        const TURN: &str = "UPDATE id_turn SET lap = ?1, key = ?2, sequence = ?3";
        if !self.forgotten.is_empty() {
            self.shorten_runs(transaction)?;
        }
        if !std::mem::take(&mut self.changed) {
            return Ok(());
        }
        let Turn {
            lap,
            place: (key, sequence),
        } = self.turn;
        let row = params![lap, key, sequence];
        transaction.prepare_cached(TURN)?.execute(row)?;
        let gone = self
            .runs
            .partition_point(|run| run.turn.have_all_left(self.turn));
        for run in self.runs.drain(..gone) {
            delete_run(transaction, run.id)?;
        }
        Ok(())
    }

    /// Takes the keys of forgotten captures out of the runs.
    fn shorten_runs(&mut self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        let forgotten = std::mem::take(&mut self.forgotten);
        let now = self.turn;
        let mut error = None;
        self.runs.retain_mut(|run| {
            let range = (run.first, i64::MIN)..=(run.last, i64::MAX);
            if error.is_some() || forgotten.range(range).next().is_none() {
                return true;
            }
            let shorten = || -> rusqlite::Result<Vec<Place>> {
                let mut places = read_run(transaction, run.id)?;
                places.retain(|place| {
                    !run.turn.has_left(*place, now) && !forgotten.contains(&(place.1, place.0))
                });
                if places.is_empty() {
                    delete_run(transaction, run.id)?;
                } else {
                    write_run(transaction, run.id, &places)?;
                }
                Ok(places)
            };
            match shorten() {
                Ok(places) => *run = Run::of(run.id, run.turn, &places),
                Err(failed) => error = Some(failed),
            }
            run.keys > 0
        });
        error.map_or(Ok(()), Err)
    }

    /// The transaction is durable: what left is found in the index.
    pub(in crate::outbox::sqlite) fn committed(&mut self) {
        let leaving: Vec<Place> = self.leaving.drain().collect();
        self.recent.depart(&leaving);
    }
}

impl Run {
    fn of(id: i64, turn: Turn, places: &[Place]) -> Self {
        let sequences = || places.iter().map(|place| place.1);
        Self {
            id,
            turn,
            keys: places.len(),
            first: sequences().min().unwrap_or(i64::MAX),
            last: sequences().max().unwrap_or(i64::MIN),
        }
    }
}

fn read_run(transaction: &Transaction<'_>, id: i64) -> rusqlite::Result<Vec<Place>> {
    let mut read = transaction.prepare_cached("SELECT places FROM id_run WHERE id = ?1")?;
    read.query_row(params![id], |row| Ok(decode(row.get_ref(0)?.as_blob()?)))
}

fn write_run(transaction: &Transaction<'_>, id: i64, places: &[Place]) -> rusqlite::Result<()> {
    let mut write = transaction.prepare_cached("UPDATE id_run SET places = ?2 WHERE id = ?1")?;
    write.execute(params![id, encode(places)]).map(drop)
}

fn delete_run(transaction: &Transaction<'_>, id: i64) -> rusqlite::Result<()> {
    let mut delete = transaction.prepare_cached("DELETE FROM id_run WHERE id = ?1")?;
    delete.execute(params![id]).map(drop)
}

/// Key and sequence of each, little-endian.
fn encode(places: &[Place]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(places.len() * PLACE_BYTES);
    for (key, sequence) in places {
        bytes.extend_from_slice(&key.to_le_bytes());
        bytes.extend_from_slice(&sequence.to_le_bytes());
    }
    bytes
}

fn decode(bytes: &[u8]) -> Vec<Place> {
    let (words, _) = bytes.as_chunks();
    let (places, _) = words.as_chunks();
    let number = |word| i64::from_le_bytes(word);
    places
        .iter()
        .map(|[key, sequence]| (number(*key), number(*sequence)))
        .collect()
}

#[cfg(test)]
mod tests;
