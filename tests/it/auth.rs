//! Who may do what: tokens and permissions.

use std::{collections::BTreeSet, str::FromStr};

use prost::Message;
use segment_relay::{
    grpc::{Need, RPCS},
    permission::Permission,
    proto::{CaptureRequest, CreateIntegrationRequest},
};
use sha2::{Digest, Sha256};
use tokio_stream::StreamExt;
use tonic::{Code, Request, Status, Streaming, metadata::MetadataValue, transport::Channel};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::harness::{World, acme, reason, worked_example};

/// One caller for each permission, named after it; `all` has all, `scoped` too, but
/// for the integration `mine` alone.
pub(crate) fn callers() -> String {
    let all: Vec<_> = Permission::ALL.iter().map(|one| one.as_str()).collect();
    let mut settings = String::new();
    let rows = Permission::ALL
        .iter()
        .map(|one| (one.as_str(), vec![one.as_str()], ""))
        .chain([
            ("all", all.clone(), ""),
            ("scoped", all, "integrations = [\"mine\"]\n"),
        ]);
    for (name, permissions, more) in rows {
        let hash = hex::encode(Sha256::digest(token(name)));
        settings.push_str(&format!(
            "[[callers]]\nname = \"{name}\"\ntoken_sha256 = [\"{hash}\"]\n\
             permissions = {permissions:?}\n{more}"
        ));
    }
    settings
}

pub(crate) fn token(name: &str) -> String {
    format!("srt1_planted-token-of-{name}")
}

/// A request with somebody's token.
pub(crate) fn by<T>(name: &str, message: T) -> Request<T> {
    with(&format!("Bearer {}", token(name)), message)
}

/// A request with this metadata.
pub(crate) fn with<T>(authorization: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::from_str(authorization).expect("ASCII");
    request.metadata_mut().insert("authorization", value);
    request
}

/// Calls any rpc with an encoded message; its answers are not read yet.
async fn begin(
    channel: &Channel,
    path: &str,
    request: Request<Vec<u8>>,
) -> Result<Streaming<Raw>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.expect("connected");
    let path = http::uri::PathAndQuery::from_str(path).expect("a path");
    let request = request.map(|message| tokio_stream::once(Raw(message)));
    let codec = tonic_prost::ProstCodec::<Raw, Raw>::default();
    Ok(grpc.streaming(request, path, codec).await?.into_inner())
}

/// Calls any rpc; returns how it began.
pub(crate) async fn call(
    world: &World,
    path: &str,
    request: Request<Vec<u8>>,
) -> Result<(), Status> {
    call_over(&world.channel, path, request).await
}

/// The same over another connection.
pub(crate) async fn call_over(
    channel: &Channel,
    path: &str,
    request: Request<Vec<u8>>,
) -> Result<(), Status> {
    let mut answers = begin(channel, path, request).await?;
    // A watch says nothing until something happens: it has begun with its headers.
    if path.ends_with("/WatchDeliveries") {
        return Ok(());
    }
    answers.message().await.map(drop)
}

/// A message that is encoded already, or whose content does not matter.
#[derive(Clone, Debug, Default)]
struct Raw(Vec<u8>);

impl Message for Raw {
    fn encode_raw(&self, buffer: &mut impl prost::bytes::BufMut) {
        buffer.put_slice(&self.0);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: prost::encoding::WireType,
        buffer: &mut impl prost::bytes::Buf,
        context: prost::encoding::DecodeContext,
    ) -> Result<(), prost::DecodeError> {
        prost::encoding::skip_field(wire_type, tag, buffer, context)
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

/// The paths of all rpcs, as the server describes itself.
async fn reflected(world: &World) -> BTreeSet<String> {
    let mut client = ServerReflectionClient::new(world.channel.clone());
    let ask = |message| {
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(message),
        };
        by("capture", tokio_stream::once(request))
    };
    let mut answers = client
        .server_reflection_info(ask(MessageRequest::ListServices(String::new())))
        .await
        .expect("answered")
        .into_inner();
    let answer = answers.next().await.expect("one").expect("no error");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let mut paths = BTreeSet::new();
    for service in list.service {
        let mut answers = client
            .server_reflection_info(ask(MessageRequest::FileContainingSymbol(
                service.name.clone(),
            )))
            .await
            .expect("answered")
            .into_inner();
        let answer = answers.next().await.expect("one").expect("no error");
        let Some(MessageResponse::FileDescriptorResponse(files)) = answer.message_response else {
            panic!("{answer:?}");
        };
        for file in files.file_descriptor_proto {
            let file = prost_types::FileDescriptorProto::decode(&file[..]).expect("a descriptor");
            for described in &file.service {
                for method in &described.method {
                    let (package, name) = (file.package(), described.name());
                    paths.insert(format!("/{package}.{name}/{}", method.name()));
                }
            }
        }
    }
    paths
}

#[tokio::test]
async fn every_rpc_of_the_schema_needs_what_the_table_and_the_readme_say() {
    let world = World::with(&callers()).await;
    let readme = include_str!("../../README.md");
    let mut walked = 0;
    for path in reflected(&world).await {
        if path.starts_with("/grpc.health.v1.") {
            let open = call(&world, &path, Request::new(Vec::new())).await;
            open.expect("health stays open");
            continue;
        }
        let nobody = call(&world, &path, Request::new(Vec::new())).await;
        let nobody = nobody.expect_err("somebody has to call");
        assert_eq!(nobody.code(), Code::Unauthenticated, "{path}");
        if path.starts_with("/grpc.reflection.") {
            continue;
        }
        let listed = RPCS.iter().find(|(known, _)| *known == path);
        let Some((_, Need::Permission(needed))) = listed else {
            panic!("{path} is not in the table of grpc/rpcs.rs, or needs no permission");
        };
        let rpc = path.rsplit('/').next().expect("a name");
        let row = format!("| `{rpc}` | `{needed}` |");
        assert!(readme.contains(&row), "{row} is missing in README.md");
        for caller in Permission::ALL {
            let answer = call(&world, &path, by(caller.as_str(), Vec::new())).await;
            let refused = answer
                .err()
                .filter(|status| status.code() == Code::PermissionDenied);
            assert_eq!(
                refused.is_none(),
                caller == *needed,
                "{caller} calls {path}"
            );
            if let Some(refused) = refused {
                assert_eq!(reason(&refused), "PERMISSION_MISSING");
                assert!(refused.message().contains(needed.as_str()), "{refused:?}");
            }
        }
        walked += 1;
    }
    assert_eq!(
        walked,
        RPCS.len(),
        "the table has rpcs that the schema has not"
    );
    world.stop().await;
}

#[tokio::test]
async fn tokens_that_are_wrong_missing_cut_or_given_twice_let_nobody_in() {
    let world = World::with(&callers()).await;
    let path = "/jebbit.segmentrelay.v1.IntegrationService/ListIntegrations";
    let good = token("read");
    let cut = &good[..good.len() - 1];
    for (authorization, word) in [
        (format!("Bearer {cut}"), "TOKEN_UNKNOWN"),
        (format!("Bearer {good}x"), "TOKEN_UNKNOWN"),
        (format!("Bearer {}", good.to_uppercase()), "TOKEN_UNKNOWN"),
        (
            format!("Bearer {}", hex::encode(Sha256::digest(&good))),
            "TOKEN_UNKNOWN",
        ),
        ("Bearer a.b.c".to_owned(), "TOKEN_UNKNOWN"),
        (format!("Basic {good}"), "CREDENTIALS_MALFORMED"),
        (good.clone(), "CREDENTIALS_MALFORMED"),
        ("Bearer ".to_owned(), "CREDENTIALS_MALFORMED"),
        (format!("Bearer {good} {good}"), "CREDENTIALS_MALFORMED"),
        (
            format!("Bearer {}", "x".repeat(9_000)),
            "CREDENTIALS_MALFORMED",
        ),
    ] {
        let refused = call(&world, path, with(&authorization, Vec::new())).await;
        let refused = refused.expect_err("refused");
        assert_eq!(refused.code(), Code::Unauthenticated);
        assert_eq!(reason(&refused), word, "{authorization}");
        assert!(!refused.message().contains("planted"), "{refused:?}");
    }
    let mut twice = by("read", Vec::new());
    let other = MetadataValue::from_str(&format!("Bearer {}", token("all"))).expect("ASCII");
    twice.metadata_mut().append("authorization", other);
    let refused = call(&world, path, twice).await.expect_err("refused");
    assert_eq!(reason(&refused), "CREDENTIALS_MALFORMED");
    for good in [format!("bearer {good}"), format!("BEARER  {good}")] {
        call(&world, path, with(&good, Vec::new()))
            .await
            .expect("the scheme has no case");
    }
    world.stop().await;
}

#[tokio::test]
async fn a_capture_only_token_changes_and_reads_nothing() {
    let world = World::with(&callers()).await;
    let created = CreateIntegrationRequest {
        integration: Some(acme()),
    };
    let mut integrations = world.integrations();
    let refused = integrations
        .create_integration(by("capture", created.clone()))
        .await;
    assert_eq!(refused.expect_err("refused").code(), Code::PermissionDenied);
    integrations
        .create_integration(by("integrations", created))
        .await
        .expect("created");
    let request = CaptureRequest {
        integration_id: "acme".into(),
        capture: Some(worked_example()),
        ..Default::default()
    };
    let accepted = world.relay().capture(by("capture", request)).await;
    accepted.expect("accepted");
    world.arrived(2).await;
    world.stop().await;
}
