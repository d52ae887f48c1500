//! `[postgres]`.

use super::*;
use crate::{config::OutboxKind, outbox::SynchronousCommit};

#[test]
fn faults_are_named_without_their_secrets() {
    let messages = |text: &str| lines(&load(text, &[]).expect_err("a fault")).join("\n");
    for (text, wanted) in [
        ("[outbox]\nkind = \"postgres\"\n", "needs [postgres] urls"),
        (
            "[postgres]\nurls = \"mysql://u:planted@a/b\"\n",
            "postgresql://",
        ),
        (
            "[postgres]\nurls = \"postgresql://u:planted@a/b?sslmode=planted\"\n",
            "postgresql://",
        ),
        ("[postgres]\npool_size = 1\n", "4 to 64"),
        (
            "[postgres]\nsynchronous_commit = \"off\"\n",
            "on, remote_apply",
        ),
        ("[postgres]\nkey_file = \"k\"\n", "go together"),
        ("[outbox]\nencryption = \"no\"\n", "auto, true or false"),
    ] {
        let said = messages(text);
        assert!(said.contains(wanted), "{text}: {said}");
        assert!(!said.contains("planted"), "{said}");
    }
}

#[test]
fn several_databases_with_several_hosts_are_taken() {
    let text = "[outbox]\nkind = \"postgres\"\n[postgres]\n\
        urls = \"postgresql://u:planted@a,b/x postgresql://u@127.0.0.1:5433/y?sslmode=require\"\n";
    let config = load(text, &[]).expect("fine");
    assert_eq!(config.outbox.kind, OutboxKind::Postgres);
    // Sealed by default where others run the disks.
    assert!(config.outbox.encryption);
    let postgres = &config.postgres;
    assert_eq!(postgres.urls.len(), 2);
    assert_eq!(postgres.synchronous_commit, SynchronousCommit::On);
    assert_eq!(crate::config::hosts_in_clear(postgres), ["a", "b"]);
    assert!(!format!("{config:?}").contains("planted"));
    let plain = load(&text.replace("kind", "encryption = false\nkind"), &[]);
    assert!(!plain.expect("fine").outbox.encryption);
    assert!(!load("", &[]).expect("fine").outbox.encryption);
}

#[test]
fn clear_hosts_are_those_of_the_network() {
    let clear = |url: &str| {
        let text = format!("[postgres]\nurls = \"{url}\"\n");
        let config = load(&text, &[]).expect("fine");
        crate::config::hosts_in_clear(&config.postgres)
    };
    let none: [&str; 0] = [];
    for local in [
        "postgresql://localhost/x",
        "postgresql://LOCALHOST/x",
        "postgresql://[::1]:5433/x",
        "postgresql://127.0.0.2/x?sslmode=disable",
        "postgresql://%2Frun%2Fpostgresql/x",
        "postgresql://pg-1,pg-2/x?sslmode=require",
    ] {
        assert_eq!(clear(local), none, "{local}");
    }
    assert_eq!(clear("postgresql://127.0.0.1,pg-2/x"), ["pg-2"]);
    assert_eq!(clear("postgresql://pg/x?sslmode=prefer"), ["pg"]);
    let elsewhere = "postgresql://localhost/x?hostaddr=10.0.0.1";
    assert_eq!(clear(elsewhere), ["10.0.0.1"]);
}
