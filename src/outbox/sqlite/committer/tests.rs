use std::path::Path;

use super::*;
use crate::{
    outbox::{
        EventSet, LeaseBudget, LeaseScope, LeasedCapture, Quota,
        conformance::{LIMITS, lane, new_capture, settlement},
        sqlite::{entry::key_of, journal::OnDamage, open, reader, schema, writer::Writer},
    },
    status::Outcome,
    vault::Vault,
};

/// A committer and a writer whose threads do not run.
struct Threadless {
    committer: Committer,
    writer: Writer,
    to_writer: mpsc::Receiver<WriteCommand>,
    reading: rusqlite::Connection,
}

impl Threadless {
    fn open(directory: &Path, max_integration_events: u64) -> Self {
        let options = SqliteOptions {
            directory: directory.to_owned(),
            limits: Limits {
                max_events: 10_000,
                max_integration_events,
                ..LIMITS
            },
            group_commit_max: 64,
            remember: Duration::from_secs(3_600),
            encrypt_payloads: false,
            metrics: Metrics::off(),
        };
        let vault = Arc::new(Vault::forgetful().expect("random"));
        let recovered = open::recovered(&options, &vault, OnDamage::Refuse).expect("opens");
        let (store, to_writer) = mpsc::channel(1);
        let parts = Parts {
            journal: recovered.journal,
            lookup: recovered.lookup,
            shared: recovered.shared,
            store,
            signals: recovered.signals,
            next_sequence: 1,
        };
        let database = directory.join("relay.db");
        Self {
            committer: Committer::new(parts, &options),
            writer: recovered.writer,
            to_writer,
            reading: schema::open_for_reading(&database, 1_024).expect("opens"),
        }
    }

    /// The writer does what it was asked.
    fn write(&mut self) {
        let command = self.to_writer.try_recv().expect("asked");
        self.writer.commit(std::iter::once(command));
    }
}

type Answer = oneshot::Receiver<Result<Vec<Submitted>, OutboxError>>;

fn submit(name: &str, capture_ids: &[&str]) -> (Command, Answer) {
    let (reply, answer) = oneshot::channel();
    let captures = capture_ids.iter().map(|capture_id| {
        let capture = new_capture(name, capture_id, 0);
        Incoming {
            key: key_of(&capture.integration_id, capture_id),
            capture,
            subject: None,
        }
    });
    let command = Command::Submit {
        captures: captures.collect(),
        reservation: None,
        reply,
    };
    (command, answer)
}

#[test]
fn a_refusal_does_not_wait_for_the_disk_and_what_is_stored_or_known_does() {
    const FULL: Submitted = Submitted::Full(Quota::IntegrationEvents);
    let directory = tempfile::tempdir().expect("a directory");
    let mut committer = Threadless::open(directory.path(), 2).committer;
    let (first, mut accepted) = submit("acme", &["1"]);
    committer.commit(vec![first]);
    assert!(matches!(
        accepted.try_recv().expect("answered").expect("durable")[..],
        [Submitted::Accepted(_)]
    ));
    assert!(!committer.shared.is_scarce());

    committer.journal.fail();
    let (commands, mut answers): (Vec<_>, Vec<_>) = [
        submit("acme", &["2", "3"]),
        submit("other", &["1"]),
        submit("acme", &["1"]),
        submit("acme", &["4", "1"]),
    ]
    .into_iter()
    .unzip();
    committer.commit(commands);
    assert!(committer.shared.is_scarce());
    let mut answers = answers
        .iter_mut()
        .map(|answer| answer.try_recv().expect("answered"));
    assert_eq!(answers.next(), Some(Ok(vec![FULL, FULL])));
    for answer in answers {
        assert!(matches!(answer, Err(OutboxError::Unavailable(_))));
    }
}

/// All of a lane.
const BUDGET: LeaseBudget = LeaseBudget {
    max_events: 10_000,
    max_bytes: 1_000_000,
};

impl Threadless {
    fn leased(&self, budget: LeaseBudget) -> Vec<LeasedCapture> {
        let shared = &self.committer.shared;
        reader::lease(
            &self.reading,
            shared,
            &lane("acme"),
            budget,
            &LeaseScope::All,
        )
        .expect("read")
    }

    /// Leases give these, in this order, from before captures begin to leave the overlay
    /// until no more do.
    fn leases_while_captures_leave(&mut self, expected: &[&str]) {
        let mut pieces = 0;
        loop {
            let leased = self.leased(BUDGET);
            let leased = leased.iter().map(|one| one.record.capture_id.as_str());
            assert!(leased.eq(expected.iter().copied()), "after {pieces} pieces");
            self.committer.keep_house();
            if !self.committer.flushing.is_retiring() {
                break;
            }
            pieces += 1;
        }
        assert_eq!(pieces, 2);
    }
}

#[test]
fn a_lane_keeps_its_order_while_captures_leave_the_overlay() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut outbox = Threadless::open(directory.path(), 10_000);
    let ids: Vec<_> = (0..2_501).map(|number| number.to_string()).collect();
    let ids: Vec<_> = ids.iter().map(String::as_str).collect();
    let (last, flushed) = ids.split_last().expect("some");
    outbox.committer.commit(vec![submit("acme", flushed).0]);
    outbox.committer.flush_for(true, oneshot::channel().0);
    outbox.write();
    outbox.committer.commit(vec![submit("acme", &[*last]).0]);
    outbox.leases_while_captures_leave(&ids);
}

#[test]
fn what_was_settled_during_a_flush_hides_nothing_that_waits() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut outbox = Threadless::open(directory.path(), 10_000);
    let ids: Vec<_> = (0..2_500).map(|number| number.to_string()).collect();
    let ids: Vec<_> = ids.iter().map(String::as_str).collect();
    outbox.committer.commit(vec![submit("acme", &ids).0]);
    let first = LeaseBudget {
        max_events: 2 * 1_200,
        ..BUDGET
    };
    let settlement = settlement(outbox.leased(first), |_, _| Outcome::Delivered);
    outbox.committer.flush_for(true, oneshot::channel().0);
    outbox.committer.commit(vec![Command::Settle {
        settlement,
        reply: oneshot::channel().0,
    }]);
    outbox.write();
    outbox.leases_while_captures_leave(&ids[1_200..]);
}

#[test]
fn a_group_finds_the_newest_state_of_what_it_has_accepted_and_of_nothing_else() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut committer = Threadless::open(directory.path(), 100).committer;
    let mut accept = |number: i64| {
        let capture = new_capture("acme", &number.to_string(), 0);
        let key = key_of(&capture.integration_id, &capture.capture_id);
        let incoming = Incoming {
            key,
            capture,
            subject: None,
        };
        let accepted = committer.submit(incoming);
        assert!(matches!(accepted, Ok(Submitted::Accepted(_))));
    };
    for number in 1..=40 {
        accept(number);
    }
    let staged = &mut committer.staged;
    let found =
        |staged: &Staged, sequence| Some(staged.get(sequence)?.entry.record.capture_id.clone());
    for sequence in 1..=40 {
        assert_eq!(found(staged, sequence), Some(sequence.to_string()));
    }
    assert!(found(staged, 0).is_none() && found(staged, 41).is_none());

    let settled = Arc::clone(&staged.get(7).expect("found").entry);
    staged.put(staged::Next {
        entry: settled,
        payloads: None,
        before: [None, None],
        announce: EventSet::BOTH,
        is_new: false,
    });
    assert!(!staged.get(7).expect("found").is_new);
    assert!(staged.get(8).expect("found").is_new);
    staged.clear();
    assert!(found(staged, 7).is_none() && found(staged, 8).is_none());
}
