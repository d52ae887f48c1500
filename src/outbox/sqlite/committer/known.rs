//! Keeps the filter of known ids: fills it from the database beside the traffic, and
//! makes a larger one when it is full. Until it is filled every id is looked up.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rusqlite::{Connection, params};

use crate::outbox::sqlite::{
    entry::{Key, stored_key},
    filter::Filter,
    overlay::Shared,
    priority,
    recent::Recent,
    schema,
};

/// Ids that are read at once, so that no snapshot keeps SQLite's log long.
const PIECE: usize = 20_000;
/// The same of those in memory, for which the writer waits.
const PIECE_IN_MEMORY: usize = 1_000;
/// Memory for pages while they are read, in KiB: each is read once.
const CACHE_KIB: i64 = 1_024;
/// Wait after the database could not be read.
const RETRY: Duration = Duration::from_secs(10);

/// See the module's description.
pub(super) struct Known {
    database: PathBuf,
    shared: Arc<Shared>,
    filter: Option<Arc<Filter>>,
    filling: Option<Filling>,
    /// Ids in the filter; a new one is made beyond `room`.
    keys: u64,
    room: u64,
    not_before: Option<Instant>,
}

/// One that is being filled.
struct Filling {
    filter: Arc<Filter>,
    stop: Arc<AtomicBool>,
    /// Ids that came meanwhile.
    added: u64,
    thread: JoinHandle<rusqlite::Result<u64>>,
}

impl Known {
    /// Of a database with so many ids at the most.
    pub(super) fn new(database: PathBuf, shared: Arc<Shared>, keys: u64) -> Self {
        let mut known = Self {
            database,
            shared,
            filter: None,
            filling: None,
            keys: 0,
            room: 0,
            not_before: None,
        };
        if keys == 0 {
            known.take(Arc::new(Filter::with_room_for(0)), 0);
        } else {
            known.fill(keys);
        }
        known
    }

    /// Whether a capture may have been accepted before.
    pub(super) fn may_hold(&self, key: Key) -> bool {
        let filter = self.filter.as_ref();
        filter.is_none_or(|filter| filter.may_hold(stored_key(key)))
    }

    /// Notes a capture before it is stored.
    pub(super) fn add(&mut self, key: Key) {
        let key = stored_key(key);
        if let Some(filter) = &self.filter {
            filter.add(key);
            self.keys += 1;
        }
        if let Some(filling) = &mut self.filling {
            filling.filter.add(key);
            filling.added += 1;
        }
    }

    /// Begins what is due, and takes what is ready. `keys` are those that the database
    /// may have at the most.
    pub(super) fn tend(&mut self, keys: impl FnOnce() -> u64) {
        if let Some(filling) = self.filling.take_if(|it| it.thread.is_finished()) {
            match filling.thread.join() {
                Ok(Ok(found)) => self.take(filling.filter, found + filling.added),
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the ids of captures cannot be read; trying again");
                    self.not_before = Some(Instant::now() + RETRY);
                }
                Err(_) => self.not_before = Some(Instant::now() + RETRY),
            }
        }
        let is_due = self.filter.is_none() || self.keys >= self.room;
        let may = self
            .not_before
            .is_none_or(|moment| Instant::now() >= moment);
        if is_due && may && self.filling.is_none() {
            self.fill(keys());
        }
    }

    fn take(&mut self, filter: Arc<Filter>, keys: u64) {
        self.keys = keys;
        // So that a filter of the largest size is not made anew all the time.
        self.room = filter.room().max(2 * keys);
        self.shared.set_filter(Arc::clone(&filter));
        self.filter = Some(filter);
    }

    /// What is not in the database yet is in the overlay, or comes later.
    fn fill(&mut self, keys: u64) {
        let filter = Arc::new(Filter::with_room_for(keys.saturating_mul(2)));
        for key in self.shared.lock().keys() {
            filter.add(stored_key(key));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (database, recent) = (self.database.clone(), Arc::clone(&self.shared.recent));
        let (into, stopped) = (Arc::clone(&filter), Arc::clone(&stop));
        let thread = thread::Builder::new()
            .name("outbox-ids".to_owned())
            .spawn(move || {
                priority::lower();
                read_all(&database, &recent, &into, &stopped)
            });
        match thread {
            Ok(thread) => {
                self.filling = Some(Filling {
                    filter,
                    stop,
                    added: 0,
                    thread,
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the ids of captures cannot be read; trying again");
                self.not_before = Some(Instant::now() + RETRY);
            }
        }
    }

    /// Ends what is under way.
    pub(super) fn end(self) {
        if let Some(filling) = self.filling {
            filling.stop.store(true, Ordering::Relaxed);
            // Whether it came to its end does not matter any more.
            let _ = filling.thread.join();
        }
    }
}

/// Notes all ids of the database; returns how many they are.
fn read_all(
    database: &Path,
    recent: &Recent,
    filter: &Filter,
    stop: &AtomicBool,
) -> rusqlite::Result<u64> {
    let connection = schema::open_for_reading(database, CACHE_KIB)?;
    // In this order: an id that leaves memory meanwhile is seen in the index.
    Ok(read_recent(recent, filter) + read_index(&connection, filter, stop)?)
}

fn read_recent(recent: &Recent, filter: &Filter) -> u64 {
    let (mut after, mut found) = ((i64::MIN, i64::MIN), 0);
    loop {
        let places = recent.behind(after, PIECE_IN_MEMORY);
        let Some(last) = places.last() else {
            return found;
        };
        after = *last;
        found += places.len() as u64;
        for (key, _) in places {
            filter.add(key);
        }
    }
}

fn read_index(
    connection: &Connection,
    filter: &Filter,
    stop: &AtomicBool,
) -> rusqlite::Result<u64> {
    const SQL: &str = "
        SELECT key, sequence FROM capture_key WHERE (key, sequence) > (?1, ?2)
        ORDER BY key, sequence LIMIT ?3";
    let mut statement = connection.prepare(SQL)?;
    let (mut after, mut found) = ((i64::MIN, i64::MIN), 0);
    while !stop.load(Ordering::Relaxed) {
        let mut rows = statement.query(params![after.0, after.1, PIECE])?;
        let mut piece = 0;
        while let Some(row) = rows.next()? {
            after = (row.get(0)?, row.get(1)?);
            filter.add(after.0);
            piece += 1;
        }
        found += piece;
        if piece < PIECE as u64 {
            break;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits_for(known: &mut Known) {
        while known
            .filling
            .as_ref()
            .is_some_and(|it| !it.thread.is_finished())
        {
            thread::yield_now();
        }
        known.tend(|| 0);
    }

    fn key(number: u64) -> Key {
        Key::from(number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    #[test]
    fn ids_of_the_database_are_known_also_while_and_after_a_filter_is_filled() {
        let directory = tempfile::tempdir().expect("a directory");
        let database = directory.path().join("relay.db");
        let writing = schema::open_for_writing(directory.path(), &database).expect("made");
        let insert = |number: u64| {
            let row = params![stored_key(key(number)), number];
            writing.execute("INSERT INTO capture_key VALUES (?1, ?2)", row)
        };
        // More than one piece.
        let stored = PIECE as u64 + 100;
        writing.execute_batch("BEGIN").expect("begun");
        for number in 0..stored {
            insert(number).expect("stored");
        }
        writing.execute_batch("COMMIT").expect("stored");

        let shared = Arc::new(Shared::default());
        let mut known = Known::new(database, Arc::clone(&shared), stored);
        assert!(known.may_hold(key(stored + 1)), "nothing is ruled out yet");
        known.add(key(stored));
        waits_for(&mut known);
        assert!(shared.filter().is_some());
        assert!((0..=stored).all(|number| known.may_hold(key(number))));
        let ruled_out = |known: &Known| {
            let unknown = stored + 10..stored + 1_010;
            unknown
                .filter(|number| !known.may_hold(key(*number)))
                .count()
        };
        assert!(ruled_out(&known) > 900);

        // A full one is replaced; until then it serves.
        insert(stored).expect("stored");
        known.room = 0;
        known.tend(|| stored);
        assert!(known.filling.is_some());
        known.add(key(stored + 1));
        assert!((0..stored + 2).all(|number| known.may_hold(key(number))));
        waits_for(&mut known);
        assert!(known.filling.is_none());
        assert!((0..stored + 2).all(|number| known.may_hold(key(number))));
        assert!(ruled_out(&known) > 900);
        assert_eq!(known.keys, stored + 2);
        known.end();
    }

    #[test]
    fn a_database_that_cannot_be_read_rules_nothing_out() {
        let nowhere = PathBuf::from("/nowhere/relay.db");
        let mut known = Known::new(nowhere, Arc::new(Shared::default()), 5);
        waits_for(&mut known);
        assert!(known.may_hold(key(1)));
        assert!(known.filling.is_none(), "tried again later");
        known.end();
    }
}
