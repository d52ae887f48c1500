//! How the outbox is opened: lock, database, keys, journal, threads.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::Path,
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use tokio::sync::mpsc;

use super::{
    OpenError, OpenFiles, SqliteOptions, SqliteOutbox, WRITE_QUEUE,
    committer::{self, Committer, Parts, SEGMENT_BYTES},
    exclusive::{Exclusive, FlushPace},
    hidden::Hidden,
    journal::{self, Journal, JournalError, OnDamage, Record, record},
    keys,
    lookup::Lookup,
    overlay::{Overlay, Shared},
    read_queue, reader, schema,
    writer::Writer,
};
use crate::{
    outbox::{Signals, sealing::Sealing},
    vault::Vault,
};

/// An outbox with all that was acknowledged in its database; nothing runs yet.
pub(super) struct Recovered {
    pub(super) lock: File,
    pub(super) writer: Writer,
    pub(super) sealing: Arc<Sealing>,
    pub(super) journal: Journal,
    pub(super) lookup: Lookup,
    pub(super) signals: Arc<Signals>,
    pub(super) shared: Arc<Shared>,
}

pub(super) fn recovered(
    options: &SqliteOptions,
    vault: &Arc<Vault>,
    on_damage: OnDamage,
) -> Result<Recovered, OpenError> {
    let lock = lock_directory(&options.directory)?;
    let database = options.directory.join("relay.db");
    let journal = |source| OpenError::Journal {
        path: options.directory.clone(),
        source,
    };
    journal::prepare(&options.directory, on_damage).map_err(journal)?;
    let mut write = schema::open_for_writing(&options.directory, &database)?;
    journal::sync_directory(&options.directory).map_err(journal)?;
    let prepared =
        keys::prepare(&mut write, vault, options.encrypt_payloads).map_err(|source| {
            OpenError::Keys {
                path: options.directory.clone(),
                source,
            }
        })?;
    let failed = |source| OpenError::Database {
        path: options.directory.clone(),
        source,
    };
    let applied = write
        .query_row("SELECT applied FROM journal", [], |row| row.get(0))
        .map_err(failed)?;
    let (signals, shared) = (Arc::new(Signals::default()), Arc::new(Shared::default()));
    let lookup = Lookup::open(&database, Arc::clone(&shared.recent)).map_err(failed)?;
    let mut writer = Writer::new(
        write,
        options,
        &prepared,
        Arc::clone(&signals),
        Arc::clone(&shared),
    )
    .map_err(failed)?;
    let (journal, lookup) =
        recover(options, applied, on_damage, lookup, &mut writer).map_err(journal)?;
    Ok(Recovered {
        lock,
        writer,
        sealing: prepared.sealing,
        journal,
        lookup,
        signals,
        shared,
    })
}

pub(super) fn open(options: &SqliteOptions, vault: &Arc<Vault>) -> Result<SqliteOutbox, OpenError> {
    let Recovered {
        lock,
        writer,
        sealing,
        journal,
        lookup,
        signals,
        shared,
    } = recovered(options, vault, OnDamage::Refuse)?;
    let failed = |source| OpenError::Database {
        path: options.directory.clone(),
        source,
    };
    let database = options.directory.join("relay.db");
    let read = schema::open_for_reading(&database, reader::CACHE_KIB).map_err(failed)?;
    let (tally, next_sequence) = writer.known().map_err(failed)?;
    shared.lock().replace_tally(tally);

    let (write_sender, write_receiver) = mpsc::channel(WRITE_QUEUE);
    let (commit_sender, commit_receiver) = mpsc::channel(WRITE_QUEUE);
    let (read_sender, read_receiver) = read_queue::channel();
    let parts = Parts {
        journal,
        lookup,
        shared: Arc::clone(&shared),
        store: write_sender.clone(),
        signals: Arc::clone(&signals),
        next_sequence,
    };
    let committer = Committer::new(parts, options);
    let system = |source| OpenError::Directory {
        path: options.directory.clone(),
        source,
    };
    let read_shared = Arc::clone(&shared);
    let spawn = |name, run| spawn(name, run).map_err(system);
    let files = OpenFiles {
        committer: spawn(
            "outbox-commit",
            Box::new(move || committer.run(commit_receiver)),
        )?,
        writer: spawn(
            "outbox-writer",
            Box::new(move || writer.run(write_receiver)),
        )?,
        reader: spawn(
            "outbox-reader",
            Box::new(move || reader::run(read, &read_shared, read_receiver)),
        )?,
        _lock: lock,
    };
    Ok(SqliteOutbox {
        committer: commit_sender,
        writer: write_sender,
        reader: read_sender,
        exclusive: Exclusive::default(),
        flushes: FlushPace::default(),
        signals,
        sealing,
        shared,
        limits: options.limits,
        hidden: Hidden::default(),
        open: Mutex::new(Some(files)),
    })
}

fn spawn(name: &str, run: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run)
}

/// Puts what the last run left in the journal into the database.
fn recover(
    options: &SqliteOptions,
    applied: u64,
    on_damage: OnDamage,
    mut lookup: Lookup,
    writer: &mut Writer,
) -> Result<(Journal, Lookup), JournalError> {
    let mut overlay = Overlay::default();
    let each = |record: Record| replay(&record, &mut overlay, &mut lookup);
    let directory = &options.directory;
    let mut journal = Journal::open(directory, applied, SEGMENT_BYTES, on_damage, each)?;
    lookup.refresh();
    let entries = overlay.changed_through(u64::MAX);
    if journal.last() > applied {
        tracing::info!(
            captures = entries.len(),
            "what the last run left in the journal is put into the database"
        );
        writer
            .recover(entries, journal.last())
            .map_err(io::Error::other)?;
    }
    journal.erase()?;
    journal.restart();
    Ok((journal, lookup))
}

/// Does again what a record says.
fn replay(record: &Record, overlay: &mut Overlay, lookup: &mut Lookup) -> io::Result<()> {
    match record::read(record)? {
        record::Said::Probe => {}
        record::Said::Accepted(entry) => {
            overlay.put(&Arc::from(entry), [None, None]);
        }
        record::Said::Settled(settlement) => {
            for settled in &settlement.captures {
                let known = overlay.get(settled.sequence).cloned();
                let current = match known {
                    Some(entry) => Some(entry),
                    None => {
                        let stored = lookup.waiting(&settlement.lane, settled, record.number);
                        stored.map_err(io::Error::other)?.map(Arc::new)
                    }
                };
                let next = current.and_then(|current| {
                    let next = committer::settled(&current, settled)?;
                    Some((next, current.waiting))
                });
                if let Some((entry, before)) = next {
                    overlay.put(&Arc::new(entry), before);
                }
            }
        }
    }
    Ok(())
}

pub(super) fn lock_directory(directory: &Path) -> Result<File, OpenError> {
    let failed = |source| OpenError::Directory {
        path: directory.to_owned(),
        source,
    };
    make_private_directory(directory).map_err(failed)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(directory.join("relay.lock"))
        .map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked(directory.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Write keys and addresses are in there, so it is for the relay's user alone.
fn make_private_directory(directory: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)
}
