//! Clients at a terminal say what is wrong with the way to the relay; probes work over TLS
//! and over Unix sockets.

use std::{
    path::Path,
    process::{Command, Output},
};

use segment_relay::proto::ListIntegrationsRequest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::{
    certificates::{Authority, Files},
    command::{stderr, stdout},
    harness::World,
    process::{Process, lasting_sandbox},
    wire::within,
};

/// Runs `segment-relay health` against an address.
async fn health(address: &str, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_segment-relay"));
    command.args(["health", "--address", address]).args(more);
    let run = tokio::task::spawn_blocking(move || command.output());
    within(run).await.expect("no panic").expect("runs")
}

async fn is_told(address: &str, more: &[&str], expected: &str) {
    let output = health(address, more).await;
    assert!(!output.status.success(), "{address}");
    let told = stderr(&output);
    assert!(told.contains(expected), "{address}: {told}");
    assert!(told.contains(address), "the address: {told}");
}

fn path(file: &Path) -> &str {
    file.to_str().expect("UTF-8")
}

#[tokio::test]
async fn a_client_is_told_what_its_tls_lacks_and_a_probe_with_a_certificate_works() {
    let (ca, clients) = (Authority::new(), Authority::new());
    let files = Files::new();
    files.put_pair("server", &ca.issue(&["localhost"]));
    files.put("client-ca.pem", &clients.pem());
    let world = World::with(&files.server_settings("required")).await;
    let port = world.address.port();
    let (plain, tls) = (
        format!("http://localhost:{port}"),
        format!("https://localhost:{port}"),
    );
    let ca_file = files.put("ca.pem", &ca.pem());
    let pair = clients.issue(&["probe.internal"]);
    let certificate = files.put("probe.pem", &pair.certificate);
    let key = files.put("probe.key", &pair.key);
    is_told(&plain, &[], "use https://").await;
    let trusting = ["--ca-file", path(&ca_file)];
    is_told(&tls, &trusting, "--certificate-file and --key-file").await;
    let stranger = files.put("stranger.pem", &Authority::new().pem());
    is_told(&tls, &["--ca-file", path(&stranger)], "--ca-file").await;
    let known = [
        "--ca-file",
        path(&ca_file),
        "--certificate-file",
        path(&certificate),
        "--key-file",
        path(&key),
    ];
    let output = health(&tls, &known).await;
    assert_eq!(stdout(&output).trim(), "SERVING", "{}", stderr(&output));
    world.stop().await;
}

#[tokio::test]
async fn a_client_is_told_of_ports_that_are_no_relays() {
    let world = World::start().await;
    let relay = format!("https://127.0.0.1:{}", world.address.port());
    is_told(&relay, &[], "use http://").await;
    world.stop().await;

    let web = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = web.local_addr().expect("an address").port();
    let serving = tokio::spawn(async move {
        loop {
            let (mut peer, _) = web.accept().await.expect("accepted");
            let mut asked = [0; 4_096];
            let _ = peer.read(&mut asked).await;
            let answer = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";
            let _ = peer.write_all(answer).await;
            // To its end: a close with unread bytes would take the answer with it.
            while matches!(peer.read(&mut asked).await, Ok(1..)) {}
        }
    });
    for scheme in ["http", "https"] {
        is_told(
            &format!("{scheme}://127.0.0.1:{port}"),
            &[],
            "HTTP/1 server",
        )
        .await;
    }
    serving.abort();

    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = silent.local_addr().expect("an address").port();
    for scheme in ["http", "https"] {
        let address = format!("{scheme}://127.0.0.1:{port}");
        is_told(&address, &["--timeout", "300ms"], "nothing was said").await;
    }
    for (other, remedy) in [
        ("grpc://127.0.0.1:1", "http://127.0.0.1:1"),
        ("unix:", "unix:/run/relay.sock"),
    ] {
        let output = health(other, &[]).await;
        assert_eq!(output.status.code(), Some(2), "{other}");
        assert!(stderr(&output).contains(remedy), "{}", stderr(&output));
    }
    let output = health("127.0.0.1:1", &["--timeout", "1h"]).await;
    assert!(stderr(&output).contains("500ms"), "{}", stderr(&output));
}

#[tokio::test]
async fn a_relay_serves_on_a_unix_socket() {
    let (_sandbox, urls) = lasting_sandbox().await;
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("relay.sock");
    let address = format!("unix:{}", socket.display());
    let outbox = directory.path().join("outbox");
    is_told(&address, &[], "No such file").await;
    let mut relay = Process::start_on(&outbox, &urls, &address).await;
    let output = health(&address, &["--timeout", "5s"]).await;
    assert_eq!(stdout(&output).trim(), "SERVING", "{}", stderr(&output));
    // Another client, by tonic's own connector.
    let mut integrations =
        segment_relay::proto::integration_service_client::IntegrationServiceClient::new(
            relay.channel.clone(),
        );
    let request = ListIntegrationsRequest::default();
    integrations
        .list_integrations(request)
        .await
        .expect("works");
    // One that was killed leaves its socket, which the next one takes over.
    relay.kill();
    assert!(socket.exists());
    let mut relay = Process::start_on(&outbox, &urls, &address).await;
    let output = health(&address, &["--timeout", "5s"]).await;
    assert_eq!(stdout(&output).trim(), "SERVING", "{}", stderr(&output));
    relay.terminate().await;
    assert!(!socket.exists(), "it goes with the relay");
}
