//! The command as a person runs it.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

fn segment_relay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
    command.stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    segment_relay().args(arguments).output().expect("runs")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The first line that a process prints: it names its addresses.
pub(crate) fn first_line(child: &mut Child) -> String {
    let mut line = String::new();
    let out = child.stdout.take().expect("piped");
    BufReader::new(out).read_line(&mut line).expect("a line");
    line
}

/// Starts the relay on a free port; returns it with its address.
fn serve(outbox: &Path) -> (Child, String) {
    let mut child = segment_relay()
        .arg("serve")
        .env("SEGMENT_RELAY__SERVER__LISTEN", "127.0.0.1:0")
        .env("SEGMENT_RELAY__OUTBOX__PATH", outbox)
        .env("SEGMENT_RELAY__SECRETS__KEY_FILE", outbox.join("key"))
        .stdout(Stdio::piped())
        .env("SEGMENT_RELAY__LOG__FILTER", "trace")
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    crate::scan::of_process(child.stderr.take().expect("piped"));
    let line = first_line(&mut child);
    let address = line
        .trim()
        .rsplit(' ')
        .next()
        .expect("an address")
        .to_owned();
    (child, address)
}

#[test]
fn the_demo_shows_the_main_job_and_ends_well() {
    let output = run(&["demo"]);
    let out = stdout(&output);
    assert!(output.status.success(), "{out}\n{}", stderr(&output));
    for shown in [
        "f320794388bf29dabc846c54fe7ff28f78fc3bc3c13748783335a9bf33440d55",
        "\"email\": \"test@aol.com\"",
        "\"event\": \"Survey Completed\"",
        "DELIVERED",
        "SKIPPED",
        "INVALID_ARGUMENT",
        "grpcurl",
        "segment-relay serve",
    ] {
        assert!(out.contains(shown), "{shown:?} is missing in\n{out}");
    }
}

#[test]
fn the_default_configuration_is_printed_and_has_no_faults() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("relay.toml");
    let printed = run(&["config"]);
    assert!(printed.status.success());
    std::fs::write(&file, &printed.stdout).expect("written");
    let checked = run(&["check", "--config", file.to_str().expect("UTF-8")]);
    assert!(checked.status.success(), "{}", stderr(&checked));
}

#[test]
fn a_check_names_every_fault_with_its_line_and_no_secret() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("relay.toml");
    let text = "[server]\nlisten = \"nowhere\"\nlissten = 1\n\
        [segment.endpoints]\nnon_eu = \"http://example.com/v1/batch\"\n\
        [[integrations]]\nintegration_id = \"acme\"\n\
        [[integrations.credentials]]\ndata_region = \"eu\"\nwrite_key = \"planted secret\"\n\
        [[integrations.mappings]]\nattribute_id = \"a\"\nsegment_key = \"email\"\n";
    std::fs::write(&file, text).expect("written");
    let output = run(&["check", "--config", file.to_str().expect("UTF-8")]);
    assert_eq!(output.status.code(), Some(2));
    let err = stderr(&output);
    for place in [
        "relay.toml:2:",
        "relay.toml:3:",
        "relay.toml:5:",
        "relay.toml:10:",
        "relay.toml:13:",
    ] {
        assert!(err.contains(place), "{place} is missing in\n{err}");
    }
    assert!(!err.contains("planted"), "{err}");
}

#[cfg(unix)]
#[test]
fn files_of_secrets_that_others_may_use_are_warned_of_by_check_and_serve() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let (store, key, write_key) = (path("store"), path("key"), path("acme.key"));
    std::fs::create_dir(&store).expect("made");
    let made = String::from_utf8(run(&["key"]).stdout).expect("UTF-8");
    std::fs::write(&key, made.split_whitespace().last().expect("a key")).expect("written");
    std::fs::write(&write_key, "any").expect("written");
    let file = path("relay.toml");
    let text = format!(
        "[server]\nlisten = \"127.0.0.1:0\"\n[outbox]\npath = \"{}\"\n\
         [secrets]\nkey_file = \"{}\"\n[[integrations]]\nintegration_id = \"acme\"\n\
         [[integrations.credentials]]\ndata_region = \"eu\"\nwrite_key_file = \"{}\"\n",
        store.display(),
        key.display(),
        write_key.display(),
    );
    std::fs::write(&file, text).expect("written");
    let set = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("set");
    };
    let settings = [
        (&store, 0o700, 0o755, "[outbox] path"),
        (&key, 0o600, 0o604, "[secrets] key_file"),
        (&write_key, 0o600, 0o660, "write_key_file"),
        (&file, 0o644, 0o666, "configuration"),
    ];
    let name = file.to_str().expect("UTF-8");
    for open in [false, true] {
        for (path, shut, wide, _) in settings {
            set(path, if open { wide } else { shut });
        }
        let checked = run(&["check", "--config", name]);
        assert!(checked.status.success(), "a warning is no fault");
        let mut serving = segment_relay();
        serving.args(["serve", "--config", name]);
        serving.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut serving = serving.spawn().expect("starts");
        first_line(&mut serving);
        serving.kill().expect("killed");
        let served = serving.wait_with_output().expect("ended");
        for said in [stderr(&checked), stderr(&served)] {
            for (path, _, _, setting) in settings {
                let told = format!("{setting} {}: other users may", path.display());
                assert_eq!(said.contains(&told), open, "{told} in\n{said}");
            }
        }
    }
}

#[test]
fn an_open_port_without_tls_is_refused_unless_it_is_asked_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut command = segment_relay();
    command
        .arg("serve")
        .env("SEGMENT_RELAY__SERVER__LISTEN", "0.0.0.0:0")
        .env(
            "SEGMENT_RELAY__OUTBOX__PATH",
            directory.path().join("outbox"),
        );
    let output = command.output().expect("runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("--insecure"),
        "{}",
        stderr(&output)
    );
    assert!(
        !directory.path().join("outbox").exists(),
        "nothing is opened before the check"
    );
}

#[test]
fn a_second_relay_on_the_same_outbox_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut first, _) = serve(directory.path());
    let output = segment_relay()
        .arg("serve")
        .env("SEGMENT_RELAY__SERVER__LISTEN", "127.0.0.1:0")
        .env("SEGMENT_RELAY__OUTBOX__PATH", directory.path())
        .env(
            "SEGMENT_RELAY__SECRETS__KEY_FILE",
            directory.path().join("key"),
        )
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("another segment-relay"),
        "{}",
        stderr(&output)
    );
    first.kill().expect("killed");
    first.wait().expect("ended");
}

#[cfg(unix)]
#[test]
fn health_probes_and_sigterm_ends_the_relay_with_zero() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut relay, address) = serve(directory.path());
    let probe = || run(&["health", "--address", &address]);
    let healthy = probe();
    assert!(healthy.status.success(), "{}", stderr(&healthy));
    assert!(stdout(&healthy).contains("SERVING"));
    let pid = relay.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .expect("sent")
            .success()
    );
    assert!(relay.wait().expect("ended").success());
    assert_eq!(probe().status.code(), Some(1));
}

/// A sandbox and a relay with the integration "acme", as processes.
pub(crate) struct Processes {
    sandbox: Child,
    relay: Child,
    address: String,
    pub(crate) sandbox_address: String,
    _directory: tempfile::TempDir,
}

impl Processes {
    fn start() -> Self {
        Self::with(&[])
    }

    /// The same with more arguments for the sandbox.
    pub(crate) fn with(sandbox_arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut sandbox = segment_relay()
            .args([
                "sandbox",
                "--listen",
                "127.0.0.1:0",
                "--eu-listen",
                "127.0.0.1:0",
                "--quiet",
            ])
            .args(sandbox_arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let line = first_line(&mut sandbox);
        let urls: Vec<_> = line
            .split(' ')
            .filter(|word| word.starts_with("http://"))
            .collect();
        let file = directory.path().join("relay.toml");
        let text = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\n[outbox]\npath = \"{}\"\n\
             [secrets]\nkey_file = \"{}\"\n[segment.endpoints]\nnon_eu = \"{}\"\neu = \"{}\"\n\
             [[integrations]]\nintegration_id = \"acme\"\nunmapped_attributes = \"forward\"\n\
             [[integrations.credentials]]\ndata_region = \"non_eu\"\nwrite_key = \"a-key-for-tests\"\n",
            directory.path().join("outbox").display(),
            directory.path().join("key").display(),
            urls[0],
            urls[1]
        );
        std::fs::write(&file, text).expect("written");
        let mut relay = segment_relay()
            .args(["serve", "--config", file.to_str().expect("UTF-8")])
            .env("SEGMENT_RELAY__LOG__FILTER", "trace")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        crate::scan::of_process(relay.stderr.take().expect("piped"));
        let line = first_line(&mut relay);
        let address = line
            .trim()
            .rsplit(' ')
            .next()
            .expect("an address")
            .to_owned();
        Self {
            sandbox,
            relay,
            address,
            sandbox_address: urls[0].trim_start_matches("http://").to_owned(),
            _directory: directory,
        }
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        let mut command = segment_relay();
        command
            .args(arguments)
            .env("SEGMENT_RELAY_ADDRESS", &self.address);
        command.output().expect("runs")
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in [&mut self.relay, &mut self.sandbox] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

const EXAMPLE: [&str; 11] = [
    "--integration",
    "acme",
    "--email",
    "test@aol.com",
    "--campaign-id",
    "n3zrik6g",
    "--session-id",
    "y2P5ks05mqzGsdkIGjbQ",
    "--attribute",
    "colour=blue",
    "--json",
];

#[test]
fn a_person_captures_previews_and_reads_the_status_at_a_terminal() {
    let processes = Processes::start();
    let table = &EXAMPLE[..10];
    let preview = processes.run(&[&["preview"], table].concat());
    assert!(preview.status.success(), "{}", stderr(&preview));
    assert!(
        stdout(&preview).contains("\"colour\": \"blue\""),
        "{}",
        stdout(&preview)
    );

    let captured = processes.run(&[&["capture"], table, &["--wait", "delivered"]].concat());
    assert!(captured.status.success(), "{}", stderr(&captured));
    let out = stdout(&captured);
    assert!(out.contains("identify  DELIVERED"), "{out}");
    let id = out
        .lines()
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .expect("an id")
        .to_owned();

    let again = processes.run(&[&["capture"], &EXAMPLE[..]].concat());
    let json: serde_json::Value = serde_json::from_slice(&again.stdout).expect("JSON");
    assert_eq!(json["result"]["duplicate"], true);
    assert_eq!(json["result"]["captureId"], id.as_str());
    assert_eq!(
        json["result"]["events"][1]["state"],
        "DELIVERY_STATE_DELIVERED"
    );

    let status = processes.run(&["status", "--integration", "acme", &id]);
    let out = stdout(&status);
    assert!(
        out.contains("track     DELIVERED") && out.contains("LATENCY"),
        "{out}"
    );
}

#[test]
fn what_is_wrong_is_said_with_its_field_and_an_exit_code() {
    let processes = Processes::start();
    let bad = [
        "--integration",
        "acme",
        "--email",
        "nobody",
        "--campaign-id",
        "c",
    ];
    let preview = processes.run(&[&["preview"], &bad[..]].concat());
    assert_eq!(preview.status.code(), Some(1));
    assert!(
        stdout(&preview).contains("capture.email: "),
        "{}",
        stdout(&preview)
    );
    let captured = processes.run(&[&["capture"], &bad[..]].concat());
    assert_eq!(captured.status.code(), Some(1));
    let err = stderr(&captured);
    assert!(
        err.contains("INVALID_ARGUMENT") && err.contains("capture.session_id: "),
        "{err}"
    );
    let flag = processes.run(&["capture", "--integration", "acme", "--attribute", "x"]);
    assert_eq!(flag.status.code(), Some(2));
    let missing = processes.run(&["status", "--integration", "acme", "nothing"]);
    assert!(
        stderr(&missing).contains("NOT_FOUND"),
        "{}",
        stderr(&missing)
    );
    let nobody = run(&[
        "status",
        "--address",
        "127.0.0.1:1",
        "--integration",
        "acme",
        "x",
    ]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(stderr(&nobody).contains("is `segment-relay serve` running there?"));
}

#[test]
fn a_watcher_at_a_terminal_sees_deliveries_as_lines() {
    let processes = Processes::start();
    let mut watch = segment_relay()
        .args([
            "watch",
            "--integration",
            "acme",
            "--state",
            "delivered",
            "--json",
        ])
        .env("SEGMENT_RELAY_ADDRESS", &processes.address)
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    // The watch may begin after a delivery: send until one is seen.
    let (seen, line) = std::sync::mpsc::sync_channel(1);
    let reader = std::thread::spawn(move || {
        let _ = seen.send(lines.next().expect("a line").expect("UTF-8"));
    });
    let mut line_seen = None;
    for number in 0..1_000 {
        let id = format!("capture-{number}");
        let table = [
            &["capture"],
            &EXAMPLE[..10],
            &["--capture-id", &id, "--wait", "delivered"],
        ];
        assert!(processes.run(&table.concat()).status.success());
        if let Ok(line) = line.try_recv() {
            line_seen = Some(line);
            break;
        }
    }
    let update: serde_json::Value =
        serde_json::from_str(&line_seen.expect("an update")).expect("JSON");
    assert_eq!(update["integrationId"], "acme");
    assert_eq!(update["event"]["state"], "DELIVERY_STATE_DELIVERED");
    watch.kill().expect("killed");
    watch.wait().expect("ended");
    reader.join().expect("ended");
}
