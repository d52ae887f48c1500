//! The files of the journal: which there have to be, and what is done where they are damaged.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use super::{NAMES, read};
use crate::time::UnixMillis;

/// Why the journal can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Acknowledged records are damaged.
    #[error("{0} acknowledged record(s) are damaged or missing")]
    Damaged(u64),
    /// A file is not there.
    #[error("{0} is missing, and what was acknowledged in it")]
    Missing(PathBuf),
    /// There are journals without a database.
    #[error(
        "relay.db is missing or empty, but {0} is not: restore the whole directory from a backup, \
         or move it away to begin with an empty outbox"
    )]
    NoDatabase(PathBuf),
}

/// What to do where acknowledged records are damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::outbox::sqlite) enum OnDamage {
    /// Open nothing, and change nothing.
    Refuse,
    /// Keep the files, and go on with what can be read.
    Accept,
}

/// Looks at a store before its database is opened. A new one has no journals with content, and
/// gets empty ones; any other one has all three, or has lost what was in the missing one.
pub(in crate::outbox::sqlite) fn prepare(
    directory: &Path,
    on_damage: OnDamage,
) -> Result<(), JournalError> {
    let size = |name| match std::fs::metadata(directory.join(name)) {
        Ok(known) => Ok(Some(known.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let is_new = size("relay.db")?.unwrap_or(0) == 0;
    for name in NAMES {
        match size(name)? {
            Some(bytes) if bytes > 0 && is_new => {
                return Err(JournalError::NoDatabase(directory.join(name)));
            }
            None if !is_new && on_damage == OnDamage::Refuse => {
                return Err(JournalError::Missing(directory.join(name)));
            }
            None => {
                if !is_new {
                    tracing::error!(name, "a file of the journal is missing, and what was in it");
                }
                open_private(&directory.join(name))?;
            }
            Some(_) => {}
        }
    }
    sync_directory(directory)
}

/// Reads the segments of a store that is not open, and changes nothing. Returns how many records
/// after `applied` there are, and how many acknowledged ones are missing.
pub(in crate::outbox::sqlite) fn look(
    directory: &Path,
    applied: u64,
) -> Result<(u64, u64), JournalError> {
    let mut content = read::Content::default();
    for name in NAMES {
        let path = directory.join(name);
        match File::open(&path) {
            Ok(mut file) => content.read(&mut file, applied)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(JournalError::Missing(path));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok((content.records.len() as u64, content.missing(applied)))
}

/// Makes files that were created last also after a power loss.
pub(in crate::outbox::sqlite) fn sync_directory(directory: &Path) -> Result<(), JournalError> {
    if cfg!(unix) {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

/// Copies the segments, so that what is damaged can be looked at later.
pub(super) fn keep(directory: &Path) -> io::Result<()> {
    let now = UnixMillis::now().0;
    for name in NAMES {
        let kept = directory.join(format!("{name}.damaged-{now}"));
        let mut copy = open_private(&kept)?;
        io::copy(&mut File::open(directory.join(name))?, &mut copy)?;
        copy.sync_all()?;
        tracing::warn!(path = %kept.display(), "a copy of the damaged journal is kept");
    }
    Ok(())
}

/// Addresses are in there, so it is for the relay's user alone.
pub(super) fn open_private(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.create(true).truncate(false).read(true).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}
