//! What [`Config::load`] makes of files and environments.

use std::time::Duration;

use super::*;

mod defaults;
mod integrations;
mod postgres;
mod security;
mod telemetry;

/// Loads `text` as `f.toml`; an integration breaks no rule and no key file
/// exists.
fn load(text: &str, environment: &[(&str, &str)]) -> Result<Config, Faults> {
    let outside = Outside {
        validate: &|_| Vec::new(),
        read_key_file: &|_| Err(io::ErrorKind::NotFound.into()),
    };
    let environment = environment.iter().copied();
    Config::load(Some(("f.toml", text)), environment, &outside)
}

/// Each fault as it is printed.
fn faults(text: &str, environment: &[(&str, &str)]) -> Vec<String> {
    lines(&load(text, environment).expect_err("there are faults"))
}

fn lines(faults: &Faults) -> Vec<String> {
    faults.iter().map(ToString::to_string).collect()
}

#[test]
fn the_environment_is_stronger_than_the_file_and_the_file_than_the_default() {
    let file = "[server]\nmax_watchers = 5\nmax_wait_ms = 6_000\n[segment.endpoints]\neu = \"https://proxy/\"";
    let config = load(
        file,
        &[
            ("SEGMENT_RELAY__SERVER__MAX_WATCHERS", "7"),
            ("SEGMENT_RELAY__SERVER__REFLECTION", "false"),
            ("SEGMENT_RELAY__LOG__FORMAT", "JSON"),
            ("SEGMENT_RELAY_CONFIG", "not a setting"),
            ("PATH", "/bin"),
        ],
    )
    .expect("all is fine");
    assert_eq!(config.server.max_watchers, 7);
    assert_eq!(config.server.max_wait, Duration::from_secs(6));
    assert_eq!(config.server.max_calls_in_flight, 4096);
    assert!(!config.server.reflection);
    assert_eq!(config.log.format, LogFormat::Json);
    let eu = config.segment.endpoints.eu.as_str();
    assert_eq!(eu, "https://proxy/v1/batch");
}

#[test]
fn all_faults_are_told_together_with_their_places() {
    let file = "\
[server]
listen = \"localhost:1\"
  max_watchers = 10001
reflection = \"yes\"
max_wait = 1

[sever]
[delivery]
retry_base_ms = 1.5
[log]
filter = \"a=b=c\"
";
    let environment = [
        ("SEGMENT_RELAY__SERVER__MAX_WATCHERS", "-1"),
        ("SEGMENT_RELAY__SERVER_LISTEN", "[::]:1"),
        ("SEGMENT_RELAY__INTEGRATIONS__0__ENABLED", "true"),
    ];
    assert_eq!(
        load(file, &environment).expect_err("many").to_string(),
        r#"10 faults in the configuration:
  f.toml:2:1: server.listen: must be an IP address with a port, such as 127.0.0.1:50051 or [::]:50051 (all interfaces), or the path of a Unix socket, such as unix:/run/segment-relay.sock, not "localhost:1"
  f.toml:3:3: server.max_watchers: must be a whole number of calls, 0 to 10000, not 10001
  f.toml:4:1: server.reflection: must be true or false, not "yes"
  f.toml:5:1: server.max_wait: unknown; did you mean max_wait_ms?
  f.toml:7:2: sever: unknown; did you mean server?
  f.toml:9:1: delivery.retry_base_ms: must be a whole number of milliseconds, 10 to 3600000, not 1.5
  f.toml:11:1: log.filter: must be filter directives such as info or segment_relay=debug,warn, not "a=b=c"
  environment SEGMENT_RELAY__INTEGRATIONS__0__ENABLED: integrations are taken from the file alone
  environment SEGMENT_RELAY__SERVER_LISTEN: unknown; did you mean SEGMENT_RELAY__SERVER__LISTEN?
  environment SEGMENT_RELAY__SERVER__MAX_WATCHERS: must be a whole number of calls, 0 to 10000, not "-1""#
    );
}

#[test]
fn every_breach_of_the_syntax_is_told_without_its_echo() {
    let file = "[server]\nlisten = abc\nmax_watchers = 10001\nmax_wait_ms = 1\nmax_wait_ms = 2\n[log\nx = 1\n";
    let found = faults(file, &[("SEGMENT_RELAY__LOG__FORMAT", "xml")]);
    let starts = [
        "f.toml:2:10: not valid TOML: ",
        "f.toml:3:1: server.max_watchers: must be",
        "f.toml:4:1: server.max_wait_ms: must be",
        "f.toml:5:1: not valid TOML: duplicate key",
        "f.toml:6:5: not valid TOML: ",
        "environment SEGMENT_RELAY__LOG__FORMAT: must be one of auto, text, json, not \"xml\"",
    ];
    assert_eq!(found.len(), starts.len(), "{found:#?}");
    for (fault, start) in found.iter().zip(starts) {
        assert!(fault.starts_with(start), "{fault} is not {start}");
    }
}

#[test]
fn unknown_keys_are_refused_wherever_they_hide() {
    for (file, fault) in [
        ("x = 1", "f.toml:1:1: x: unknown"),
        (
            "\"server.listen\" = 1",
            "f.toml:1:1: \"server.listen\": unknown",
        ),
        (
            "server = 1",
            "f.toml:1:1: server: is a section: write [server] and its settings below",
        ),
        (
            "[[log]]",
            "f.toml:1:3: log: is a section: write [log] and its settings below",
        ),
        (
            "[delivery]\nfilter = 1",
            "f.toml:2:1: delivery.filter: unknown; did you mean log.filter?",
        ),
        (
            "segment.endpoints.\"e\\nu\" = 1",
            "f.toml:1:19: segment.endpoints.\"e…\": unknown; did you mean eu?",
        ),
    ] {
        let found = faults(file, &[]);
        assert_eq!(found.len(), 1, "{file}: {found:?}");
        assert!(found[0].starts_with(fault), "{} is not {fault}", found[0]);
    }
}

#[test]
fn settings_of_the_outbox_on_jetstream_are_refused_with_the_remedy() {
    let file = "[outbox]\nkind = \"JetStream\"\n[nats]\nservers = \"nats://u:planted@a:1\"\n";
    let environment = [("SEGMENT_RELAY__NATS__PASSWORD", "planted")];
    let remedy = "first empty its streams with the version that wrote them, see docs/scaling.md";
    let section = "was removed with the outbox on NATS JetStream; set [postgres] instead, and";
    assert_eq!(
        faults(file, &environment),
        [
            format!(
                "f.toml:2:1: outbox.kind: must be \"postgres\" (NATS JetStream was removed: \
                 {remedy}), not \"JetStream\""
            ),
            format!("f.toml:3:2: nats: {section} {remedy}"),
            format!("environment SEGMENT_RELAY__NATS__PASSWORD: {section} {remedy}"),
        ]
    );
}

#[test]
fn settings_that_contradict_each_other_are_refused_where_they_were_set() {
    for (file, fault) in [
        (
            "[delivery]\nretry_max_ms = 499",
            "f.toml:2:1: delivery.retry_max_ms: delivery.retry_base_ms = 500 must be",
        ),
        (
            "[segment.endpoints]\nnon_eu = \"https://proxy/a\"\neu = \"https://PROXY:444/b\"",
            "f.toml:3:1: segment.endpoints.eu: both regions have the same host",
        ),
    ] {
        let found = faults(file, &[]);
        assert_eq!(found.len(), 1, "{file}: {found:?}");
        assert!(found[0].starts_with(fault), "{} is not {fault}", found[0]);
    }
    // One fault is enough where a value did not even parse.
    let found = faults("[delivery]\nretry_base_ms = 90000\nretry_max_ms = 0", &[]);
    assert_eq!(found.len(), 1, "{found:?}");
}

#[test]
fn data_of_one_region_cannot_be_configured_to_the_other() {
    for (key, url, told) in [
        (
            "eu",
            "https://API.segment.io/x",
            "api.segment.io belongs to the other",
        ),
        (
            "non_eu",
            "https://events.eu1.segmentapis.com:8443",
            "events.eu1.segmentapis.com belongs to the other",
        ),
        (
            "eu",
            "http://10.0.0.1/",
            "http is for 127.0.0.0/8, ::1 and localhost alone",
        ),
    ] {
        let found = faults(&format!("[segment.endpoints]\n{key} = \"{url}\""), &[]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(told), "{found:?}");
    }
    let both_here = "[segment.endpoints]\neu = \"http://[::1]:1\"\nnon_eu = \"http://[::1]:2\"";
    let config = load(both_here, &[]).expect("a test on one machine");
    assert!(config.segment.endpoints.eu.is_loopback());
}

#[test]
fn passwords_in_urls_are_not_shown() {
    for url in [
        "https://me:hunter2@h/",
        "https://h/?k=hunter2",
        "hunter2@",
        "x#hunter2",
    ] {
        let found = faults("", &[("SEGMENT_RELAY__SEGMENT__ENDPOINTS__EU", url)]);
        assert!(found[0].contains("must be a URL without"), "{found:?}");
        assert!(!found[0].contains("hunter2"), "{found:?}");
    }
}

#[test]
fn long_and_strange_values_are_cut_and_escaped() {
    let value = format!("\u{1b}[31m{}", "x".repeat(100_000));
    let found = faults("", &[("SEGMENT_RELAY__LOG__FORMAT", &value)]);
    assert!(found[0].contains(r#"not "\u{1b}[31mxxx"#), "{found:?}");
    assert!(found[0].chars().count() < 200, "{found:?}");
    let unknown = format!("{} = 1", "y".repeat(100_000));
    assert!(faults(&unknown, &[])[0].chars().count() < 200);
}

#[test]
fn faults_beyond_the_bound_are_counted() {
    let file: String = (0..MAX_FAULTS + 7).map(|n| format!("k{n} = 1\n")).collect();
    let faults = load(&file, &[]).expect_err("many faults");
    assert_eq!(faults.len(), MAX_FAULTS + 7);
    let printed = faults.to_string();
    assert!(printed.starts_with("107 faults in the configuration:\n"));
    assert!(printed.ends_with("\n  … and 7 more"));
    assert_eq!(printed.lines().count(), MAX_FAULTS + 2);
}

#[cfg(unix)]
#[test]
fn variables_that_are_not_utf8_matter_only_where_they_are_settings() {
    use std::os::unix::ffi::OsStringExt;

    let broken = || OsString::from_vec(vec![b'/', 0xff]);
    let outside = Outside {
        validate: &|_| Vec::new(),
        read_key_file: &|_| Ok(String::new()),
    };
    let load = |name: &str| Config::load(None, [(name, broken())], &outside);
    assert!(load("PATH").is_ok());
    let faults = load("SEGMENT_RELAY__OUTBOX__PATH").expect_err("no path");
    assert_eq!(
        lines(&faults),
        ["environment SEGMENT_RELAY__OUTBOX__PATH: must be UTF-8"]
    );
}

#[test]
fn files_that_cannot_be_read_are_faults() {
    let directory = tempfile::tempdir().expect("a directory");
    let told = |name: &str| {
        let path = directory.path().join(name);
        let faults = Config::read(Some(&path), &|_| Vec::new()).expect_err(name);
        lines(&faults)[0]
            .rsplit_once(name)
            .expect(name)
            .1
            .to_owned()
    };
    assert!(told("missing.toml").starts_with(": cannot be read: "));

    let write = |name: &str, content: &[u8]| {
        std::fs::write(directory.path().join(name), content).expect("it is written");
    };
    write("binary.toml", b"x = \"\xff\"");
    assert!(told("binary.toml").contains("UTF-8"));
    write("large.toml", &vec![b'\n'; 8 * 1024 * 1024 + 1]);
    assert_eq!(
        told("large.toml"),
        ": cannot be read: larger than 8388608 bytes"
    );
    write("bad.toml", b"\nx = 1");
    assert!(told("bad.toml").starts_with(":2:1: x: unknown"));
}
