//! What the disk gives away, and the command over TLS with a token.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use segment_relay::{
    proto::{DeliveryState, FieldMapping, Integration, Privacy, UpdateIntegrationRequest},
    sandbox::Rule,
};
use sha2::{Digest, Sha256};

use crate::{
    auth::token,
    certificates::{Authority, Files},
    command::first_line,
    harness::{WRITE_KEY, World, acme, mapping, numbered, states, text},
};

/// The files below a directory in which one of the texts stands.
/// Which of the texts stand in which files.
pub(crate) fn files_with(directory: &Path, planted: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).expect("listed") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(files_with(&path, planted));
            continue;
        }
        // A server that is at work renames and removes files of its streams.
        let content = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            content => content.expect("read"),
        };
        for text in planted {
            if content
                .windows(text.len())
                .any(|part| part == text.as_bytes())
            {
                found.push(format!("{text} in {}", path.display()));
            }
        }
    }
    found
}

#[tokio::test]
async fn with_encryption_the_disk_tells_nobodys_address_answer_or_key() {
    let mut world = World::with("[outbox]\nencryption = true\n").await;
    world.create(acme()).await;
    world.deliver(numbered(1)).await;
    world.dead_letter("acme", numbered(2), 400).await;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    for number in 3..50 {
        world.accept(numbered(number)).await;
    }
    let hash = hex::encode(Sha256::digest("person-3@example.com"));
    let planted = [
        "@example.com",
        "attribute_value_1",
        "person-",
        WRITE_KEY,
        &hash,
    ];
    // While it runs, and after a drain.
    assert_eq!(files_with(world.outbox(), &planted), [""; 0]);
    world.restart().await;
    assert_eq!(files_with(world.outbox(), &planted), [""; 0]);
    world.behave();
    world.arrived(96).await;
    world.stop().await;
}

#[tokio::test]
async fn a_rotated_write_key_loses_nothing_that_waits() {
    let world = World::start().await;
    world.create(acme()).await;
    world.misbehave(Rule {
        status: Some(401),
        ..Rule::default()
    });
    for number in 0..20 {
        world.accept(numbered(number)).await;
    }
    // Segment knows the new key alone.
    world.misbehave(Rule {
        status: Some(401),
        write_key: Some(WRITE_KEY.into()),
        ..Rule::default()
    });
    let mut rotated = acme();
    rotated.credentials[0].write_key = "write-key-of-acme-0002".into();
    let update = UpdateIntegrationRequest {
        integration: Some(Integration {
            credentials: rotated.credentials,
            integration_id: "acme".into(),
            ..Integration::default()
        }),
        update_mask: None,
    };
    let updated = world
        .integrations()
        .update_integration(update)
        .await
        .expect("updated");
    let integration = updated.into_inner().integration.expect("an integration");
    assert_eq!(integration.credentials[0].write_key, "");
    assert_eq!(integration.credentials[0].write_key_hint, "0002");
    for number in 0..20 {
        let result = world.settled(numbered(number)).await;
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
    assert_eq!(world.sandbox.stats().events_accepted, 40);
    world.stop().await;
}

#[tokio::test]
async fn a_key_that_is_rotated_while_a_request_is_under_way_is_used_at_once() {
    let world = World::start().await;
    world.create(acme()).await;
    // The old key is refused, slowly. After that a lane waits for five minutes.
    world.misbehave(Rule {
        status: Some(401),
        write_key: Some(WRITE_KEY.into()),
        delay_ms: Some(300),
        ..Rule::default()
    });
    world.accept(numbered(1)).await;
    world.request_under_way().await;
    let mut rotated = acme();
    rotated.credentials[0].write_key = "write-key-of-acme-0002".into();
    let update = UpdateIntegrationRequest {
        integration: Some(rotated),
        update_mask: None,
    };
    let mut integrations = world.integrations();
    integrations
        .update_integration(update)
        .await
        .expect("updated");
    let result = world.settled(numbered(1)).await;
    assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    assert_eq!(result.events[0].attempt_count, 2);
    world.stop().await;
}

#[tokio::test]
async fn what_is_to_be_dropped_or_hashed_never_reaches_the_disk_or_segment() {
    let world = World::start().await;
    let ruled = |id: &str, privacy: Privacy| FieldMapping {
        privacy: privacy.into(),
        ..mapping(id)
    };
    world
        .create(Integration {
            mappings: vec![
                ruled("dropped", Privacy::Drop),
                ruled("hashed", Privacy::Hash),
                mapping("passed"),
            ],
            ..acme()
        })
        .await;
    world.misbehave(Rule {
        status: Some(503),
        ..Rule::default()
    });
    let mut capture = numbered(1);
    for id in ["dropped", "hashed", "passed"] {
        let value = text(&format!("planted-{id}"));
        capture.attributes.insert(id.into(), value);
    }
    world.accept(capture.clone()).await;
    let hash = hex::encode(Sha256::digest("planted-hashed"));
    // Waiting, and not encrypted.
    assert_eq!(
        files_with(world.outbox(), &["planted-dropped", "planted-hashed"]),
        [""; 0]
    );
    let stored: &[&str] = match world.is_embedded() {
        true => &["planted-passed", &hash],
        // Sealed by default.
        false => &[],
    };
    for stored in stored {
        assert!(
            !files_with(world.outbox(), &[*stored]).is_empty(),
            "{stored}"
        );
    }
    world.behave();
    world.settled(capture).await;
    let sent: String = world
        .sandbox
        .entries()
        .iter()
        .map(|entry| entry.event_json().to_string())
        .collect();
    assert!(sent.contains(&hash) && sent.contains("planted-passed"));
    assert!(!sent.contains("planted-dropped") && !sent.contains("planted-hashed"));
    world.stop().await;
}

fn segment_relay(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn output(command: &mut Command) -> (Output, String) {
    let output = command.output().expect("runs");
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, err)
}

#[test]
fn with_tls_and_callers_the_relay_serves_the_network_and_the_command_reaches_it() {
    let ca = Authority::new();
    let files = Files::new();
    files.put_pair("server", &ca.issue(&["localhost"]));
    let ca_file = files.put("ca.pem", &ca.pem());
    let token_file = files.put("token", &format!("{}\n", token("ops")));
    let hash = hex::encode(Sha256::digest(token("ops")));
    let shown = |path: &Path| path.display().to_string();
    let config = files.put(
        "relay.toml",
        &format!(
            "[server]\nlisten = \"0.0.0.0:0\"\n{}[secrets]\nkey_file = \"{}\"\n[outbox]\npath = \"{}\"\n\
             [[callers]]\nname = \"ops\"\ntoken_sha256 = [\"{hash}\"]\npermissions = [\"read\", \"privacy\"]\n",
            files.server_settings("required"),
            shown(&files.path("key")),
            shown(&files.path("outbox")),
        ),
    );
    let mut relay = segment_relay(&["serve", "--config", &shown(&config)])
        .env("SEGMENT_RELAY__LOG__FILTER", "trace")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    crate::scan::of_process(relay.stderr.take().expect("piped"));
    let line = first_line(&mut relay);
    let port = line.trim().rsplit(':').next().expect("a port").to_owned();
    let address = format!("https://localhost:{port}");
    let reach = ["--address", &address, "--ca-file", &shown(&ca_file)];

    let mut healthy = segment_relay(&["health"]);
    let (health, err) = output(healthy.args(reach));
    assert!(health.status.success(), "{err}");
    let mut by_file = segment_relay(&["dead-letters", "list", "--token-file", &shown(&token_file)]);
    let (listed, err) = output(by_file.args(reach));
    assert!(listed.status.success(), "{err}");
    let mut by_variable = segment_relay(&["erase", "--email", "person-1@example.com"]);
    by_variable
        .args(reach)
        .env("SEGMENT_RELAY_TOKEN", token("ops"));
    let (erased, err) = output(&mut by_variable);
    assert!(erased.status.success(), "{err}");
    let out = String::from_utf8_lossy(&erased.stdout);
    assert!(
        out.contains("by ops") && out.contains("0 waiting events"),
        "{out}"
    );
    let mut receipts = segment_relay(&["receipts"]);
    let (listed, err) = output(
        receipts
            .args(reach)
            .env("SEGMENT_RELAY_TOKEN", token("ops")),
    );
    assert!(listed.status.success(), "{err}");
    assert_eq!(String::from_utf8_lossy(&listed.stdout), out);

    let mut nobody = segment_relay(&["receipts"]);
    let (refused, err) = output(nobody.args(reach));
    assert_eq!(refused.status.code(), Some(1));
    assert!(err.contains("UNAUTHENTICATED"), "{err}");
    let mut untrusting = segment_relay(&["health", "--address", &address]);
    let (refused, err) = output(&mut untrusting);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        err.contains("certificate") || err.contains("roots"),
        "{err}"
    );
    let mut in_clear = segment_relay(&["receipts", "--address", "http://192.0.2.1:1"]);
    let (refused, err) = output(in_clear.env("SEGMENT_RELAY_TOKEN", token("ops")));
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        err.contains("https:// alone") && !err.contains("planted"),
        "{err}"
    );
    relay.kill().expect("killed");
    relay.wait().expect("ended");
}

#[test]
fn tokens_keys_and_secrets_are_made_as_the_configuration_takes_them() {
    let files = Files::new();
    let line = |command: &str| {
        let (made, err) = output(&mut segment_relay(&[command]));
        assert!(made.status.success(), "{err}");
        String::from_utf8(made.stdout).expect("UTF-8")
    };
    let tokens = line("token");
    let words: Vec<&str> = tokens.split_whitespace().collect();
    assert_eq!(words[3], hex::encode(Sha256::digest(words[1])));
    let config = files.put(
        "relay.toml",
        &format!(
            "[[callers]]\nname = \"a\"\ntoken_sha256 = [\"{}\"]\npermissions = [\"read\"]\n\
             [notify]\nurl = \"http://127.0.0.1:1\"\nsecret = \"{}\"\n[secrets]\nkeys = \"{}\"\n",
            words[3],
            line("secret").trim(),
            line("key").trim()
        ),
    );
    let config = config.display().to_string();
    let (checked, err) = output(&mut segment_relay(&["check", "--config", &config]));
    assert!(checked.status.success(), "{err}");
    assert_ne!(line("token"), tokens);
}
