//! `segment-relay outbox` and `serve` with `[postgres]`, as a person runs them.

use std::{
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use crate::{
    command::{first_line, stderr, stdout},
    postgres_server,
};

fn command(directory: &Path, urls: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
    command
        .args(arguments)
        .env("SEGMENT_RELAY__SERVER__LISTEN", "127.0.0.1:0")
        .env("SEGMENT_RELAY__POSTGRES__URLS", urls)
        .env("SEGMENT_RELAY__OUTBOX__PATH", directory.join("outbox"))
        .env("SEGMENT_RELAY__SECRETS__KEY_FILE", directory.join("key"))
        .stdin(Stdio::null());
    command
}

fn run(directory: &Path, urls: &str, arguments: &[&str]) -> Output {
    command(directory, urls, arguments).output().expect("runs")
}

/// Ends a process that a test leaves behind.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn missing_urls_are_refused_with_the_remedy() {
    let directory = tempfile::tempdir().expect("a directory");
    for arguments in [
        &["outbox", "init"][..],
        &["outbox", "move-integration", "acme", "--to", "0"],
        &["outbox", "move"],
    ] {
        let output = run(directory.path(), "", arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let said = stderr(&output);
        assert!(said.contains("SEGMENT_RELAY__POSTGRES__URLS"), "{said}");
    }
    let file = directory.path().join("relay.toml");
    std::fs::write(&file, "[outbox]\nkind = \"postgres\"\n").expect("written");
    let file = file.to_str().expect("UTF-8");
    let output = run(directory.path(), "", &["check", "--config", file]);
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    assert!(said.contains("needs [postgres] urls"), "{said}");
}

#[test]
fn wrong_arguments_of_move_integration_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let urls = "postgresql://u:planted@127.0.0.1:1/relay";
    for (id, to, wanted) in [
        ("acme", "1", "urls names 1 database"),
        ("A b", "0", "not an integration_id"),
    ] {
        let arguments = ["outbox", "move-integration", id, "--to", to];
        let output = run(directory.path(), urls, &arguments);
        assert_eq!(output.status.code(), Some(2));
        let said = stderr(&output);
        assert!(said.contains(wanted), "{said}");
        assert!(!said.contains("planted"), "{said}");
    }
}

#[test]
fn unreachable_database_is_named_by_its_place_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let urls = "postgresql://u:planted@127.0.0.1:1/relay";
    let output = run(directory.path(), urls, &["outbox", "init"]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("database 0: "), "{said}");
    assert!(!said.contains("planted"), "{said}");
}

#[test]
fn init_makes_the_schemas_that_serve_needs() {
    let databases = postgres_server::database().zip(postgres_server::database());
    let Some((first, second)) = databases else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let urls = format!("{} {}", first.url(), second.url());
    let serve = || {
        let mut serve = command(directory.path(), &urls, &["serve"]);
        serve.env("SEGMENT_RELAY__OUTBOX__KIND", "postgres");
        serve
    };
    let refused = serve().output().expect("runs");
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr(&refused);
    assert!(said.contains("segment-relay outbox init"), "{said}");

    let init = |urls: &str| run(directory.path(), urls, &["outbox", "init"]);
    let made = init(&first.url());
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    assert_eq!(stdout(&made), "database 0: made\n");
    let added = init(&urls);
    assert_eq!(stdout(&added), "database 0: up to date\ndatabase 1: made\n");

    let child = serve().stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = Ended(child.expect("starts"));
    let line = first_line(&mut child.0);
    assert!(line.contains("serves gRPC on"), "{line}");
    // The schema holds sealed values already, so a new key would not do.
    std::fs::remove_file(directory.path().join("key")).expect("removed");
    let keyless = init(&urls);
    assert_eq!(keyless.status.code(), Some(1), "{}", stdout(&keyless));
}

#[test]
fn an_ordinary_role_that_owns_its_database_is_enough() {
    let Some(server) = postgres_server::Server::start_own(&[]) else {
        return;
    };
    server.execute("CREATE ROLE plain LOGIN");
    server.execute("ALTER DATABASE relay OWNER TO plain");
    let directory = tempfile::tempdir().expect("a directory");
    let plain = |arguments: &[&str]| {
        let mut command = command(directory.path(), &server.url(), arguments);
        command
            .env("SEGMENT_RELAY__POSTGRES__USER", "plain")
            .env("SEGMENT_RELAY__OUTBOX__KIND", "postgres");
        command
    };
    let made = plain(&["outbox", "init"]).output().expect("runs");
    assert_eq!(stdout(&made), "database 0: made\n", "{}", stderr(&made));
    let child = plain(&["serve"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = Ended(child.expect("starts"));
    let line = first_line(&mut child.0);
    assert!(line.contains("serves gRPC on"), "{line}");
}

/// A relay on the embedded outbox accepts one capture, which waits, and is killed.
fn leave_a_capture(directory: &Path, config: &str) {
    let child = command(directory, "", &["serve", "--config", config])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = Ended(child.expect("starts"));
    let line = first_line(&mut child.0);
    let address = line.trim().rsplit(' ').next().expect("an address");
    let arguments = [
        "capture",
        "--integration",
        "acme",
        "--email",
        "test@aol.com",
        "--campaign-id",
        "n3zrik6g",
        "--session-id",
        "y2P5ks05mqzGsdkIGjbQ",
    ];
    let captured = command(directory, "", &arguments)
        .env("SEGMENT_RELAY_ADDRESS", address)
        .output();
    let captured = captured.expect("runs");
    assert!(captured.status.success(), "{}", stderr(&captured));
}

#[test]
fn what_waits_moves_into_the_databases_and_between_them() {
    let databases = postgres_server::database().zip(postgres_server::database());
    let Some((first, second)) = databases else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("relay.toml");
    // Nothing listens there: the capture waits.
    let text = "[segment.endpoints]\nnon_eu = \"http://127.0.0.1:1\"\neu = \"http://127.0.0.1:1\"\n\
        [[integrations]]\nintegration_id = \"acme\"\n\
        [[integrations.credentials]]\ndata_region = \"non_eu\"\nwrite_key = \"a-key-for-tests\"\n";
    std::fs::write(&file, text).expect("written");
    let config = file.to_str().expect("UTF-8");
    leave_a_capture(directory.path(), config);

    let urls = format!("{} {}", first.url(), second.url());
    let outbox = |arguments: &[&str]| {
        let arguments = [&["outbox"], arguments, &["--config", config]].concat();
        run(directory.path(), &urls, &arguments)
    };
    let made = outbox(&["init"]);
    assert!(made.status.success(), "{}", stderr(&made));
    let moved = outbox(&["move"]);
    assert!(moved.status.success(), "{}", stderr(&moved));
    let said = stdout(&moved);
    assert!(said.starts_with("moved 1 captures, "), "{said}");
    assert!(said.contains("is empty now"), "{said}");
    let again = stdout(&outbox(&["move"]));
    assert!(again.starts_with("moved 0 captures, "), "{again}");

    let to = |id: &str, number: &str| outbox(&["move-integration", id, "--to", number]);
    // It may be there already.
    let there = to("acme", "0");
    assert!(there.status.success(), "{}", stderr(&there));
    for _ in 0..2 {
        for number in ["1", "0"] {
            let wanted = format!("moved acme with 1 captures to database {number}\n");
            let moved = to("acme", number);
            assert_eq!(stdout(&moved), wanted, "{}", stderr(&moved));
        }
    }
    let unknown = to("nobody", "0");
    assert_eq!(unknown.status.code(), Some(1));
    let said = stderr(&unknown);
    assert!(said.contains("no integration nobody"), "{said}");
}
