//! Faults that tests plant: an answer that is lost, a removal that fails.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in super::super) enum Fault {
    /// A batch is stored, and its answer does not arrive.
    LostAnswer,
    /// A message is not removed.
    Delete,
    /// Messages are not removed.
    Purge,
    /// A replica that is behind has nothing yet of what is read.
    Behind,
}

/// Which of the next calls go wrong: how many are let through before.
#[derive(Clone, Default)]
pub(in super::super) struct Faults(Arc<Mutex<HashMap<Fault, u32>>>);

impl Faults {
    /// One call goes wrong, after so many that don't.
    pub(in super::super) fn plant(&self, fault: Fault, after: u32) {
        let mut planted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        planted.insert(fault, after);
    }

    /// What has not gone wrong by now does not.
    pub(in super::super) fn clear(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    pub(super) fn strikes(&self, fault: Fault) -> bool {
        let mut planted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match planted.get_mut(&fault) {
            None => false,
            Some(0) => planted.remove(&fault).is_some(),
            Some(after) => {
                *after -= 1;
                false
            }
        }
    }
}
