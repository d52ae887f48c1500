//! TLS towards NATS, passwords and tokens: what is right works end to end; what is wrong is
//! said at the start, with the setting and what to do, and without secrets.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use segment_relay::proto::{DeliveryState, WaitFor};

use super::{
    init,
    outage::{capture, create},
    relays::{Watched, process_with},
};
use crate::{
    certificates::{Authority, Files},
    command::{stderr, stdout},
    harness::{PATIENCE, states},
    nats_server::Server,
    process::Process,
};

/// Settings of `[nats]`, by their names in the environment.
pub(super) type Settings = Vec<(&'static str, String)>;

/// A relay that is let in.
pub(super) struct Working {
    pub(super) relay: Process,
    pub(super) watched: Arc<Watched>,
    _directory: tempfile::TempDir,
}

impl Working {
    /// Makes the streams and starts a relay, with the same settings.
    pub(super) async fn start(server: &Server, settings: &Settings) -> Self {
        let made = command(server, &["nats", "init"], settings);
        assert!(made.status.success(), "{}{}", stdout(&made), stderr(&made));
        let watched = Arc::new(Watched::default());
        let endpoint = watched.listen().await;
        let directory = tempfile::tempdir().expect("a directory");
        let named: Vec<(String, &Path)> = settings
            .iter()
            .map(|(name, value)| (format!("SEGMENT_RELAY__NATS__{name}"), Path::new(value)))
            .collect();
        let named: Vec<_> = named
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
            .collect();
        let relay = process_with(&server.url(), directory.path(), &endpoint, 1, &named).await;
        create(&relay.channel).await;
        Self {
            relay,
            watched,
            _directory: directory,
        }
    }

    pub(super) async fn delivers(&self, number: usize) {
        let result = capture(&self.relay.channel, number, WaitFor::Delivered).await;
        let events = result.expect("accepted").events;
        assert_eq!(states(&events), [DeliveryState::Delivered; 2]);
        assert_eq!(self.watched.collisions.load(Ordering::Relaxed), 0);
    }

    /// Delivers again after the connection was lost.
    pub(super) async fn delivers_again(&self, number: usize) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while let Err(status) = capture(&self.relay.channel, number, WaitFor::Delivered).await {
            assert!(std::time::Instant::now() < deadline, "{status}");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        self.delivers(number).await;
    }
}

fn command(server: &Server, arguments: &[&str], settings: &Settings) -> std::process::Output {
    let named: Vec<_> = settings
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    let all: Vec<_> = [("REPLICAS", "1")].into_iter().chain(named).collect();
    init::command(server, arguments, &all)
}

/// What `nats init` and `serve` say when they are not let in.
pub(super) fn refused(server: &Server, settings: &Settings) -> String {
    let said = [&["nats", "init"][..], &["serve"]].map(|arguments| {
        let refused = command(server, arguments, settings);
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}");
        assert!(
            !stderr(&refused).contains("planted"),
            "{}",
            stderr(&refused)
        );
        let said = stderr(&refused);
        let error = said
            .lines()
            .find(|line| line.starts_with("segment-relay: "));
        // Not the second at which a certificate was looked at.
        let error = error.expect("an error").split(": verification time").next();
        error.expect("a part").to_owned()
    });
    assert_eq!(said[0], said[1]);
    said[0].clone()
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// A server with TLS, whose certificate and CA are `server.pem` and `ca.pem`.
fn tls_server(files: &Files, ca: &Authority, name: &str, more: &[&str]) -> Option<Server> {
    files.put("ca.pem", &ca.pem());
    files.put_pair("server", &ca.issue(&[name]));
    let [certificate, key, trusted] =
        ["server.pem", "server.key", "ca.pem"].map(|name| shown(&files.path(name)));
    let mut arguments = vec![
        "--jetstream",
        "--tls",
        "--tlscert",
        &certificate,
        "--tlskey",
        &key,
        "--tlscacert",
        &trusted,
    ];
    arguments.extend(more);
    Server::start_with(&arguments)
}

fn with_tls(server: &Server, ca: &Path, more: &[(&'static str, &Path)]) -> Settings {
    let mut settings = vec![
        ("SERVERS", format!("nats://127.0.0.1:{}", server.port)),
        ("TLS", "true".to_owned()),
        ("CA_FILE", shown(ca)),
    ];
    settings.extend(more.iter().map(|(name, path)| (*name, shown(path))));
    settings
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_are_known_by_their_ca_and_their_name() {
    let (files, ca, other) = (Files::new(), Authority::new(), Authority::new());
    let Some(mut server) = tls_server(&files, &ca, "127.0.0.1", &[]) else {
        return;
    };
    let other_ca = files.put("other-ca.pem", &other.pem());
    let own_ca = files.path("ca.pem");
    let working = Working::start(&server, &with_tls(&server, &own_ca, &[])).await;
    working.delivers(1).await;

    let said = refused(&server, &with_tls(&server, &other_ca, &[]));
    assert!(
        said.contains("not signed by a CA of [nats] ca_file"),
        "{said}"
    );
    // With and without the setting: the server itself wants TLS.
    for tls in ["true", "false"] {
        let settings = vec![("TLS", tls.to_owned())];
        let said = refused(&server, &settings);
        assert!(said.contains("name its CA in [nats] ca_file"), "{said}");
    }

    // Server and CA change, and the relay needs no restart.
    server.kill();
    files.put_pair("server", &other.issue(&["127.0.0.1"]));
    files.put("ca.pem", &other.pem());
    server.run();
    working.delivers_again(2).await;
    drop((working, server));

    let named = tls_server(&files, &ca, "nats.internal", &[]).expect("a server");
    let said = refused(&named, &with_tls(&named, &own_ca, &[]));
    assert!(said.contains("nats.internal"), "{said}");
    assert!(
        said.contains("name each server in [nats] servers as its certificate does"),
        "{said}"
    );
    drop(named);

    let expired = ca.issue_expired(&["127.0.0.1"]);
    let mut old = tls_server(&files, &ca, "127.0.0.1", &[]).expect("a server");
    old.kill();
    files.put_pair("server", &expired);
    old.run();
    let said = refused(&old, &with_tls(&old, &own_ca, &[]));
    assert!(
        said.contains("their certificate is not taken") && said.contains("expired"),
        "{said}"
    );

    let plain = Server::start().expect("a server");
    let said = refused(&plain, &with_tls(&plain, &own_ca, &[]));
    assert!(said.contains("they don't speak TLS"), "{said}");
    let by_url = vec![("SERVERS", format!("tls://127.0.0.1:{}", plain.port))];
    let said = refused(&plain, &by_url);
    assert!(said.contains("they don't speak TLS"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_shows_its_certificate_to_servers_that_want_one() {
    let (files, ca, other) = (Files::new(), Authority::new(), Authority::new());
    let Some(server) = tls_server(&files, &ca, "127.0.0.1", &["--tlsverify"]) else {
        return;
    };
    files.put_pair("relay", &ca.issue(&["relay.internal"]));
    files.put_pair("stranger", &other.issue(&["relay.internal"]));
    let own_ca = files.path("ca.pem");
    let identity = |certificate: &str, key: &str| {
        let paths = [files.path(certificate), files.path(key)];
        let named = [
            ("CERTIFICATE_FILE", paths[0].as_path()),
            ("KEY_FILE", paths[1].as_path()),
        ];
        with_tls(&server, &own_ca, &named)
    };
    let right = identity("relay.pem", "relay.key");
    let working = Working::start(&server, &right).await;
    working.delivers(1).await;
    // Written as 0644.
    let warned = working
        .relay
        .log
        .line(|line| line.contains("others may read"));
    assert!(warned.await.contains("relay.key"));

    for (settings, wanted) in [
        (
            with_tls(&server, &own_ca, &[]),
            "set [nats] certificate_file and key_file",
        ),
        (
            identity("stranger.pem", "stranger.key"),
            "they refuse the relay's certificate, [nats] certificate_file",
        ),
        (
            identity("relay.pem", "stranger.key"),
            "relay.pem: does not fit to key_file",
        ),
        (identity("relay.pem", "relay.pem"), "[nats] key_file"),
        (
            identity("relay.key", "relay.key"),
            "has to hold certificates in PEM",
        ),
        (
            identity("none.pem", "relay.key"),
            "none.pem: there is no such file",
        ),
        (
            identity("relay.pem", "none.key"),
            "none.key: there is no such file",
        ),
        (identity("relay.pem", "."), "it is a directory"),
    ] {
        let said = refused(&server, &settings);
        assert!(said.contains(wanted), "{said}");
        assert!(said.contains("[nats] "), "{said}");
    }
    let missing = with_tls(&server, &files.path("none.pem"), &[]);
    let said = refused(&server, &missing);
    assert!(
        said.contains("[nats] ca_file") && said.contains("no such file"),
        "{said}"
    );
    unreadable(&server, &files, &right);
}

/// The system's superuser may read all files, and sees nothing of this.
fn unreadable(server: &Server, files: &Files, settings: &Settings) {
    use std::os::unix::fs::PermissionsExt;
    let key = files.path("relay.key");
    let nobody = std::fs::Permissions::from_mode(0o000);
    std::fs::set_permissions(&key, nobody).expect("changed");
    if std::fs::read(&key).is_ok() {
        return;
    }
    let said = refused(server, settings);
    assert!(
        said.contains("[nats] key_file") && said.contains("may not read it; chown it"),
        "{said}"
    );
}

/// A server with a configuration file.
pub(super) fn configured(files: &Files, content: &str) -> Option<Server> {
    let path = shown(&files.put("nats.conf", content));
    Server::start_with(&["--jetstream", "--config", &path])
}

/// The rights of docs/security.md, and no others.
pub(super) const RIGHTS: [&[&str]; 2] = [
    &[
        "$JS.API.>",
        "$JS.FC.>",
        "$KV.segment-relay-state.>",
        "segment-relay.>",
    ],
    &["segment-relay.>", "_INBOX.>"],
];

fn user_settings(user: &str, password: &str) -> Settings {
    vec![("USER", user.to_owned()), ("PASSWORD", password.to_owned())]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_needs_its_password_and_the_rights_that_are_documented() {
    let files = Files::new();
    let rights = RIGHTS.map(|subjects| format!("{subjects:?}"));
    let content = format!(
        "authorization {{ users: [\n\
         {{ user: relay, password: \"planted-password\", permissions: {{ publish: {}, subscribe: {} }} }}\n\
         {{ user: stranger, password: \"planted-password\", permissions: {{ publish: [\"a\"], subscribe: [\"_INBOX.>\"] }} }}\n\
         ] }}\n",
        rights[0], rights[1]
    );
    let Some(mut server) = configured(&files, &content) else {
        return;
    };
    let working = Working::start(&server, &user_settings("relay", "planted-password")).await;
    working.delivers(1).await;
    assert_eq!(
        working
            .relay
            .log
            .count(|line| line.contains("Permissions Violation")),
        0
    );

    for (settings, wanted) in [
        (
            user_settings("relay", "planted-other"),
            "they refuse [nats] user with this password",
        ),
        (
            vec![("TOKEN", "planted-token".to_owned())],
            "they refuse [nats] token",
        ),
        (
            Vec::new(),
            "set [nats] credentials_file, user with password, or token",
        ),
        (
            user_settings("stranger", "planted-password"),
            "needs the rights to publish to $JS.API.>",
        ),
    ] {
        let said = refused(&server, &settings);
        assert!(said.contains(wanted), "{said}");
    }
    server.kill();
    server.run();
    working.delivers_again(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_lets_a_relay_in() {
    let files = Files::new();
    let content = "authorization { token: \"planted-token\" }\n";
    let Some(server) = configured(&files, content) else {
        return;
    };
    let token = |token: &str| vec![("TOKEN", token.to_owned())];
    Working::start(&server, &token("planted-token"))
        .await
        .delivers(1)
        .await;
    let said = refused(&server, &token("planted-other"));
    assert!(said.contains("they refuse [nats] token"), "{said}");
}
