//! A lane's suspects: events that failed alone, with an answer that may be their own fault.
//! Each is set aside: it has its own schedule, later events of its user wait behind it, and
//! all other users of the lane pass.

use std::time::Duration;

use crate::{outbox::LeaseScope, time::UnixMillis};

/// Suspects of a source at the most. With more it is the source that is sick.
pub(super) const MAX_SUSPECTS: usize = 64;

/// A user whose first waiting event is a suspect.
#[derive(Clone, Debug)]
pub(super) struct Suspect {
    pub(super) user: String,
    /// Failures alone, in a row.
    pub(super) failures: u32,
    /// Number of the first request with the event that was refused for good.
    pub(super) first_refused: Option<u64>,
    /// Number of the last request with it.
    last: u64,
    /// Not tried before this moment, and how long that was to be.
    not_before: (UnixMillis, Duration),
}

impl Suspect {
    pub(super) fn new(user: String) -> Self {
        Self {
            user,
            failures: 0,
            first_refused: None,
            last: 0,
            not_before: (UnixMillis(0), Duration::ZERO),
        }
    }

    /// When it is tried again. A clock that was put back makes no wait longer.
    fn moment(&self, now: UnixMillis) -> UnixMillis {
        let (moment, wait) = self.not_before;
        moment.min(now.plus(wait))
    }

    /// Whether it waited for something of its source to be taken, and something was.
    fn has_control(&self, taken: Option<u64>) -> bool {
        self.first_refused.is_some() && taken > Some(self.last)
    }
}

/// The suspects of a lane.
#[derive(Debug, Default)]
pub(super) struct Suspects(Vec<Suspect>);

impl Suspects {
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// The events of all other users.
    pub(super) fn others(&self) -> LeaseScope {
        if self.0.is_empty() {
            return LeaseScope::All;
        }
        LeaseScope::Except(self.0.iter().map(|one| one.user.clone()).collect())
    }

    /// The user of the next suspect to try. `taken` is the number of the last request of
    /// the source that was taken.
    pub(super) fn due(&self, now: UnixMillis, taken: Option<u64>) -> Option<String> {
        let due = |one: &&Suspect| one.moment(now) <= now || one.has_control(taken);
        let due = self.0.iter().filter(due).min_by_key(|one| one.last);
        due.map(|one| one.user.clone())
    }

    /// The user of the suspect that was not tried for longest.
    pub(super) fn oldest(&self) -> Option<String> {
        let oldest = self.0.iter().min_by_key(|one| one.last);
        oldest.map(|one| one.user.clone())
    }

    /// When the next suspect is due.
    pub(super) fn next_moment(&self, now: UnixMillis) -> Option<UnixMillis> {
        self.0.iter().map(|one| one.moment(now)).min()
    }

    /// Takes a user's suspect out; a new one where there is none.
    pub(super) fn take(&mut self, user: String) -> Suspect {
        match self.0.iter().position(|one| one.user == user) {
            Some(place) => self.0.swap_remove(place),
            None => Suspect::new(user),
        }
    }

    /// Sets a suspect aside.
    pub(super) fn set_aside(
        &mut self,
        suspect: Suspect,
        request: u64,
        now: UnixMillis,
        wait: Duration,
    ) {
        self.0.push(Suspect {
            last: request,
            not_before: (now.plus(wait), wait),
            ..suspect
        });
    }

    /// The user's events go with the others again.
    pub(super) fn release(&mut self, user: &str) {
        self.0.retain(|one| one.user != user);
    }

    /// All are tried again at once.
    pub(super) fn forget_waits(&mut self) {
        for suspect in &mut self.0 {
            suspect.not_before = (UnixMillis(0), Duration::ZERO);
        }
    }
}
