//! The index of ids. Its keys are hashes, so new ones belong everywhere in it: put there
//! at once, those of one flush would touch most of its pages. They stand in a small index
//! first, and leave it for the large one in the order of their keys, as many as come in.
//! So a flush touches the small index and one stretch of the large one. The larger the small one
//! is, the shorter is the stretch: together they are least where both have as many pages.

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::Rests;

/// Keys in the small index, at the least and at the most; few in tests, so that they leave it.
const RECENT: (u64, u64) = if cfg!(test) {
    (16, 64)
} else {
    (16 * 1024, 256 * 1024)
};

/// So many keys are moved by one statement.
const MOVED_AT_ONCE: u64 = if cfg!(test) { 5 } else { 256 };

/// A place in both indices: key and sequence.
type Place = (i64, i64);

const FIRST: Place = (i64::MIN, i64::MIN);
const LAST: Place = (i64::MAX, i64::MAX);

/// What is known of the small index.
#[derive(Debug)]
pub(super) struct Ids {
    recent: u64,
    /// Up to here keys have left in this round.
    moved_to: Place,
}

impl Ids {
    pub(super) fn load(connection: &Connection) -> rusqlite::Result<Self> {
        let recent =
            connection.query_row("SELECT count(*) FROM recent_key", [], |row| row.get(0))?;
        Ok(Self {
            recent,
            moved_to: FIRST,
        })
    }

    /// Adds new keys, in any order.
    pub(super) fn add(
        &mut self,
        transaction: &Transaction<'_>,
        mut keys: Vec<Place>,
        rests: &mut Rests<'_>,
    ) -> rusqlite::Result<()> {
        const ADD: &str = "INSERT INTO recent_key (key, sequence) VALUES (?1, ?2)";
        // In the order of the index each of its pages is touched once.
        keys.sort_unstable();
        let mut add = transaction.prepare_cached(ADD)?;
        for (key, sequence) in &keys {
            add.execute(params![key, sequence])?;
            rests.row();
        }
        let new = keys.len() as u64;
        self.recent += new;
        let room = room(new, ids(transaction)?, RECENT);
        self.make_room(transaction, room, 2 * new, rests)
    }

    /// Moves what is more than `room` into the large index, but no more than `most` keys.
    fn make_room(
        &mut self,
        transaction: &Transaction<'_>,
        room: u64,
        most: u64,
        rests: &mut Rests<'_>,
    ) -> rusqlite::Result<()> {
        const END: &str = "
            SELECT key, sequence FROM recent_key WHERE (key, sequence) > (?1, ?2)
            ORDER BY key, sequence LIMIT 1 OFFSET ?3";
        const MOVE: &str = "
            INSERT INTO capture_key (key, sequence) SELECT key, sequence FROM recent_key
            WHERE (key, sequence) > (?1, ?2) AND (key, sequence) <= (?3, ?4)
            ORDER BY key, sequence";
        const LEAVE: &str = "
            DELETE FROM recent_key
            WHERE (key, sequence) > (?1, ?2) AND (key, sequence) <= (?3, ?4)";
        let mut left = self.recent.saturating_sub(room).min(most);
        while left > 0 {
            let from = self.moved_to;
            let piece = left.min(MOVED_AT_ONCE);
            let end = transaction
                .prepare_cached(END)?
                .query_row(params![from.0, from.1, piece - 1], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })
                .optional()?;
            let to = end.unwrap_or(LAST);
            let range = params![from.0, from.1, to.0, to.1];
            let moved = transaction.prepare_cached(MOVE)?.execute(range)? as u64;
            transaction.prepare_cached(LEAVE)?.execute(range)?;
            self.recent = self.recent.saturating_sub(moved);
            self.moved_to = if end.is_some() { to } else { FIRST };
            rests.end_piece();
            if moved == 0 && from == FIRST {
                // The count was wrong: there is nothing.
                self.recent = 0;
                break;
            }
            left = left.saturating_sub(moved);
        }
        Ok(())
    }

    /// Removes the key of a capture that is forgotten.
    pub(super) fn remove(
        &mut self,
        transaction: &Transaction<'_>,
        (key, sequence): Place,
    ) -> rusqlite::Result<()> {
        let removed = remove(transaction, (key, sequence))?;
        self.recent = self.recent.saturating_sub(removed as u64);
        Ok(())
    }
}

/// About how many ids there are: the captures that are remembered.
fn ids(transaction: &Transaction<'_>) -> rusqlite::Result<u64> {
    const SPAN: &str = "
        SELECT coalesce((SELECT max(sequence) FROM capture) - (SELECT min(sequence) FROM capture), 0)";
    transaction
        .prepare_cached(SPAN)?
        .query_row([], |row| row.get(0))
}

/// Keys for which the small index has room where so many come in at once, of so many in all.
/// `new` of `room` keys are a stretch of that part of the large index: the sum of both is least
/// at the square root.
fn room(new: u64, all: u64, (least, most): (u64, u64)) -> u64 {
    new.saturating_mul(all).isqrt().clamp(least, most)
}

/// Removes a key from both indices; returns how often it stood in the small one.
pub(in crate::outbox::sqlite) fn remove(
    transaction: &Transaction<'_>,
    (key, sequence): Place,
) -> rusqlite::Result<usize> {
    const SETTLED: &str = "DELETE FROM capture_key WHERE key = ?1 AND sequence = ?2";
    const RECENT: &str = "DELETE FROM recent_key WHERE key = ?1 AND sequence = ?2";
    let place = params![key, sequence];
    if transaction.prepare_cached(SETTLED)?.execute(place)? > 0 {
        return Ok(0);
    }
    transaction.prepare_cached(RECENT)?.execute(place)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::outbox::sqlite::{overlay::Shared, schema};

    fn places(connection: &Connection, table: &str) -> BTreeSet<Place> {
        let mut statement = connection
            .prepare(&format!("SELECT key, sequence FROM {table}"))
            .expect("a table");
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
        rows.expect("rows")
            .collect::<Result<_, _>>()
            .expect("places")
    }

    /// The row of a capture, as far as the index looks at it.
    fn capture(connection: &Connection, sequence: i64) {
        const SQL: &str = "INSERT INTO capture VALUES (?1, '', '', x'', 0, 0, x'')";
        connection.execute(SQL, [sequence]).expect("inserted");
    }

    #[test]
    fn a_flush_touches_the_fewest_pages_with_the_room_that_there_is() {
        const KEYS_OF_A_PAGE: u64 = 512;
        let bounds = (16 * 1024, 256 * 1024);
        for (new, all) in [(8_000, 400_000), (8_000, 4_000_000), (2_000, 10_000_000)] {
            let touched = |room: u64| (room + new * all / room) / KEYS_OF_A_PAGE;
            let room = room(new, all, bounds);
            for other in [room / 2, room * 2] {
                assert!(touched(room) < touched(other), "{new} of {all}: {room}");
            }
        }
        assert_eq!(room(1, 10, bounds), bounds.0);
        assert_eq!(room(u64::MAX, u64::MAX, bounds), bounds.1);
    }

    #[test]
    fn each_key_stands_in_one_index_and_the_small_one_stays_small() {
        let directory = tempfile::tempdir().expect("a directory");
        let database = directory.path().join("relay.db");
        let mut connection =
            schema::open_for_writing(directory.path(), &database).expect("a database");
        let mut ids = Ids::load(&connection).expect("loaded");
        let shared = Shared::default();
        let mut all = BTreeSet::new();
        capture(&connection, 0);
        for round in 0..40_i64 {
            // Each third key comes twice, with other captures.
            let new: Vec<Place> = (0..17)
                .map(|number| {
                    let sequence = round * 17 + number;
                    let key = (sequence - sequence % 3 % 2).wrapping_mul(0x5851_f42d_4c95_7f2d);
                    (key, sequence)
                })
                .collect();
            all.extend(new.iter().copied());
            let transaction = connection.transaction().expect("begun");
            capture(&transaction, round * 17 + 16);
            let added = ids.add(&transaction, new, &mut Rests::new(&shared));
            added.expect("added");
            if round % 5 == 4 {
                let gone = all.pop_first().expect("some");
                ids.remove(&transaction, gone).expect("removed");
            }
            transaction.commit().expect("committed");

            let recent = places(&connection, "recent_key");
            let settled = places(&connection, "capture_key");
            assert!(recent.is_disjoint(&settled));
            assert_eq!(recent.len() as u64, ids.recent);
            let largest = room(17, round.cast_unsigned() * 17 + 16, RECENT);
            assert!(recent.len() as u64 <= largest, "{round}");
            assert_eq!(&recent | &settled, all);
        }
        let counted = Ids::load(&connection).expect("loaded").recent;
        assert_eq!(counted, ids.recent);
    }
}
