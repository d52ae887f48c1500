//! `segment-relay dead-letters` as a person runs it.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use crate::command::{Processes, stderr, stdout};

const CAPTURE: [&str; 11] = [
    "capture",
    "--integration",
    "acme",
    "--email",
    "test@aol.com",
    "--campaign-id",
    "c",
    "--wait",
    "delivered",
    "--session-id",
    "s-1",
];

/// Ends the sandbox's misbehaviour.
fn behave(processes: &Processes) {
    let mut stream = TcpStream::connect(&processes.sandbox_address).expect("connects");
    let request = "DELETE /control HTTP/1.1\r\nHost: sandbox\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    assert!(answer.starts_with("HTTP/1.1 20"), "{answer}");
}

#[test]
fn dead_letters_are_listed_replayed_and_discarded_at_a_terminal() {
    let hash = "f320794388bf29dabc846c54fe7ff28f78fc3bc3c13748783335a9bf33440d55";
    let processes = Processes::with(&["--status", "402", "--reject-containing", hash]);
    for session in ["s-1", "s-2"] {
        let mut capture = CAPTURE;
        (capture[8], capture[10]) = ("accepted", session);
        let accepted = processes.run(&capture);
        assert!(accepted.status.success(), "{}", stderr(&accepted));
    }
    // What is taken of another person shows that it is the events' fault.
    let mut listed = String::new();
    for session in 3..30 {
        let (mut control, session) = (CAPTURE, format!("s-{session}"));
        (control[4], control[10]) = ("other@example.com", &session);
        assert!(processes.run(&control).status.success());
        let list = ["dead-letters", "list", "--reason", "request-rejected"];
        listed = stdout(&processes.run(&list));
        if listed.lines().count() == 5 {
            break;
        }
    }
    behave(&processes);
    assert_eq!(listed.lines().count(), 5, "{listed}");
    assert!(
        listed.contains("REQUEST_REJECTED: HTTP 402 Payment Required"),
        "{listed}"
    );
    let one = stdout(&processes.run(&["dead-letters", "list", "--limit", "1"]));
    assert!(one.contains("There are more"), "{one}");
    let none = stdout(&processes.run(&["dead-letters", "list", "--reason", "expired"]));
    assert_eq!(none.lines().count(), 1, "{none}");

    let dry = stdout(&processes.run(&["dead-letters", "replay", "1", "2"]));
    assert!(
        dry.contains("2 events would be queued") && dry.contains("--yes"),
        "{dry}"
    );
    let done = stdout(&processes.run(&["dead-letters", "replay", "1", "2", "--yes"]));
    assert!(done.contains("2 events are queued again."), "{done}");
    let again = processes.run(&CAPTURE);
    assert!(again.status.success(), "{}", stdout(&again));

    let dry = stdout(&processes.run(&["dead-letters", "discard", "--integration", "acme"]));
    assert!(
        dry.contains("2 events would be removed") && dry.contains("--yes"),
        "{dry}"
    );
    let done = processes.run(&["dead-letters", "discard", "--all", "--yes", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&done.stdout).expect("JSON");
    assert_eq!(json["eventCount"], "2");
    let left = stdout(&processes.run(&["dead-letters", "list"]));
    assert_eq!(left.lines().count(), 1, "{left}");
}

#[test]
fn a_change_has_to_name_what_it_means() {
    let processes = Processes::with(&[]);
    let nothing = processes.run(&["dead-letters", "replay"]);
    assert_eq!(nothing.status.code(), Some(2));
    assert!(stderr(&nothing).contains("--all"), "{}", stderr(&nothing));
    let both = processes.run(&["dead-letters", "discard", "1", "--integration", "acme"]);
    assert_eq!(both.status.code(), Some(2));
    let empty = [
        "dead-letters",
        "discard",
        "--integration",
        "",
        "--reason",
        "expired",
        "--yes",
    ];
    assert_eq!(processes.run(&empty).status.code(), Some(2));
    let word = processes.run(&["dead-letters", "list", "--reason", "tired"]);
    assert_eq!(word.status.code(), Some(2));
}
