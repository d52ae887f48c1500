//! How delivery for each integration went lately: for its health.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{integration::IntegrationId, segment::Answer, time::UnixMillis};

/// The last good and the last bad attempt since the relay started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vitals {
    /// Last 2xx.
    pub last_success: Option<UnixMillis>,
    /// Last failed attempt.
    pub last_error: Option<(UnixMillis, String)>,
}

/// The vitals of all integrations; one entry for each that has sent.
#[derive(Debug, Default)]
pub struct VitalsBoard(Mutex<HashMap<IntegrationId, Vitals>>);

impl VitalsBoard {
    /// What is known of one integration.
    #[must_use]
    pub fn get(&self, id: &IntegrationId) -> Vitals {
        self.lock().get(id).cloned().unwrap_or_default()
    }

    /// Notes an answer.
    pub fn note(&self, id: &IntegrationId, answer: &Answer) {
        let error = answer.error();
        let mut board = self.lock();
        let vitals = board.entry(id.clone()).or_default();
        if error.is_empty() {
            vitals.last_success = Some(answer.started.plus(answer.latency));
        } else {
            vitals.last_error = Some((answer.started.plus(answer.latency), error));
        }
    }

    /// Forgets an integration that is no more.
    pub fn forget(&self, id: &IntegrationId) {
        self.lock().remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IntegrationId, Vitals>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
