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
    /// Whether others of the lane were taken meanwhile.
    pub(super) is_passed: bool,
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
            is_passed: false,
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

    /// Others were taken.
    pub(super) fn pass(&mut self) {
        for suspect in &mut self.0 {
            suspect.is_passed = true;
        }
    }

    /// All are tried again at once.
    pub(super) fn forget_waits(&mut self) {
        for suspect in &mut self.0 {
            suspect.not_before = (UnixMillis(0), Duration::ZERO);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    fn after(seconds: u64) -> UnixMillis {
        NOW.plus(Duration::from_secs(seconds))
    }

    /// Users that are tried again after 30 s, by the requests that tried them last.
    fn suspects(refused: bool, users: &[(&str, u64)]) -> Suspects {
        let mut suspects = Suspects::default();
        for (user, request) in users {
            let suspect = Suspect {
                first_refused: refused.then_some(*request),
                ..suspects.take((*user).to_owned())
            };
            suspects.set_aside(suspect, *request, NOW, Duration::from_secs(30));
        }
        suspects
    }

    #[test]
    fn each_is_due_at_its_own_moment_and_first_the_one_that_was_not_tried_for_longest() {
        let mut suspects = suspects(true, &[("b", 3), ("a", 2), ("c", 4)]);
        assert_eq!(suspects.due(after(29), None), None);
        assert_eq!(suspects.next_moment(after(29)), Some(after(30)));
        assert_eq!(suspects.due(after(30), None).as_deref(), Some("a"));
        let tried = suspects.take("a".to_owned());
        suspects.set_aside(tried, 5, after(30), Duration::from_secs(60));
        assert_eq!(suspects.due(after(30), None).as_deref(), Some("b"));
        suspects.release("b");
        suspects.release("c");
        assert_eq!(suspects.due(after(89), None), None);
        suspects.forget_waits();
        assert_eq!(suspects.due(after(31), None).as_deref(), Some("a"));
    }

    #[test]
    fn what_was_refused_for_good_is_tried_once_others_were_taken_after_it() {
        let users = [("a", 2), ("b", 3)];
        let refused = suspects(true, &users);
        assert_eq!(refused.due(NOW, Some(2)), None);
        assert_eq!(refused.due(NOW, Some(3)).as_deref(), Some("a"));
        // What may pass by itself keeps its schedule.
        assert_eq!(suspects(false, &users).due(NOW, Some(9)), None);
    }

    #[test]
    fn a_clock_that_is_put_back_makes_no_wait_longer() {
        let suspects = suspects(false, &[("a", 2)]);
        let put_back = UnixMillis(NOW.0 - 3_600_000);
        let expected = put_back.plus(Duration::from_secs(30));
        assert_eq!(suspects.next_moment(put_back), Some(expected));
    }

    #[test]
    fn all_other_users_pass() {
        assert!(matches!(suspects(false, &[]).others(), LeaseScope::All));
        let LeaseScope::Except(users) = suspects(false, &[("a", 2), ("b", 3)]).others() else {
            panic!("all pass");
        };
        assert_eq!(users.len(), 2);
    }
}
