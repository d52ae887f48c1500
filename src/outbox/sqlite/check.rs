//! Reads all of a store that no relay has open, and says what is damaged, of whom.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use rusqlite::{Connection, Row};

use super::{OpenError, export::offline, journal, journal::OnDamage, open, row::crc32, schema};
use crate::{integration::IntegrationId, outbox::record, vault::Vault};

/// Findings of SQLite itself at the most.
const MAX_FINDINGS: usize = 100;
/// Rows between two notes of the progress.
const STEP: u64 = 10_000;

/// Something that is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// What, and what becomes of it.
    pub what: String,
    /// Whose it is, where that can be told.
    pub integration_id: Option<String>,
    /// Events that it concerns.
    pub events: u64,
}

/// What a store holds, and what of it is damaged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Captures that are remembered.
    pub captures: u64,
    /// Events that wait; those in the journal alone are not among them.
    pub waiting: u64,
    /// Events that were given up and are kept.
    pub dead_letters: u64,
    /// Records in the journal that are not in the database yet.
    pub journal_records: u64,
    /// What is damaged.
    pub damages: Vec<Damage>,
}

/// Why a store can't be checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// There is none.
    #[error("[outbox] path {0}: there is no embedded outbox")]
    Missing(PathBuf),
    /// It can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Reads all of it, and changes nothing. Tells how many rows of how many it has read.
///
/// # Errors
/// [`CheckError`]; what is damaged is no error.
pub fn check(directory: &Path, mut shown: impl FnMut(u64, u64)) -> Result<CheckReport, CheckError> {
    let database = directory.join("relay.db");
    if !database.exists() {
        return Err(CheckError::Missing(directory.to_owned()));
    }
    let _lock = open::lock_directory(directory)?;
    let failed = |source| OpenError::Database {
        path: directory.to_owned(),
        source,
    };
    let connection = schema::open_for_reading(&database, 1_024).map_err(failed)?;
    schema::check_version(&connection, directory, &database)?;
    let mut check = Check {
        connection: &connection,
        report: CheckReport::default(),
        done: 0,
        total: 0,
        shown: &mut shown,
    };
    check.pages();
    check.counts();
    check.captures();
    check.payloads("queue", "identify", "identify_crc");
    check.payloads("queue", "track", "track_crc");
    check.payloads("dead_letter", "payload", "payload_crc");
    check.lanes();
    check.journal(directory);
    Ok(check.report)
}

/// Accepts the loss of what [`check`] finds damaged: keeps copies of a damaged journal, takes
/// over what can be read of it, and makes indexes and counts anew. Damaged payloads stay: the
/// relay gives them up as dead letters of the reason DAMAGED.
///
/// # Errors
/// [`OpenError`]: the database itself can't be opened.
pub fn accept_damage(directory: &Path, vault: &Arc<Vault>) -> Result<(), OpenError> {
    let recovered = open::recovered(&offline(directory), vault, OnDamage::Accept)?;
    let (connection, _) = recovered.writer.into_parts();
    let repaired = connection.execute_batch(&format!("REINDEX; {}", schema::RECOUNT));
    repaired.map_err(|source| OpenError::Database {
        path: directory.to_owned(),
        source,
    })
}

struct Check<'a> {
    connection: &'a Connection,
    report: CheckReport,
    done: u64,
    total: u64,
    shown: &'a mut dyn FnMut(u64, u64),
}

impl Check<'_> {
    fn found(&mut self, what: impl Into<String>, integration_id: Option<String>, events: u64) {
        self.report.damages.push(Damage {
            what: what.into(),
            integration_id,
            events,
        });
    }

    /// Hands each row on; a table that can't be read to its end is a finding.
    fn rows(
        &mut self,
        table: &str,
        sql: &str,
        mut each: impl FnMut(&Row<'_>) -> rusqlite::Result<()>,
    ) {
        let read = || -> rusqlite::Result<()> {
            let mut statement = self.connection.prepare(sql)?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                each(row)?;
                self.done += 1;
                if self.done.is_multiple_of(STEP) {
                    (self.shown)(self.done, self.total);
                }
            }
            Ok(())
        };
        let mut read = read;
        if let Err(error) = read() {
            self.found(
                format!("the table {table} cannot be read to its end: {error}"),
                None,
                0,
            );
        }
    }

    /// What SQLite says of its pages and indexes.
    fn pages(&mut self) {
        let sql = format!("PRAGMA integrity_check({MAX_FINDINGS})");
        let mut said = Vec::new();
        self.rows("(all)", &sql, |row| {
            said.push(row.get::<_, String>(0)?);
            Ok(())
        });
        for line in said.into_iter().filter(|line| line != "ok") {
            self.found(format!("relay.db: {line}"), None, 0);
        }
    }

    fn counts(&mut self) {
        let count = |table| {
            let sql = format!("SELECT count(*) FROM {table} NOT INDEXED");
            self.connection
                .query_row(&sql, [], |row| row.get::<_, u64>(0))
        };
        let counts = ["capture", "queue", "dead_letter"].map(|table| count(table).unwrap_or(0));
        let [captures, queued, dead] = counts;
        (self.report.captures, self.report.dead_letters) = (captures, dead);
        self.total = captures + 2 * queued + dead;
    }

    /// States that can't be read.
    fn captures(&mut self) {
        let mut damaged: BTreeMap<String, u64> = BTreeMap::new();
        let sql = "SELECT integration_id, capture_id, status FROM capture NOT INDEXED";
        self.rows("capture", sql, |row| {
            let (name, capture, status): (String, String, Vec<u8>) =
                (row.get(0)?, row.get(1)?, row.get(2)?);
            let decoded = IntegrationId::stored(&name)
                .is_some_and(|id| record::decode(id, capture, &status).is_ok());
            if !decoded {
                *damaged.entry(name).or_default() += 2;
            }
            Ok(())
        });
        for (name, events) in damaged {
            self.found("the states of captures cannot be read", Some(name), events);
        }
    }

    /// Payloads that are not what was stored, or belong to no capture.
    fn payloads(&mut self, table: &str, payload: &str, crc: &str) {
        let mut damaged: BTreeMap<Option<String>, [u64; 2]> = BTreeMap::new();
        let mut sound = 0;
        let sql = format!(
            "SELECT c.integration_id, p.{payload}, p.{crc}
             FROM {table} p NOT INDEXED LEFT JOIN capture c ON c.sequence = p.sequence
             WHERE p.{payload} IS NOT NULL"
        );
        self.rows(table, &sql, |row| {
            let (name, bytes, crc): (Option<String>, Vec<u8>, Option<u32>) =
                (row.get(0)?, row.get(1)?, row.get(2)?);
            let kind = match (&name, Some(crc32(&bytes)) == crc) {
                (_, false) => 0,
                (None, true) => 1,
                (Some(_), true) => {
                    sound += 1;
                    return Ok(());
                }
            };
            damaged.entry(name).or_default()[kind] += 1;
            Ok(())
        });
        if table == "queue" {
            self.report.waiting += sound;
        }
        for (name, [changed, orphaned]) in damaged {
            if changed > 0 {
                let what =
                    format!("{table}: payloads are damaged; the relay gives them up (DAMAGED)");
                self.found(what, name, changed);
            }
            if orphaned > 0 {
                self.found(
                    format!("{table}: payloads of captures that are missing"),
                    None,
                    orphaned,
                );
            }
        }
    }

    /// Lanes whose events are not all found by their index, or are counted wrongly.
    fn lanes(&mut self) {
        const SQL: &str = "
            SELECT l.integration_id, l.waiting_events, coalesce(q.events, 0),
                (SELECT coalesce(sum((i.identify IS NOT NULL) + (i.track IS NOT NULL)), 0)
                 FROM queue i INDEXED BY queue_by_lane WHERE i.lane = l.id)
            FROM lane l LEFT JOIN (
                SELECT lane, sum((identify IS NOT NULL) + (track IS NOT NULL)) AS events
                FROM queue NOT INDEXED GROUP BY +lane) q ON q.lane = l.id";
        let mut wrong = Vec::new();
        self.rows("lane", SQL, |row| {
            let (counted, there, indexed): (u64, u64, u64) =
                (row.get(1)?, row.get(2)?, row.get(3)?);
            if counted != there || indexed != there {
                wrong.push((row.get::<_, String>(0)?, [counted, there, indexed]));
            }
            Ok(())
        });
        for (name, [counted, there, indexed]) in wrong {
            let what = format!(
                "a lane counts {counted} events that wait, has {there}, and finds {indexed} by its index"
            );
            self.found(what, Some(name), counted.max(there).saturating_sub(indexed));
        }
    }

    fn journal(&mut self, directory: &Path) {
        let applied = self
            .connection
            .query_row("SELECT applied FROM journal", [], |row| row.get(0));
        let looked = match applied {
            Ok(applied) => journal::look(directory, applied),
            Err(error) => return self.found(format!("the table journal: {error}"), None, 0),
        };
        match looked {
            Ok((records, 0)) => self.report.journal_records = records,
            Ok((records, missing)) => {
                self.report.journal_records = records;
                let what =
                    format!("journal: {missing} acknowledged record(s) are damaged or missing");
                self.found(what, None, 0);
            }
            Err(error) => self.found(format!("journal: {error}"), None, 0),
        }
    }
}
