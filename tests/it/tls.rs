//! TLS of the gRPC server, and towards Segment.

use std::{sync::Arc, time::Duration};

use segment_relay::proto::{
    DeliveryReason, DeliveryState, ListIntegrationsRequest,
    integration_service_client::IntegrationServiceClient,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::{
    certificates::{Authority, Certified, Files},
    harness::{PATIENCE, World, acme, reason, worked_example},
    receiver::Receiver,
};

/// Lists the integrations over a connection of its own.
async fn list(world: &World, ca: &Authority, client: Option<&Certified>) -> Result<(), Problem> {
    let mut tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca.pem()))
        .domain_name("relay.internal");
    if let Some(pair) = client {
        tls = tls.identity(Identity::from_pem(&pair.certificate, &pair.key));
    }
    let endpoint = Endpoint::from_shared(format!("https://{}", world.address)).expect("a URL");
    let endpoint = endpoint.tls_config(tls).expect("fine");
    let channel = endpoint.connect().await.map_err(|_| Problem::Handshake)?;
    list_over(channel).await
}

async fn list_over(channel: Channel) -> Result<(), Problem> {
    let mut integrations = IntegrationServiceClient::new(channel);
    let request = ListIntegrationsRequest::default();
    match integrations.list_integrations(request).await {
        Ok(_) => Ok(()),
        // TLS 1.3 tells a client that its certificate is refused after the handshake.
        Err(status) if status.code() == Code::Unavailable || status.code() == Code::Unknown => {
            Err(Problem::Handshake)
        }
        Err(status) => Err(Problem::Call(status)),
    }
}

#[derive(Debug)]
enum Problem {
    Handshake,
    Call(Status),
}

#[tokio::test]
async fn a_tls_server_is_trusted_by_its_own_ca_and_name_alone_and_speaks_nothing_else() {
    let (ca, stranger) = (Authority::new(), Authority::new());
    let files = Files::new();
    files.put_pair("server", &ca.issue(&["relay.internal"]));
    let world = World::with(&files.server_settings("required")).await;
    list(&world, &ca, None).await.expect("served");
    let refused = list(&world, &stranger, None).await;
    assert!(matches!(refused, Err(Problem::Handshake)), "{refused:?}");
    let plain = list_over(world.channel.clone()).await;
    assert!(matches!(plain, Err(Problem::Handshake)), "{plain:?}");
    world.stop().await;

    for unfit in [
        ca.issue(&["other.internal"]),
        ca.issue_expired(&["relay.internal"]),
    ] {
        files.put_pair("server", &unfit);
        let world = World::with(&files.server_settings("required")).await;
        let refused = list(&world, &ca, None).await;
        assert!(matches!(refused, Err(Problem::Handshake)), "{refused:?}");
        world.stop().await;
    }
}

#[tokio::test]
async fn certificates_are_reloaded_when_their_files_change() {
    let (first, second) = (Authority::new(), Authority::new());
    let files = Files::new();
    files.put_pair("server", &first.issue(&["relay.internal"]));
    let world = World::with(&files.server_settings("required")).await;
    list(&world, &first, None).await.expect("served");

    files.put_pair("server", &second.issue(&["relay.internal"]));
    let reloaded = tokio::time::timeout(PATIENCE, async {
        while list(&world, &second, None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    reloaded.await.expect("the new one is served");
    let former = list(&world, &first, None).await;
    assert!(matches!(former, Err(Problem::Handshake)), "{former:?}");
    world.stop().await;
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_a_changed_client_ca_holds_for_the_next_connection() {
    let (ca, first, second) = (Authority::new(), Authority::new(), Authority::new());
    let files = Files::new();
    files.put_pair("server", &ca.issue(&["relay.internal"]));
    files.put("client-ca.pem", &first.pem());
    let world = World::with(&files.server_settings("required")).await;
    let (old, new) = (first.issue(&["a.internal"]), second.issue(&["a.internal"]));
    list(&world, &ca, Some(&old)).await.expect("served");

    // Half of the key has been written, and the CA's file is empty: looked at several times.
    let key = std::fs::read_to_string(files.path("server.key")).expect("read");
    files.put("server.key", &key[..key.len() / 2]);
    files.put("client-ca.pem", "");
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        list(&world, &ca, Some(&old)).await.expect("as before");
        let refused = list(&world, &ca, Some(&new)).await;
        assert!(matches!(refused, Err(Problem::Handshake)), "{refused:?}");
    }

    files.put("server.key", &key);
    files.put("client-ca.pem", &second.pem());
    let reloaded = tokio::time::timeout(PATIENCE, async {
        while list(&world, &ca, Some(&new)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    reloaded.await.expect("the new CA's clients are taken");
    let former = list(&world, &ca, Some(&old)).await;
    assert!(matches!(former, Err(Problem::Handshake)), "{former:?}");
    world.stop().await;
}

#[tokio::test]
async fn clients_are_known_by_the_names_in_their_certificates() {
    let (ca, clients, stranger) = (Authority::new(), Authority::new(), Authority::new());
    let files = Files::new();
    files.put_pair("server", &ca.issue(&["relay.internal"]));
    files.put("client-ca.pem", &clients.pem());
    let settings = format!(
        "{}[[callers]]\nname = \"reader\"\npermissions = [\"read\"]\n\
         certificates = [\"reader.internal\", \"spiffe://jebbit/reader\"]\n",
        files.server_settings("required")
    );
    let world = World::with(&settings).await;
    for good in [
        "reader.internal",
        "READER.internal",
        "spiffe://jebbit/reader",
    ] {
        let pair = clients.issue(&["host-7.internal", good]);
        list(&world, &ca, Some(&pair)).await.expect(good);
    }
    for unknown in [
        "writer.internal",
        // Of the wrong kind, or another case.
        "uri:reader.internal",
        "uri:dns:reader.internal",
        "spiffe://jebbit/Reader",
    ] {
        let pair = clients.issue(&["host-7.internal", unknown]);
        match list(&world, &ca, Some(&pair)).await {
            Err(Problem::Call(status)) => {
                assert_eq!(status.code(), Code::Unauthenticated);
                assert_eq!(reason(&status), "CERTIFICATE_UNKNOWN", "{unknown}");
            }
            other => panic!("{unknown}: {other:?}"),
        }
    }
    for unfit in [
        Some(stranger.issue(&["reader.internal"])),
        Some(clients.issue_expired(&["reader.internal"])),
        None,
    ] {
        let refused = list(&world, &ca, unfit.as_ref()).await;
        assert!(matches!(refused, Err(Problem::Handshake)), "{refused:?}");
    }
    world.stop().await;

    // Where certificates are optional, who has none is nobody.
    let optional = settings.replace("\"required\"", "\"optional\"");
    let world = World::with(&optional).await;
    let pair = clients.issue(&["reader.internal"]);
    list(&world, &ca, Some(&pair)).await.expect("known");
    match list(&world, &ca, None).await {
        Err(Problem::Call(status)) => assert_eq!(reason(&status), "CREDENTIALS_MISSING"),
        other => panic!("{other:?}"),
    }
    world.stop().await;
}

#[tokio::test]
async fn a_peer_that_does_not_begin_to_speak_is_closed() {
    let files = Files::new();
    files.put_pair("server", &Authority::new().issue(&["relay.internal"]));
    let timeout = "[server]\nhandshake_timeout_ms = 100\n";
    // The beginning of a TLS record is no handshake either.
    let plain = (timeout.to_owned(), &b"PRI * HTTP"[..]);
    let tls = (
        format!("{timeout}{}", files.server_settings("required")),
        &[22, 3, 1, 2, 0, 1, 0][..],
    );
    for (settings, begin) in [plain, tls] {
        let world = World::with(&settings).await;
        for begin in [&b""[..], begin] {
            let mut peer = TcpStream::connect(world.address).await.expect("connects");
            peer.write_all(begin).await.expect("written");
            let mut all = Vec::new();
            let closed = tokio::time::timeout(PATIENCE, peer.read_to_end(&mut all));
            // A reset is as good as an end.
            let _ = closed.await.expect("closed in time");
        }
        world.stop().await;
    }
}

/// Ends TLS before a sandbox's endpoint; returns the port.
async fn front(pair: &Certified, behind: String) -> u16 {
    let acceptor = acceptor(pair, &[]);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, behind) = (acceptor.clone(), behind.clone());
            tokio::spawn(async move {
                let Ok(mut tls) = acceptor.accept(tcp).await else {
                    return;
                };
                let mut plain = TcpStream::connect(behind).await.expect("connects");
                let _ = copy_bidirectional(&mut tls, &mut plain).await;
            });
        }
    });
    port
}

/// What ends TLS with this certificate and speaks these protocols.
pub(crate) fn acceptor(pair: &Certified, protocols: &[&[u8]]) -> TlsAcceptor {
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let chain = CertificateDer::pem_slice_iter(pair.certificate.as_bytes());
    let chain = chain.collect::<Result<_, _>>().expect("certificates");
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).expect("a key");
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("fits");
    let protocols = protocols.iter().map(|protocol| protocol.to_vec());
    config.alpn_protocols = protocols.collect();
    TlsAcceptor::from(Arc::new(config))
}

#[tokio::test]
async fn segment_is_trusted_by_a_good_certificate_alone() {
    let (ca, stranger) = (Authority::new(), Authority::new());
    let files = Files::new();
    let ca_file = files.put("segment-ca.pem", &ca.pem());
    for (pair, good) in [
        (ca.issue(&["localhost"]), true),
        (ca.issue(&["api.segment.io"]), false),
        (ca.issue_expired(&["localhost"]), false),
        (stranger.issue(&["localhost"]), false),
    ] {
        let settings = format!("[segment]\nca_file = \"{}\"\n", ca_file.display());
        let world = World::with_front(&settings, async |endpoint| {
            let port = front(&pair, endpoint).await;
            format!("https://localhost:{port}/v1/batch")
        });
        let world = world.await;
        world.create(acme()).await;
        if good {
            world.deliver(worked_example()).await;
            assert_eq!(world.sandbox.stats().events_accepted, 2);
        } else {
            let result = world.accept(worked_example()).await;
            let id = result.capture_id;
            let error = tokio::time::timeout(PATIENCE, async {
                loop {
                    let status = world.status(&id).await.expect("known");
                    let event = &status.result.as_ref().expect("a result").events[0];
                    if event.reason() == DeliveryReason::Network {
                        return event.last_error.clone();
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            });
            let error = error.await.expect("tried in time");
            assert!(error.contains("certificate"), "{error}");
            assert_eq!(world.sandbox.stats().requests, 0);
        }
        world.stop().await;
    }
}

#[tokio::test]
async fn no_redirect_is_followed_and_no_answer_is_read_without_end() {
    let (front, elsewhere) = (Receiver::start().await, Receiver::start().await);
    front.redirect_to(format!("http://{}/v1/batch", elsewhere.address));
    let world = World::with_front("", async |_| format!("http://{}/v1/batch", front.address)).await;
    world.create(acme()).await;
    let accepted = world.accept(worked_example()).await;
    front.wait_for(3).await;
    let status = world.status(&accepted.capture_id).await.expect("known");
    let event = &status.result.as_ref().expect("a result").events[0];
    assert_eq!(event.last_http_status, 307);
    assert!(
        elsewhere.received().is_empty(),
        "events and a write key went elsewhere"
    );
    world.stop().await;

    // The events were taken, the rest of the answer is of no interest.
    let endless = Receiver::start().await;
    endless.answer_without_end();
    let world = World::with_front("", async |_| format!("http://{}/v1/batch", endless.address));
    let world = world.await;
    world.create(acme()).await;
    let result = world.deliver(worked_example()).await;
    assert_eq!(result.events[0].state(), DeliveryState::Delivered);
    assert_eq!(result.events[0].attempt_count, 1);
    assert_eq!(endless.received().len(), 1);
    world.stop().await;
}
