//! SQLite's log is emptied now and then. What was deleted stands in it until it is written
//! over, which is never where nothing comes; payloads are to be gone once they are
//! delivered or erased.

use std::time::Duration;

use rusqlite::Connection;

/// Wait for readers before the log is emptied.
const CUT_WAIT: Duration = Duration::from_millis(50);
/// Wait for whoever else has the database locked.
const BUSY_WAIT: Duration = Duration::from_secs(5);

/// Empties the log, unless somebody reads for longer; the next time will do.
pub(super) fn cut(connection: &Connection) {
    const CUT: &str = "PRAGMA wal_checkpoint(TRUNCATE)";
    let cut = connection
        .busy_timeout(CUT_WAIT)
        .and_then(|()| connection.query_row(CUT, [], |_| Ok(())))
        .and_then(|()| connection.busy_timeout(BUSY_WAIT));
    if let Err(error) = cut {
        tracing::warn!(%error, "the outbox's log is not emptied");
    }
}
