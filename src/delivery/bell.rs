//! How the dispatcher calls a worker.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Calls one worker. A worker that leaves while it is called is not missed:
/// both happen under one lock.
#[derive(Debug, Default)]
pub(super) struct Bell {
    state: Mutex<BellState>,
    rung: Notify,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum BellState {
    #[default]
    Quiet,
    Rung,
    Left,
}

impl Bell {
    /// Calls the worker. Returns whether it is still there.
    pub(super) fn ring(&self) -> bool {
        let mut state = self.lock();
        if *state == BellState::Left {
            return false;
        }
        *state = BellState::Rung;
        drop(state);
        self.rung.notify_one();
        true
    }

    pub(super) fn has_left(&self) -> bool {
        *self.lock() == BellState::Left
    }

    /// Waits to be called.
    pub(super) async fn heard(&self) {
        loop {
            {
                let mut state = self.lock();
                if *state == BellState::Rung {
                    *state = BellState::Quiet;
                    return;
                }
            }
            self.rung.notified().await;
        }
    }

    /// Goes home, unless somebody calls. Returns whether it may.
    pub(super) fn leave(&self) -> bool {
        let mut state = self.lock();
        let quiet = *state != BellState::Rung;
        if quiet {
            *state = BellState::Left;
        }
        quiet
    }

    fn lock(&self) -> MutexGuard<'_, BellState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bell_is_heard_also_if_it_rang_before_and_keeps_a_worker_from_leaving() {
        let bell = Bell::default();
        assert!(bell.ring());
        assert!(!bell.leave());
        bell.heard().await;
        assert!(bell.leave());
        assert!(bell.has_left());
        assert!(!bell.ring());
    }
}
