//! Power losses at many moments of a workload: strace records every write and sync of a process,
//! and the disk is put together as it could be after a power loss at each of them. Unsynced writes
//! are there, or lost, or torn. The outbox has to open, with all that was acknowledged.
//! `POWER_LOSS_POINTS=10000 cargo test power_loss` tries so many moments; `POWER_LOSS_SEED` replays.

mod disk;
mod trace;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Write,
    process::Command,
};

use fastrand::Rng;

use super::{formats::known_vault, *};
use crate::outbox::DeadLetter;
use disk::Disk;
use trace::Change;

/// Moments of an ordinary run.
const POINTS: usize = 300;
/// Steps of the workload between two starts, and starts.
const STEPS: usize = 60;
const STARTS: usize = 4;
const MARKS: &str = "marks";
const DIRECTORY: &str = "POWER_LOSS_DIRECTORY";

fn number(name: &str) -> Option<u64> {
    std::env::var_os(name)?.to_str()?.parse().ok()
}

fn store(directory: &Path) -> SqliteOutbox {
    let options = SqliteOptions {
        limits: Limits {
            max_events: 1_000_000,
            max_bytes: 1_000_000_000,
            max_integration_events: 1_000_000,
            max_integration_bytes: 1_000_000_000,
        },
        ..options(directory)
    };
    SqliteOutbox::open(&options, &known_vault()).expect("opens")
}

/// What may be true of an event, as far as the workload knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Waits,
    Delivered,
    Dead,
    Discarded,
}

type Event = (String, EventType);

/// The workload, which tells in marks what it is about to do and what was acknowledged.
struct Workload {
    outbox: SqliteOutbox,
    marks: File,
    rng: Rng,
    next: usize,
}

impl Workload {
    fn mark(&mut self, verb: &str, fate: Fate, events: &[Event]) {
        let events = events
            .iter()
            .map(|(id, event)| format!("{id}/{}", event.name()));
        let events = events.collect::<Vec<_>>().join(" ");
        let line = format!("{verb} {fate:?} {events}\n");
        self.marks.write_all(line.as_bytes()).expect("written");
    }

    /// Marks what is about to become of events, does it, and marks that it has.
    async fn to(&mut self, fate: Fate, events: Vec<Event>, work: impl AsyncFnOnce(&SqliteOutbox)) {
        self.mark("to", fate, &events);
        work(&self.outbox).await;
        self.mark("done", fate, &events);
    }

    async fn step(&mut self) {
        match self.rng.u8(0..12) {
            0..=5 => self.submit().await,
            6..=8 => self.settle().await,
            9 => self.dead_letters().await,
            10 => self.outbox.flush().await.expect("flushed"),
            _ => drop(self.outbox.maintain().await.expect("maintained")),
        }
    }

    /// Some captures, of two callers at once.
    async fn submit(&mut self) {
        let count = self.rng.usize(2..6);
        let mut captures: Vec<NewCapture> = (0..count).map(|_| self.capture()).collect();
        let events = captures.iter().flat_map(|one| {
            let id = one.capture_id.clone();
            EventType::ALL.map(|event| (id.clone(), event))
        });
        let events = events.collect();
        self.to(Fate::Waits, events, async |outbox| {
            let others = captures.split_off(count / 2);
            let (one, two) = tokio::join!(
                super::submit(outbox, captures),
                super::submit(outbox, others)
            );
            let is_accepted = |one: &Submitted| matches!(one, Submitted::Accepted(_));
            assert!(one.iter().chain(&two).all(is_accepted));
        })
        .await;
    }

    fn capture(&mut self) -> NewCapture {
        self.next += 1;
        let filler = "x".repeat(self.rng.usize(0..3_000));
        let mut new = new_capture("acme", &format!("{}-{}", self.next % 7, self.next), 0);
        if let Content::Send { events, .. } = &mut new.content {
            events.track = format!("{{\"track\":\"{filler}\"}}").into_bytes();
        }
        new
    }

    async fn settle(&mut self) {
        let leased = lease(&self.outbox, "acme", 6).await;
        if leased.is_empty() {
            return;
        }
        let fate = [Fate::Delivered, Fate::Dead][usize::from(self.rng.u8(0..3) == 0)];
        let events = leased.iter().flat_map(|one| {
            let carried = EventType::ALL.into_iter();
            let carried = carried.filter(|event| one.payload(*event).is_some());
            carried.map(|event| (one.record.capture_id.clone(), event))
        });
        let events = events.collect();
        let outcome = match fate {
            Fate::Dead => Outcome::DeadLetter {
                reason: DeliveryReason::PayloadRejected,
            },
            _ => Outcome::Delivered,
        };
        self.to(fate, events, async |outbox| {
            super::settle(outbox, leased, |_, _| outcome).await;
        })
        .await;
    }

    /// Discards some, or sends them again.
    async fn dead_letters(&mut self) {
        let letters = all_dead_letters(&self.outbox).await;
        let some: Vec<&DeadLetter> = letters.iter().filter(|_| self.rng.bool()).collect();
        let events = some.iter();
        let events = events.map(|one| (one.record.capture_id.clone(), one.event));
        let events: Vec<Event> = events.collect();
        let selection = Selection::Ids {
            ids: some.iter().map(|one| one.id).collect(),
            integrations: None,
        };
        if self.rng.bool() {
            self.to(Fate::Discarded, events, async |outbox| {
                outbox.discard(selection).await.expect("discarded");
            })
            .await;
        } else {
            self.to(Fate::Waits, events, async |outbox| {
                let replayed = outbox.replay(selection, NOW).await;
                replayed.expect("replayed").expect("room");
            })
            .await;
        }
    }
}

async fn all_dead_letters(outbox: &SqliteOutbox) -> Vec<DeadLetter> {
    let all = outbox.dead_letters(DeadLetterFilter::default(), 0, 10_000);
    all.await.expect("listed")
}

/// Run by the test below, in a process of its own.
#[tokio::test]
async fn workload_of_a_power_loss() {
    let Some(directory) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let directory = Path::new(&directory);
    let mut marks = File::options();
    let marks = marks.create(true).append(true);
    let marks = marks.open(directory.join(MARKS)).expect("made");
    let mut workload = Workload {
        outbox: store(directory),
        marks,
        rng: Rng::with_seed(number("POWER_LOSS_SEED").expect("a seed")),
        next: 0,
    };
    for _ in 0..STARTS {
        for _ in 0..STEPS {
            workload.step().await;
        }
        workload.outbox.close().await;
        workload.outbox = store(directory);
    }
    workload.outbox.close().await;
}

/// What the marks so far allow.
#[derive(Default)]
struct Known(BTreeMap<Event, (BTreeSet<Fate>, bool)>);

impl Known {
    fn hear(&mut self, mark: &str) {
        let mut words = mark.split(' ');
        let (verb, fate) = (words.next(), words.next());
        let fate = match fate {
            Some("Waits") => Fate::Waits,
            Some("Delivered") => Fate::Delivered,
            Some("Dead") => Fate::Dead,
            Some("Discarded") => Fate::Discarded,
            other => panic!("a strange mark: {other:?}"),
        };
        for event in words.filter(|word| !word.is_empty()) {
            let (id, event) = event.split_once('/').expect("an event");
            let event = EventType::ALL
                .into_iter()
                .find(|known| known.name() == event);
            let key = (id.to_owned(), event.expect("known"));
            let (fates, acknowledged) = self.0.entry(key).or_default();
            if verb == Some("done") {
                fates.clear();
                *acknowledged = true;
            }
            fates.insert(fate);
        }
    }

    /// Checks what a power loss has left.
    async fn check(&self, outbox: &SqliteOutbox) {
        let budget = LeaseBudget {
            max_events: 1_000_000,
            max_bytes: 1_000_000_000,
        };
        let lane = conformance::lane("acme");
        let leased = outbox
            .lease(&lane, budget, LeaseScope::All)
            .await
            .expect("leased");
        let mut waiting = BTreeSet::new();
        for one in &leased {
            assert!(!one.damaged, "a damaged payload");
            let carried = EventType::ALL.into_iter();
            let carried = carried.filter(|event| one.payload(*event).is_some());
            waiting.extend(carried.map(|event| (one.record.capture_id.clone(), event)));
        }
        let kept: BTreeSet<Event> = all_dead_letters(outbox)
            .await
            .into_iter()
            .map(|one| (one.record.capture_id, one.event))
            .collect();
        for (event, (fates, acknowledged)) in &self.0 {
            let found = outbox.find(&id("acme"), &event.0).await.expect("read");
            let Some(record) = found else {
                assert!(!acknowledged, "{event:?} was acknowledged and is lost");
                continue;
            };
            let fate = match record.event(event.1).state {
                _ if waiting.contains(event) => Fate::Waits,
                State::Delivered { .. } => Fate::Delivered,
                State::DeadLettered { .. } if kept.contains(event) => Fate::Dead,
                State::DeadLettered { .. } => Fate::Discarded,
                other => panic!("{event:?} is {other:?} and does not wait"),
            };
            assert!(
                fates.contains(&fate),
                "{event:?} is {fate:?}, not of {fates:?}"
            );
        }
        let unknown = waiting.iter().find(|event| !self.0.contains_key(event));
        assert_eq!(unknown, None, "it was never submitted");
    }
}

/// Runs the workload under strace; `None` where that is not there.
fn traced(seed: u64, directory: &Path) -> Option<Vec<Change>> {
    if std::env::var_os("SEGMENT_RELAY_STRACE").is_some_and(|it| it == "off") {
        return None;
    }
    let trace = directory.with_extension("trace");
    let ran = Command::new("strace")
        .args(["-f", "-y", "-xx", "-s", "100000000", "-e"])
        .arg(format!("trace={}", trace::CALLS))
        .arg("-o")
        .arg(&trace)
        .arg(std::env::current_exe().expect("this program"))
        .args([
            "--exact",
            "outbox::sqlite::tests::power_loss::workload_of_a_power_loss",
        ])
        .env(DIRECTORY, directory)
        .env("POWER_LOSS_SEED", seed.to_string())
        .output();
    let output = match ran {
        Ok(output) => output,
        Err(error) if std::env::var_os("SEGMENT_RELAY_NEEDS_STRACE").is_none() => {
            println!("skipped: strace cannot be run ({error}); install it");
            return None;
        }
        Err(error) => panic!("strace: {error}"),
    };
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "the workload failed: {said}");
    let read = std::fs::read_to_string(&trace).expect("a trace");
    Some(trace::changes(&read, directory, MARKS))
}

#[tokio::test]
async fn no_power_loss_costs_what_was_acknowledged() {
    let seed = number("POWER_LOSS_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("POWER_LOSS_SEED={seed}");
    let temporary = tempfile::tempdir().expect("a directory");
    let directory = temporary.path().join("store");
    std::fs::create_dir(&directory).expect("made");
    let Some(changes) = traced(seed, &directory) else {
        return;
    };
    let syncs = changes
        .iter()
        .filter(|change| matches!(change, Change::Sync { .. }));
    assert!(syncs.count() > STARTS * STEPS / 2, "the trace lacks syncs");
    let mut rng = Rng::with_seed(seed);
    let points = number("POWER_LOSS_POINTS").map_or(POINTS, |points| points as usize);
    let mut points: Vec<usize> = (0..points).map(|_| rng.usize(0..=changes.len())).collect();
    points.sort_unstable();
    let (mut disk, mut known, mut heard) = (Disk::default(), Known::default(), 0);
    for point in points {
        disk.advance(&changes, point);
        for change in &changes[heard..point] {
            if let Change::Mark(mark) = change {
                known.hear(mark);
            }
        }
        heard = point;
        let left = tempfile::tempdir().expect("a directory");
        disk.lose_power(&mut rng, left.path());
        println!("power is lost before change {point} of {}", changes.len());
        let outbox = store(left.path());
        known.check(&outbox).await;
        outbox.close().await;
    }
}
