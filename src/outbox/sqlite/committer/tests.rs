use super::*;
use crate::{
    outbox::{
        Quota,
        conformance::{LIMITS, new_capture},
        sqlite::{entry::key_of, open},
    },
    vault::Vault,
};

/// A committer whose thread does not run.
fn committer(directory: &std::path::Path) -> Committer {
    let options = SqliteOptions {
        directory: directory.to_owned(),
        limits: Limits {
            max_integration_events: 2,
            ..LIMITS
        },
        group_commit_max: 64,
        remember: Duration::from_secs(3_600),
        encrypt_payloads: false,
        metrics: Metrics::off(),
    };
    let vault = Arc::new(Vault::forgetful().expect("random"));
    let recovered = open::recovered(&options, &vault).expect("opens");
    let (store, _) = mpsc::channel(1);
    let parts = Parts {
        journal: recovered.journal,
        lookup: recovered.lookup,
        shared: recovered.shared,
        store,
        signals: recovered.signals,
        next_sequence: 1,
    };
    Committer::new(parts, &options)
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
    let mut committer = committer(directory.path());
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
