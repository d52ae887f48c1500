//! Random operations, crashes and reopenings, compared with the reference.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{
    outbox::{
        DeadLetterFilter, EventSet, Selection, SettledCapture, conformance::user_of, model::Model,
    },
    status::CaptureRecord,
};

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    /// Submits captures: (integration, id, content, size of a payload, skip).
    Submit(Vec<(u8, u8, u8, usize, bool)>),
    /// Leases from a lane and settles with these outcomes, one for each event in turn.
    Work {
        integration: u8,
        shard: u8,
        max_events: usize,
        max_bytes: usize,
        scope: u8,
        outcomes: Vec<u8>,
    },
    /// Replays the dead letters of an integration.
    Replay(u8),
    /// Puts what the journal holds into the database.
    Flush,
    /// A segment of the journal is full.
    Turn,
    /// Closes and opens again.
    Reopen,
    /// The files as they are at this moment, without a close, are opened.
    Crash,
}

fn any_step() -> impl Strategy<Value = Step> {
    let capture = (
        0..2_u8,
        0..12_u8,
        0..2_u8,
        2..400_usize,
        prop::bool::weighted(0.3),
    );
    prop_oneof![
        6 => prop::collection::vec(capture, 1..5).prop_map(Step::Submit),
        6 => (0..2_u8, 0..2_u8, 1..7_usize, 1..2_000_usize, 0..6_u8,
              prop::collection::vec(0..4_u8, 1..5))
            .prop_map(|(integration, shard, max_events, max_bytes, scope, outcomes)| Step::Work {
                integration, shard, max_events, max_bytes, scope, outcomes,
            }),
        1 => (0..2_u8).prop_map(Step::Replay),
        1 => Just(Step::Flush),
        3 => Just(Step::Turn),
        1 => Just(Step::Reopen),
        1 => Just(Step::Crash),
    ]
}

fn name(integration: u8) -> &'static str {
    ["acme", "other"][usize::from(integration)]
}

fn lane_of(integration: u8, shard: u8) -> LaneKey {
    LaneKey {
        integration_id: id(name(integration)),
        region: Region::NonEu,
        shard: shard.into(),
    }
}

fn capture_of(integration: u8, capture: u8, content: u8, size: usize, skip: bool) -> NewCapture {
    let payload = || format!("\"{}\"", "x".repeat(size)).into_bytes();
    let events = EventPair {
        identify: payload(),
        track: payload(),
    };
    NewCapture {
        content: if skip {
            Content::Skip {
                reason: DeliveryReason::NoEmail,
            }
        } else {
            Content::Send {
                shard: u16::from(capture % 2),
                events,
            }
        },
        ..new_capture(name(integration), &capture.to_string(), content)
    }
}

fn outcome_of(choice: u8) -> Outcome {
    match choice {
        0 | 1 => Outcome::Delivered,
        2 => Outcome::Retry {
            reason: DeliveryReason::ServerError,
            next_attempt: NOW,
        },
        _ => Outcome::DeadLetter {
            reason: DeliveryReason::PayloadRejected,
        },
    }
}

/// The outbox under test beside the reference.
struct Pair {
    outbox: SqliteOutbox,
    model: Model,
    directory: tempfile::TempDir,
}

fn tight(directory: &Path) -> SqliteOptions {
    SqliteOptions {
        limits: Limits {
            max_events: 24,
            max_bytes: 6_000,
            max_integration_events: 16,
            max_integration_bytes: 4_000,
        },
        group_commit_max: 3,
        ..options(directory)
    }
}

impl Pair {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let options = tight(directory.path());
        let outbox = SqliteOutbox::open(&options, &vault()).expect("opens");
        Self {
            outbox,
            model: Model::new(options.limits),
            directory,
        }
    }

    async fn apply(&mut self, step: Step) {
        match step {
            Step::Submit(captures) => {
                let new = || {
                    captures.iter().map(|(i, c, content, size, skip)| {
                        capture_of(*i, *c, *content, *size, *skip)
                    })
                };
                let expected: Vec<_> = new().map(|one| self.model.submit(one)).collect();
                assert_eq!(submit(&self.outbox, new().collect()).await, expected);
            }
            Step::Work {
                integration,
                shard,
                max_events,
                max_bytes,
                scope,
                outcomes,
            } => {
                let budget = LeaseBudget {
                    max_events,
                    max_bytes,
                };
                let lane = lane_of(integration, shard);
                let user = |capture: u8| user_of(&(capture + shard).to_string());
                let scope = match scope {
                    0 => LeaseScope::Only(user(4)),
                    1 => LeaseScope::Except(vec![user(2), user(4), user(6)]),
                    2 => LeaseScope::Except(vec![user(0)]),
                    _ => LeaseScope::All,
                };
                self.work(&lane, budget, scope, &outcomes).await;
            }
            Step::Replay(integration) => {
                let filter = DeadLetterFilter {
                    integrations: Some(vec![id(name(integration))]),
                    ..DeadLetterFilter::default()
                };
                // The reference has no bounds here: only where all fit are both alike.
                if !self.model.waiting_lanes().is_empty() {
                    return;
                }
                let mut after = self.model.clone();
                let expected = after.replay(&id(name(integration)), NOW);
                let (events, bytes) = after.backlog(&id(name(integration)));
                if events > 14 || bytes > 3_000 {
                    return;
                }
                self.model = after;
                let replayed = self.outbox.replay(Selection::Filter(filter), NOW).await;
                let replayed = replayed.expect("replayed").expect("room");
                assert_eq!(replayed.events(), expected);
            }
            Step::Flush => self.outbox.flush().await.expect("flushed"),
            Step::Turn => {
                let turn = |reply| Command::Flush {
                    whole: false,
                    reply,
                };
                self.outbox.commit(turn).await.expect("turned");
            }
            Step::Reopen => {
                self.outbox.close().await;
                let options = tight(self.directory.path());
                self.outbox = SqliteOutbox::open(&options, &vault()).expect("opens");
            }
            Step::Crash => self.crash().await,
        }
    }

    /// Copies the files of the open database, as a crash would leave them.
    async fn crash(&mut self) {
        let copy = tempfile::tempdir().expect("a directory");
        const FILES: [&str; 5] = [
            "relay.db",
            "relay.db-wal",
            "relay.journal-0",
            "relay.journal-1",
            "relay.journal-2",
        ];
        let all = || FILES.map(|name| std::fs::read(self.directory.path().join(name)).ok());
        // A crash is one moment: what is being put into the database may not move
        // between two files.
        let mut files = all();
        loop {
            let again = all();
            if again == files {
                break;
            }
            files = again;
        }
        for (name, content) in FILES.into_iter().zip(files) {
            let Some(mut content) = content else { continue };
            // A write that was cut short leaves a damaged tail.
            if name != "relay.db" {
                content.extend_from_slice(&[0xa5; 5_000]);
            }
            std::fs::write(copy.path().join(name), content).expect("copied");
        }
        self.outbox.close().await;
        self.directory = copy;
        let options = tight(self.directory.path());
        self.outbox = SqliteOutbox::open(&options, &vault()).expect("opens after a crash");
    }

    async fn work(
        &mut self,
        lane: &LaneKey,
        budget: LeaseBudget,
        scope: LeaseScope,
        outcomes: &[u8],
    ) {
        let expected = self.model.lease(lane, budget, &scope);
        let leased = self.outbox.lease(lane, budget, scope).await;
        let leased = leased.expect("leased");
        let shape = |leased: &[LeasedCapture]| -> Vec<_> {
            leased
                .iter()
                .map(|c| {
                    (
                        c.record.clone(),
                        c.identify.clone(),
                        c.track.clone(),
                        c.damaged,
                    )
                })
                .collect()
        };
        assert_eq!(shape(&leased), shape(&expected));
        let mut choices = outcomes.iter().cycle();
        let mut captures = Vec::new();
        for (real, reference) in leased.into_iter().zip(expected) {
            let mut record = CaptureRecord::clone(&real.record);
            let carried = |event: &EventType| real.payload(*event).is_some();
            let changed: EventSet = EventType::ALL.into_iter().filter(carried).collect();
            for event in changed.iter() {
                let outcome = outcome_of(*choices.next().expect("a cycle"));
                record.event_mut(event).advance(outcome, NOW);
            }
            let record = Arc::new(record);
            self.model.settle(&SettledCapture {
                sequence: reference.sequence,
                record: Arc::clone(&record),
                changed,
            });
            captures.push(SettledCapture {
                sequence: real.sequence,
                record,
                changed,
            });
        }
        let settlement = Settlement {
            lane: lane.clone(),
            captures,
        };
        self.outbox
            .settle(Arc::new(settlement))
            .await
            .expect("settled");
    }

    async fn compare(&self) {
        for integration in 0..2 {
            let integration_id = id(name(integration));
            let backlog = self.outbox.backlog(&integration_id).await.expect("read");
            assert_eq!(
                (backlog.events, backlog.bytes),
                self.model.backlog(&integration_id)
            );
            for capture in 0..12_u8 {
                let found = self
                    .outbox
                    .find(&integration_id, &capture.to_string())
                    .await;
                let expected = self
                    .model
                    .find(&integration_id, &capture.to_string())
                    .cloned();
                assert_eq!(found.expect("read"), expected);
            }
        }
        let lanes = self.outbox.waiting_lanes().await.expect("read");
        assert_eq!(
            lanes.into_iter().collect::<BTreeSet<_>>(),
            self.model.waiting_lanes()
        );
        let listed = self
            .outbox
            .dead_letters(DeadLetterFilter::default(), 0, 1_000)
            .await;
        let mut dead: Vec<_> = listed
            .expect("read")
            .into_iter()
            .map(|l| {
                (
                    l.record.integration_id.as_str().to_owned(),
                    l.record.capture_id,
                )
            })
            .collect();
        dead.sort();
        assert_eq!(dead, self.model.dead_letters());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn it_behaves_like_the_reference_over_crashes_and_restarts(
        steps in prop::collection::vec(any_step(), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let mut pair = Pair::new();
            for step in steps {
                pair.apply(step).await;
                pair.compare().await;
            }
            pair.outbox.close().await;
        });
    }
}
