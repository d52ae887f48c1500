//! A database that is away, stands still, has no room, or is another one than before.

use std::{sync::Arc, time::Duration};

use super::{connection, open, options, server::Server};
use crate::{
    metrics::Metrics,
    outbox::{
        Outbox, OutboxError, PostgresConnection, PostgresOptions, PostgresOutbox, Submitted,
        conformance::{id, lease, new_capture, settle, submit, submit_one},
        init,
    },
    proto::Integration,
    status::Outcome,
    vault::Vault,
};

fn vault() -> Arc<Vault> {
    Arc::new(Vault::forgetful().expect("random"))
}

/// Short limits, so that a server that stands still is noticed soon.
fn hasty(url: String) -> PostgresConnection {
    PostgresConnection {
        statement_timeout: Duration::from_millis(500),
        connect_timeout: Duration::from_millis(500),
        ..connection(std::iter::once(url))
    }
}

async fn try_submit(outbox: &PostgresOutbox, capture: &str) -> Result<Submitted, OutboxError> {
    let receipt = Outbox::submit(outbox, vec![new_capture("acme", capture, 0)]);
    Ok(receipt.await?.wait().await?.remove(0))
}

/// Submits until it is answered otherwise than by an error.
async fn submit_until_stored(outbox: &PostgresOutbox, capture: &str) -> Submitted {
    for _ in 0..400 {
        if let Ok(submitted) = try_submit(outbox, capture).await {
            return submitted;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the outbox did not come back");
}

#[tokio::test]
async fn a_killed_server_is_said_to_be_away_and_all_goes_on_when_it_is_back() {
    let Some(mut server) = Server::start_own(&[]) else {
        return;
    };
    let metrics = Metrics::new(1, Arc::default(), None).expect("set up");
    let options = PostgresOptions {
        metrics: metrics.clone(),
        ..options()
    };
    let is_available = |value: u8| {
        let gauge = "segment_relay_outbox_database_available{database=\"0\"}";
        metrics.text().contains(&format!("\n{gauge} {value}\n"))
    };
    let outbox = open(&hasty(server.url()), options, &vault()).await;
    submit_one(&outbox, "acme", "a").await;
    assert!(is_available(1));
    let mut writable = outbox.signals().writable();
    server.kill9();
    let away = writable.wait_for(|writable| !writable);
    tokio::time::timeout(Duration::from_secs(20), away)
        .await
        .expect("noticed")
        .expect("open");
    assert!(is_available(0));
    assert!(matches!(
        try_submit(&outbox, "b").await,
        Err(OutboxError::Unavailable(_))
    ));
    assert!(matches!(
        outbox.find(&id("acme"), "a").await,
        Err(OutboxError::Unavailable(_))
    ));
    server.start_again();
    assert!(matches!(
        submit_until_stored(&outbox, "b").await,
        Submitted::Accepted(_)
    ));
    let leased = lease(&outbox, "acme", 10).await;
    assert_eq!(leased.len(), 2);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    assert!(*outbox.signals().writable().borrow());
    assert!(is_available(1));
}

#[tokio::test]
async fn calls_to_a_server_that_stands_still_end_in_their_time_and_their_outcome_is_unknown() {
    let Some(server) = Server::start_own(&[]) else {
        return;
    };
    let outbox = open(&hasty(server.url()), options(), &vault()).await;
    submit_one(&outbox, "acme", "a").await;
    server.pause();
    let begun = std::time::Instant::now();
    let answers = futures_util::future::join_all((0..20).map(|number| {
        let outbox = &outbox;
        async move { try_submit(outbox, &format!("b-{number}")).await }
    }));
    let answers = answers.await;
    // A statement, its margin, and a wait for a connection.
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    assert!(answers.iter().all(Result::is_err), "{answers:?}");
    server.resume();
    for number in 0..20 {
        let stored = submit_until_stored(&outbox, &format!("b-{number}")).await;
        assert!(
            matches!(stored, Submitted::Accepted(_) | Submitted::Duplicate(_)),
            "{stored:?}"
        );
    }
    // Each is stored once, whatever was answered.
    assert_eq!(outbox.backlog(&id("acme")).await.expect("read").events, 42);
}

#[tokio::test]
async fn captures_are_refused_without_room_and_what_waits_is_delivered_and_makes_room() {
    // The table of payloads ends there.
    let Some(server) = Server::start_with_little_room("20480") else {
        return;
    };
    let limits = crate::outbox::Limits {
        max_events: 1_000_000,
        max_bytes: 1 << 40,
        max_integration_events: 1_000_000,
        max_integration_bytes: 1 << 40,
    };
    let with_room = PostgresOptions {
        limits,
        ..options()
    };
    let one = connection(std::iter::once(server.url()));
    let outbox = open(&one, with_room, &vault()).await;
    let large = |number: usize| {
        let mut capture = new_capture("acme", &format!("c-{number}"), 0);
        if let crate::outbox::Content::Send { events, .. } = &mut capture.content {
            events.track.resize(30_000, b' ');
        }
        capture
    };
    let mut stored = 0;
    let refused = loop {
        let receipt = Outbox::submit(&outbox, (stored..stored + 50).map(large).collect());
        match receipt.await.expect("queued").wait().await {
            Ok(answers) => {
                assert!(
                    answers
                        .iter()
                        .all(|one| matches!(one, Submitted::Accepted(_)))
                );
                stored += 50;
            }
            Err(error) => break error,
        }
        assert!(stored < 10_000, "the file has no end");
    };
    assert!(matches!(refused, OutboxError::Unavailable(_)), "{refused}");
    let mut delivered = 0;
    while delivered < stored {
        let budget = crate::outbox::LeaseBudget {
            max_events: 200,
            max_bytes: 10_000_000,
        };
        let lane = crate::outbox::conformance::lane("acme");
        let leased = outbox
            .lease(&lane, budget, crate::outbox::LeaseScope::All)
            .await
            .expect("leased");
        assert!(!leased.is_empty());
        delivered += leased.len();
        settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    }
    let database = outbox.databases[0].call().await.expect("connected");
    database.batch_execute("VACUUM queue").await.expect("done");
    let receipt = Outbox::submit(&outbox, (stored..stored + 50).map(large).collect());
    let answers = receipt.await.expect("queued").wait().await.expect("stored");
    assert!(
        answers
            .iter()
            .all(|one| matches!(one, Submitted::Accepted(_)))
    );
}

#[tokio::test]
async fn a_database_that_was_made_anew_is_noticed_and_nothing_of_the_former_one_is_used() {
    let Some(server) = Server::start_own(&[]) else {
        return;
    };
    let (vault, one) = (vault(), hasty(server.url()));
    let outbox = open(&one, options(), &vault).await;
    let spec = Integration {
        integration_id: "acme".into(),
        ..Integration::default()
    };
    outbox
        .put_integration(spec.clone(), None)
        .await
        .expect("stored");
    submit(&outbox, vec![new_capture("acme", "a", 0)]).await;
    let mut changes = outbox.integration_changes().expect("shared");
    changes.borrow_and_update();
    server.execute("DROP DATABASE relay WITH (FORCE)");
    server.execute("CREATE DATABASE relay");
    init(&one, &vault).await.expect("made");
    tokio::time::timeout(Duration::from_secs(20), changes.changed())
        .await
        .expect("noticed")
        .expect("open");
    let known = async {
        loop {
            match Outbox::integrations(&outbox).await {
                Ok(known) if outbox.databases[0].is_available() => return known,
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    let known = tokio::time::timeout(Duration::from_secs(20), known).await;
    assert_eq!(known.expect("read"), []);
    // Another content under the same id: nothing remembers the former one.
    let again = new_capture("acme", "a", 1);
    assert!(matches!(
        submit(&outbox, vec![again]).await[0],
        Submitted::Accepted(_)
    ));
    let leased = lease(&outbox, "acme", 10).await;
    assert_eq!(leased.len(), 1);
    settle(&outbox, leased, |_, _| Outcome::Delivered).await;
    let found = outbox.find(&id("acme"), "a").await.expect("read");
    assert!(found.is_some_and(|record| record.is_final()));
}

#[tokio::test]
async fn without_its_synchronous_standby_nothing_is_acknowledged_and_with_it_all_goes_on() {
    let Some(server) = Server::start_own(&[]) else {
        return;
    };
    let required = PostgresConnection {
        require_synchronous_standby: true,
        ..hasty(server.url())
    };
    let vault = vault();
    init(&required, &vault).await.expect("made");
    let refused = PostgresOutbox::open(&required, options(), &vault).await;
    let refused = refused.err().expect("no standby is configured").to_string();
    assert!(refused.contains("synchronous_standby_names"), "{refused}");
    let standby = server.standby(&[]);
    server.require_standby();
    let outbox = open(&required, options(), &vault).await;
    submit_one(&outbox, "acme", "a").await;
    standby.pause();
    let answer = try_submit(&outbox, "b").await;
    assert!(
        matches!(answer, Err(OutboxError::OutcomeUnknown(_))),
        "{answer:?}"
    );
    standby.resume();
    let stored = submit_until_stored(&outbox, "b").await;
    assert!(matches!(
        stored,
        Submitted::Accepted(_) | Submitted::Duplicate(_)
    ));
    // Weakened by an administrator: refused, not accepted with one copy.
    server.execute("ALTER SYSTEM SET synchronous_standby_names = ''");
    server.execute("SELECT pg_reload_conf()");
    let answer = async {
        loop {
            if let Err(error) = try_submit(&outbox, "c").await {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let answer = tokio::time::timeout(Duration::from_secs(20), answer).await;
    let text = answer.expect("refused").to_string();
    assert!(text.contains("synchronous standby"), "{text}");
}
