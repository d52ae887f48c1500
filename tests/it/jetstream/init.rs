//! `segment-relay nats init`, and what a relay says of servers that do not fit.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    process::{Command, Output, Stdio},
};

use secrecy::ExposeSecret;

use crate::{
    command::{stderr, stdout},
    nats_server::Server,
};

pub(super) fn command(server: &Server, arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    command_at(&server.url(), arguments, settings)
}

fn command_at(url: &str, arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    let key = segment_relay::vault::new_key().expect("a key");
    let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .env("SEGMENT_RELAY__SERVER__LISTEN", "127.0.0.1:0")
        .env("SEGMENT_RELAY__OUTBOX__KIND", "jetstream")
        .env("SEGMENT_RELAY__SECRETS__KEYS", key.expose_secret())
        .env("SEGMENT_RELAY__NATS__SERVERS", url);
    for (name, value) in settings {
        command.env(format!("SEGMENT_RELAY__NATS__{name}"), value);
    }
    command.output().expect("runs")
}

const ALONE: (&str, &str) = ("REPLICAS", "1");

#[test]
fn streams_are_made_once_and_what_differs_is_said_and_changed_on_request() {
    let Some(server) = Server::start() else {
        return;
    };
    let refused = command(&server, &["serve"], &[ALONE]);
    assert!(
        stderr(&refused).contains("run `segment-relay nats init`"),
        "{}",
        stderr(&refused)
    );
    let made = command(&server, &["nats", "init"], &[ALONE, ("PARTITIONS", "2")]);
    assert!(made.status.success(), "{}", stderr(&made));
    assert_eq!(
        stdout(&made).matches("made ").count(),
        3,
        "{}",
        stdout(&made)
    );
    let again = command(&server, &["nats", "init"], &[ALONE, ("PARTITIONS", "2")]);
    assert!(again.status.success(), "{}", stderr(&again));
    assert_eq!(
        stdout(&again).matches("present ").count(),
        3,
        "{}",
        stdout(&again)
    );

    let bound = [
        ALONE,
        ("PARTITIONS", "2"),
        ("MAX_STREAM_BYTES", "100000000"),
    ];
    let differs = command(&server, &["nats", "init"], &bound);
    assert_eq!(differs.status.code(), Some(1));
    assert!(
        stdout(&differs).contains("max_bytes is -1, should be 100000000"),
        "{}",
        stdout(&differs)
    );
    let applied = command(&server, &["nats", "init", "--apply"], &bound);
    assert!(
        applied.status.success(),
        "{}{}",
        stdout(&applied),
        stderr(&applied)
    );
    assert!(command(&server, &["nats", "init"], &bound).status.success());

    // The number of streams can't be changed: each integration has its place.
    let other = command(&server, &["serve"], &[ALONE, ("PARTITIONS", "1")]);
    assert!(
        stderr(&other).contains("partitions is 2, should be 1"),
        "{}",
        stderr(&other)
    );
    let too_few = command(
        &server,
        &["serve"],
        &[("REPLICAS", "3"), ("PARTITIONS", "2")],
    );
    assert_eq!(too_few.status.code(), Some(1));
    assert!(
        stderr(&too_few).contains("replicas is 1, should be 3"),
        "{}",
        stderr(&too_few)
    );
}

#[test]
fn a_server_without_jetstream_or_without_enough_replicas_is_named_at_start() {
    let Some(plain) = Server::start_with(&[]) else {
        return;
    };
    for arguments in [&["serve"][..], &["nats", "init"]] {
        let refused = command(&plain, arguments, &[ALONE]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(
            stderr(&refused).contains("no JetStream"),
            "{}",
            stderr(&refused)
        );
    }
    let Some(alone) = Server::start() else { return };
    let refused = command(&alone, &["nats", "init"], &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("3 replicas cannot be made"),
        "{}",
        stderr(&refused)
    );
}

#[test]
fn a_cluster_without_most_of_its_servers_is_named_at_start() {
    let Some(mut servers) = Server::cluster(3) else {
        return;
    };
    for gone in &mut servers[1..] {
        gone.kill();
    }
    for arguments in [&["serve"][..], &["nats", "init"]] {
        let refused = command(&servers[0], arguments, &[]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(
            stderr(&refused).contains("most servers of"),
            "{}",
            stderr(&refused)
        );
    }
}

#[test]
fn a_server_that_does_not_answer_and_a_wrong_password_are_named() {
    let Some(mut server) = Server::start_with(&["--jetstream", "--user", "u", "--pass", "p"])
    else {
        return;
    };
    let wrong = command(
        &server,
        &["nats", "init"],
        &[ALONE, ("USER", "u"), ("PASSWORD", "planted")],
    );
    assert_eq!(wrong.status.code(), Some(1));
    assert!(
        stderr(&wrong).contains("[nats] servers"),
        "{}",
        stderr(&wrong)
    );
    assert!(!stderr(&wrong).contains("planted"), "{}", stderr(&wrong));
    let right = command(
        &server,
        &["nats", "init"],
        &[ALONE, ("USER", "u"), ("PASSWORD", "p")],
    );
    assert!(right.status.success(), "{}", stderr(&right));
    server.kill();
    let away = command(&server, &["serve"], &[ALONE]);
    assert_eq!(away.status.code(), Some(1));
    assert!(stderr(&away).contains(&server.url()), "{}", stderr(&away));
}

/// What a server of 2.9 says and answers until it is asked for more; returns its URL.
fn old_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("nats://{}", listener.local_addr().expect("bound"));
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let info = r#"{"server_id":"N","version":"2.9.10","proto":1,"host":"127.0.0.1","port":4222,"headers":true,"max_payload":1048576,"jetstream":true}"#;
            let mut answers = client.try_clone().expect("cloned");
            let _ = write!(answers, "INFO {info}\r\n");
            for line in BufReader::new(client).lines().map_while(Result::ok) {
                if line.starts_with("PING") && write!(answers, "PONG\r\n").is_err() {
                    break;
                }
            }
        }
    });
    url
}

/// An older server, such as Debian's, also where `SEGMENT_RELAY_OLD_NATS_SERVER` names one.
#[test]
fn a_server_that_is_too_old_is_named_with_its_version_and_the_one_that_is_needed() {
    let mut urls = vec![old_server()];
    let named = std::env::var_os("SEGMENT_RELAY_OLD_NATS_SERVER");
    let real = named.map(|program| Server::start_program(program.into(), &["--jetstream"]));
    urls.extend(real.as_ref().map(Server::url));
    for url in urls {
        for arguments in [&["serve"][..], &["nats", "init"], &["outbox", "move"]] {
            let refused = command_at(&url, arguments, &[ALONE]);
            assert_eq!(refused.status.code(), Some(1));
            let said = stderr(&refused);
            assert!(said.contains("[nats] servers: nats-server 2."), "{said}");
            assert!(
                said.contains("is too old; segment-relay needs 2.12 or newer"),
                "{said}"
            );
        }
    }
}
