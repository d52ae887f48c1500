//! The database's layout, and how it is opened.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, TransactionBehavior, config::DbConfig};

use super::OpenError;

/// "SegR" in ASCII: marks the file as the relay's.
const APPLICATION_ID: i64 = 0x5365_6752;
/// Counts up with every change of the layout.
const FORMAT_VERSION: i64 = 8;
/// Memory for the writer's pages, in KiB: what one flush touches.
const WRITER_CACHE_KIB: i64 = 12 * 1024;
/// The log is cut back to this size after a checkpoint, in bytes.
pub(super) const LOG_LIMIT_BYTES: u64 = 128 * 1024 * 1024;
/// A log of so many pages goes into the database file, which takes each of them once.
const CHECKPOINT_PAGES: i64 = 8_192;

const LAYOUT: &str = "
CREATE TABLE probe (                 -- written to find out whether the disk works again
  id INTEGER PRIMARY KEY,
  millis INTEGER NOT NULL
) STRICT;

CREATE TABLE integration (
  id TEXT PRIMARY KEY,               -- name, from the second incarnation on name@incarnation
  spec BLOB NOT NULL                 -- jebbit.segmentrelay.v1.Integration, sealed; empty once
                                     -- it is deleted: what is kept under the id is no later one's
) STRICT;

CREATE TABLE vault (                 -- sqlite/keys.rs
  name TEXT PRIMARY KEY,
  value BLOB NOT NULL
) STRICT;

CREATE TABLE subject (               -- whose data a capture is; narrow, since it is read whole
  sequence INTEGER PRIMARY KEY,      -- as in capture
  subject INTEGER NOT NULL           -- the user id, blinded
) STRICT;

CREATE TABLE erasure (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  receipt BLOB NOT NULL              -- jebbit.segmentrelay.v1.ErasureReceipt, sealed
) STRICT;

CREATE TABLE notice (                -- webhooks that are to be sent
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT NOT NULL UNIQUE,         -- webhook-id
  millis INTEGER NOT NULL,
  body BLOB NOT NULL                 -- JSON without secrets
) STRICT;

CREATE TABLE lane (
  id INTEGER PRIMARY KEY,
  integration_id TEXT NOT NULL,
  region INTEGER NOT NULL,           -- 1 non-EU, 2 EU
  shard INTEGER NOT NULL,
  waiting_events INTEGER NOT NULL DEFAULT 0,
  waiting_bytes INTEGER NOT NULL DEFAULT 0,
  UNIQUE (integration_id, region, shard)
) STRICT;

CREATE TABLE capture (
  sequence INTEGER PRIMARY KEY,      -- order of acceptance
  integration_id TEXT NOT NULL,
  capture_id TEXT NOT NULL,
  digest BLOB NOT NULL,              -- of the capture as it was sent, blinded
  accept_millis INTEGER NOT NULL,
  open INTEGER NOT NULL,             -- 1 while an event waits or is kept as a dead letter
  status BLOB NOT NULL               -- outbox/record.rs
) STRICT;

CREATE TABLE capture_key (           -- finds a capture by its id
  key INTEGER NOT NULL,              -- first bytes of SHA-256 of integration_id NUL capture_id
  sequence INTEGER NOT NULL,         -- as in capture
  PRIMARY KEY (key, sequence)
) STRICT, WITHOUT ROWID;

CREATE TABLE id_run (                -- new keys, which are in memory too: writer/ids.rs
  id INTEGER PRIMARY KEY,
  lap INTEGER NOT NULL,              -- id_turn when they came
  key INTEGER NOT NULL,
  sequence INTEGER NOT NULL,
  places BLOB NOT NULL               -- key and sequence of each
) STRICT;

CREATE TABLE id_turn (               -- one row: all keys up to this one are in capture_key
  lap INTEGER NOT NULL,
  key INTEGER NOT NULL,
  sequence INTEGER NOT NULL
) STRICT;
INSERT INTO id_turn (lap, key, sequence)
VALUES (0, -9223372036854775808, -9223372036854775808);

CREATE TABLE journal (               -- one row
  applied INTEGER NOT NULL           -- number of the last record that stands here too
) STRICT;
INSERT INTO journal (applied) VALUES (0);

CREATE TABLE queue (
  sequence INTEGER PRIMARY KEY,      -- as in capture
  lane INTEGER NOT NULL,
  replay INTEGER NOT NULL,           -- 1 for dead letters that go again, behind the others
  identify BLOB,                     -- JSON or sealed; NULL once it does not wait any more
  identify_crc INTEGER,              -- CRC-32 of it as it stands here
  track BLOB,
  track_crc INTEGER
) STRICT;
CREATE INDEX queue_by_lane ON queue (lane, replay);

CREATE TABLE dead_letter (
  id INTEGER PRIMARY KEY,
  sequence INTEGER NOT NULL,         -- as in capture
  lane INTEGER NOT NULL,
  event INTEGER NOT NULL,            -- 1 identify, 2 track
  reason INTEGER NOT NULL,           -- jebbit.segmentrelay.v1.DeliveryReason
  millis INTEGER NOT NULL,
  payload BLOB NOT NULL,
  payload_crc INTEGER NOT NULL,
  UNIQUE (sequence, event)
) STRICT;
CREATE INDEX dead_letter_by_lane ON dead_letter (lane);

CREATE TABLE dead_letter_id (        -- one row
  last INTEGER NOT NULL              -- the last id that was given: none is given twice
) STRICT;
INSERT INTO dead_letter_id (last) VALUES (0);
";

/// Former versions, each with what makes the next one of it.
const UPGRADES: [(i64, &str); 2] = [(6, FROM_VERSION_6), (7, FROM_VERSION_7)];

/// Integrations that were deleted are known by the lanes that they have left.
const FROM_VERSION_6: &str = "
INSERT INTO integration (id, spec)
SELECT DISTINCT integration_id, x'' FROM lane WHERE integration_id NOT IN (SELECT id FROM integration);
PRAGMA user_version = 7;
";

/// Ids of dead letters came again once the highest ones were gone.
const FROM_VERSION_7: &str = "
CREATE TABLE dead_letter_id (last INTEGER NOT NULL) STRICT;
INSERT INTO dead_letter_id (last) SELECT coalesce(max(id), 0) FROM dead_letter;
PRAGMA user_version = 8;
";

/// The counts of lanes, from what is there.
pub(super) const RECOUNT: &str = "
UPDATE lane SET
  waiting_events = (SELECT coalesce(sum((q.identify IS NOT NULL) + (q.track IS NOT NULL)), 0)
                    FROM queue q WHERE q.lane = lane.id),
  waiting_bytes = (SELECT coalesce(sum(coalesce(length(q.identify), 0) + coalesce(length(q.track), 0)), 0)
                   FROM queue q WHERE q.lane = lane.id)
WHERE waiting_events > 0 OR EXISTS (SELECT 1 FROM queue q WHERE q.lane = lane.id)";

/// Whether a database is the relay's, of a version that is known.
pub(super) fn check_version(
    connection: &Connection,
    directory: &Path,
    database: &Path,
) -> Result<(), OpenError> {
    let number = |name: &str| {
        connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0))
    };
    let failed = |source: rusqlite::Error| match source.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase) => OpenError::Foreign(database.to_owned()),
        _ => OpenError::Database {
            path: directory.to_owned(),
            source,
        },
    };
    if number("application_id").map_err(failed)? != APPLICATION_ID {
        return Err(OpenError::Foreign(database.to_owned()));
    }
    let found = number("user_version").map_err(failed)?;
    if (UPGRADES[0].0..=FORMAT_VERSION).contains(&found) {
        return Ok(());
    }
    Err(OpenError::Version {
        path: directory.to_owned(),
        found,
        known: FORMAT_VERSION,
    })
}

/// Opens the database for the writer; makes its layout where it is new.
pub(super) fn open_for_writing(directory: &Path, database: &Path) -> Result<Connection, OpenError> {
    let failed = |source| OpenError::Database {
        path: directory.to_owned(),
        source,
    };
    create_private(database).map_err(|source| OpenError::Directory {
        path: directory.to_owned(),
        source,
    })?;
    // Each connection is used by one thread.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(database, flags).map_err(failed)?;
    let number = |connection: &Connection, name: &str| {
        connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0))
    };
    let empty = is_empty(&connection);
    let is_new = empty.map_err(|source| match source.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase) => OpenError::Foreign(database.to_owned()),
        _ => failed(source),
    })?;
    if is_new {
        // Both have to be set before the first table.
        connection
            .execute_batch("PRAGMA page_size=8192; PRAGMA auto_vacuum=INCREMENTAL;")
            .map_err(failed)?;
    } else {
        if number(&connection, "application_id").map_err(failed)? != APPLICATION_ID {
            return Err(OpenError::Foreign(database.to_owned()));
        }
        let mut found = number(&connection, "user_version").map_err(failed)?;
        for (version, statements) in UPGRADES {
            if found == version {
                upgrade(&mut connection, statements).map_err(failed)?;
                found += 1;
            }
        }
        if found != FORMAT_VERSION {
            let path = directory.to_owned();
            return Err(OpenError::Version {
                path,
                found,
                known: FORMAT_VERSION,
            });
        }
    }
    prepare(&mut connection, is_new).map_err(failed)?;
    Ok(connection)
}

/// Whether there is no table yet: it is new, or its making was interrupted.
fn is_empty(connection: &Connection) -> rusqlite::Result<bool> {
    const SQL: &str = "SELECT NOT EXISTS (SELECT 1 FROM sqlite_schema)";
    connection.query_row(SQL, [], |row| row.get(0))
}

/// All of it or nothing.
fn upgrade(connection: &mut Connection, statements: &str) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(statements)?;
    transaction.commit()
}

/// Write keys and addresses are in there, so it is for the relay's user alone;
/// SQLite gives its log the same rights.
fn create_private(database: &Path) -> std::io::Result<()> {
    let mut options = std::fs::File::options();
    options.create(true).truncate(false).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(database).map(drop)
}

fn prepare(connection: &mut Connection, is_new: bool) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // An acknowledged capture has to survive a power loss: fsync at each commit.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", LOG_LIMIT_BYTES)?;
    connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    connection.pragma_update(None, "secure_delete", "ON")?;
    tune(connection, WRITER_CACHE_KIB)?;
    // What a former run left in the log may not be as the keys have it now.
    if !is_new {
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    }
    if is_new {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(LAYOUT)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", FORMAT_VERSION)?;
        transaction.commit()?;
    }
    Ok(())
}

fn tune(connection: &Connection, cache_kib: i64) -> rusqlite::Result<()> {
    // Without it SQLite plans a statement anew each time another value is bound.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.pragma_update(None, "cache_size", -cache_kib)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

/// Opens the database for somebody who reads, with so much memory for pages, in KiB.
pub(super) fn open_for_reading(database: &Path, cache_kib: i64) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(database, flags)?;
    tune(&connection, cache_kib)?;
    Ok(connection)
}
