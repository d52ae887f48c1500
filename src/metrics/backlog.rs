//! What waits, and how full the disk is: written down now and then, so that whoever
//! reads the metrics asks no database.

use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::integration::IntegrationId;

/// What waits of one integration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BacklogOf {
    /// Whose it is.
    pub integration_id: IntegrationId,
    /// Events.
    pub events: u64,
    /// Bytes.
    pub bytes: u64,
    /// Age of the oldest event.
    pub oldest_age: Duration,
    /// Whether its deliveries are paused.
    pub paused: bool,
    /// The worst condition of its sources: 0 healthy, 1 broken, 2 suspended, 3 parked.
    pub condition: u8,
}

impl BacklogOf {
    /// Adds the backlog of another integration.
    pub fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.bytes += other.bytes;
        self.oldest_age = self.oldest_age.max(other.oldest_age);
        self.paused &= other.paused;
        self.condition = self.condition.max(other.condition);
    }
}

/// A disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskSpace {
    /// Of its size so much is free.
    pub free: u64,
    /// Its size.
    pub total: u64,
    /// What the outbox's files take.
    pub used: u64,
}

impl DiskSpace {
    /// Looks at a directory and at the files in it.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn of(directory: &Path) -> std::io::Result<Self> {
        let disk = rustix::fs::statvfs(directory)?;
        let mut used = 0;
        for file in std::fs::read_dir(directory)? {
            used += file?.metadata()?.len();
        }
        Ok(Self {
            // What is kept for root is no use to us.
            free: disk.f_bavail.saturating_mul(disk.f_frsize),
            total: disk.f_blocks.saturating_mul(disk.f_frsize),
            used,
        })
    }
}

/// The last look at it.
#[derive(Debug, Default)]
pub struct BacklogBoard(Mutex<Board>);

#[derive(Debug, Default)]
struct Board {
    integrations: Vec<BacklogOf>,
    disk: Option<DiskSpace>,
    writable: bool,
}

impl BacklogBoard {
    /// Writes a look down.
    pub fn note(&self, integrations: Vec<BacklogOf>, disk: Option<DiskSpace>, writable: bool) {
        *self.lock() = Board {
            integrations,
            disk,
            writable,
        };
    }

    /// The integrations of which most waits, and the others together, as
    /// far as there are any.
    pub(super) fn of_integrations(&self, most: usize) -> (Vec<BacklogOf>, Option<BacklogOf>) {
        let mut named = self.lock().integrations.clone();
        named.sort_by_key(|one| (std::cmp::Reverse(one.events), one.integration_id.clone()));
        let rest = named.split_off(most.min(named.len()));
        let others = rest.into_iter().reduce(|mut sum, one| {
            sum.add(&one);
            sum
        });
        (named, others)
    }

    pub(super) fn disk(&self) -> Option<DiskSpace> {
        self.lock().disk
    }

    pub(super) fn is_writable(&self) -> bool {
        self.lock().writable
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
