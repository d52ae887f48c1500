//! What a disk may hold after a power loss: all that was synced, and any part of the rest.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use fastrand::Rng;

use super::trace::Change;

/// A disk writes so many bytes whole or not at all.
const SECTOR: usize = 512;

/// A file of the disk.
#[derive(Clone, Debug, Default)]
struct File {
    /// What was synced.
    durable: Vec<u8>,
    /// Writes and truncations since, by the numbers of their changes.
    pending: Vec<(usize, Change)>,
    /// Whether its name was synced.
    named: bool,
}

/// The disk at one moment of a trace.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    files: BTreeMap<String, File>,
    /// Removed files whose removal was not synced.
    removed: BTreeMap<String, File>,
    done: usize,
}

impl Disk {
    /// Goes on to just before the change of a number.
    pub(super) fn advance(&mut self, changes: &[Change], to: usize) {
        for (number, change) in changes.iter().enumerate().take(to).skip(self.done) {
            self.apply(number, change);
        }
        self.done = self.done.max(to);
    }

    fn apply(&mut self, number: usize, change: &Change) {
        match change {
            Change::Create(file) => {
                self.files.entry(file.clone()).or_default();
            }
            Change::Write { file, .. } | Change::Truncate { file, .. } => {
                let file = self.files.entry(file.clone()).or_default();
                file.pending.push((number, change.clone()));
            }
            Change::Sync { file, before } => {
                let Some(file) = self.files.get_mut(file) else {
                    return;
                };
                for (_, change) in file.pending.extract_if(.., |(at, _)| *at < *before) {
                    write(&mut file.durable, &change, None);
                }
            }
            Change::SyncNames { .. } => {
                self.files.values_mut().for_each(|file| file.named = true);
                self.removed.clear();
            }
            Change::Remove(name) => {
                if let Some(file) = self.files.remove(name).filter(|file| file.named) {
                    self.removed.insert(name.clone(), file);
                }
            }
            Change::Mark(_) => {}
        }
    }

    /// Writes one of the states in which a power loss may leave it into a directory.
    pub(super) fn lose_power(&self, rng: &mut Rng, directory: &Path) {
        // Of what is pending all, nothing, some writes, or some sectors get there.
        let chance = [0.0, 1.0, 0.5, 0.9][rng.usize(0..4)];
        let by_sector = rng.bool();
        let mut names = BTreeSet::new();
        for (name, file) in self.files.iter().chain(&self.removed) {
            let removed = self.removed.contains_key(name) && !self.files.contains_key(name);
            let is_there = (file.named && !removed) || rng.f64() < chance;
            if !is_there || !names.insert(name.clone()) {
                continue;
            }
            let mut content = file.durable.clone();
            for (_, change) in &file.pending {
                if by_sector {
                    write(&mut content, change, Some(&mut || rng.f64() < chance));
                } else if rng.f64() < chance {
                    write(&mut content, change, None);
                }
            }
            std::fs::write(directory.join(name), content).expect("written");
        }
    }
}

/// Applies a change to a file's content; of a write only the sectors that are kept.
fn write(content: &mut Vec<u8>, change: &Change, mut keep: Option<&mut dyn FnMut() -> bool>) {
    let mut kept = || keep.as_mut().is_none_or(|keep| keep());
    match change {
        Change::Truncate { length, .. } => {
            if kept() {
                content.resize(usize::try_from(*length).expect("small"), 0);
            }
        }
        Change::Write { at, bytes, .. } => {
            let mut at = usize::try_from(*at).expect("small");
            let mut left = bytes.as_slice();
            while !left.is_empty() {
                let (sector, rest) = left.split_at(left.len().min(SECTOR - at % SECTOR));
                if kept() {
                    let end = at + sector.len();
                    content.resize(content.len().max(end), 0);
                    content[at..end].copy_from_slice(sector);
                }
                at += sector.len();
                left = rest;
            }
        }
        other => panic!("no change of a content: {other:?}"),
    }
}
