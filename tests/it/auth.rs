//! Who may do what: tokens, permissions, scopes.

use std::{collections::BTreeSet, str::FromStr};

use prost::Message;
use segment_relay::{
    grpc::{Need, RPCS},
    permission::Permission,
    proto::{
        self, CaptureBatchRequest, CaptureRequest, CaptureStreamRequest, CreateIntegrationRequest,
        DataRegion, DeadLetterFilter, DeleteIntegrationRequest, DiscardDeadLettersRequest,
        EraseSubjectRequest, GetCaptureRequest, GetIntegrationRequest, Integration,
        ListDeadLettersRequest, ListErasureReceiptsRequest, ListIntegrationsRequest,
        PreviewCaptureRequest, ReplayDeadLettersRequest, TestIntegrationRequest,
        UpdateIntegrationRequest, WatchDeliveriesRequest, erase_subject_request::Subject,
    },
};
use sha2::{Digest, Sha256};
use tokio_stream::StreamExt;
use tonic::{Code, Request, Status, Streaming, metadata::MetadataValue, transport::Channel};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::harness::{World, acme, credential, numbered, reason, worked_example};

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
    let mut answers = begin(&world.channel, path, request).await?;
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

/// An rpc with a request that names an integration.
fn naming(id: &str) -> Vec<(&'static str, Vec<u8>)> {
    let integration = Some(Integration {
        integration_id: id.into(),
        ..acme()
    });
    let capture = Some(worked_example());
    let filter = Some(DeadLetterFilter {
        integration_id: id.into(),
        ..Default::default()
    });
    let integration_id = id.to_owned();
    vec![
        (
            "SegmentRelay/Capture",
            CaptureRequest {
                integration_id: id.into(),
                capture: capture.clone(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "SegmentRelay/CaptureBatch",
            CaptureBatchRequest {
                integration_id: id.into(),
                captures: vec![worked_example()],
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "SegmentRelay/PreviewCapture",
            PreviewCaptureRequest {
                integration_id: id.into(),
                capture,
            }
            .encode_to_vec(),
        ),
        (
            "SegmentRelay/GetCapture",
            GetCaptureRequest {
                integration_id: id.into(),
                capture_id: "c".into(),
            }
            .encode_to_vec(),
        ),
        (
            "SegmentRelay/WatchDeliveries",
            WatchDeliveriesRequest {
                integration_id: id.into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/CreateIntegration",
            CreateIntegrationRequest {
                integration: integration.clone(),
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/GetIntegration",
            GetIntegrationRequest {
                integration_id: id.into(),
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/UpdateIntegration",
            UpdateIntegrationRequest {
                integration,
                update_mask: None,
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/DeleteIntegration",
            DeleteIntegrationRequest {
                integration_id: id.into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "IntegrationService/TestIntegration",
            TestIntegrationRequest {
                integration_id: id.into(),
            }
            .encode_to_vec(),
        ),
        (
            "DeadLetterService/ListDeadLetters",
            ListDeadLettersRequest {
                integration_id: id.into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "DeadLetterService/ReplayDeadLetters",
            ReplayDeadLettersRequest {
                filter: filter.clone(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "DeadLetterService/DiscardDeadLetters",
            DiscardDeadLettersRequest {
                filter,
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "PrivacyService/EraseSubject",
            EraseSubjectRequest {
                subject: Some(Subject::Email("a@example.com".into())),
                integration_id,
            }
            .encode_to_vec(),
        ),
    ]
}

#[tokio::test]
async fn a_scoped_caller_touches_its_own_integrations_alone() {
    let world = World::with(&callers()).await;
    for id in ["mine", "acme"] {
        let integration = Some(Integration {
            integration_id: id.into(),
            ..acme()
        });
        let request = by("all", CreateIntegrationRequest { integration });
        let created = world.integrations().create_integration(request).await;
        created.expect("created");
    }
    // Also one that does not exist: nobody learns which do.
    for id in ["acme", "nobody"] {
        for (rpc, message) in naming(id) {
            let path = format!("/jebbit.segmentrelay.v1.{rpc}");
            let refused = call(&world, &path, by("scoped", message)).await;
            let refused = refused.expect_err(rpc);
            assert_eq!(refused.code(), Code::PermissionDenied, "{rpc}: {refused:?}");
            assert_eq!(reason(&refused), "INTEGRATION_OUT_OF_SCOPE");
        }
        // A stream goes on; the capture is refused.
        let request = CaptureStreamRequest {
            correlation_id: "1".into(),
            integration_id: id.into(),
            capture: Some(worked_example()),
        };
        let stream = by("scoped", tokio_stream::once(request));
        let mut results = world
            .relay()
            .capture_stream(stream)
            .await
            .expect("begun")
            .into_inner();
        let result = results.message().await.expect("no error").expect("one");
        let error = result
            .result
            .and_then(|result| result.error)
            .expect("refused");
        assert_eq!(error.reason, "INTEGRATION_OUT_OF_SCOPE");
    }
    for (rpc, message) in naming("mine") {
        let path = format!("/jebbit.segmentrelay.v1.{rpc}");
        let answer = call(&world, &path, by("scoped", message)).await;
        let code = answer.err().map(|status| status.code());
        assert_ne!(code, Some(Code::PermissionDenied), "{rpc}");
    }
    // Erasing everywhere is more than its own.
    let everywhere = EraseSubjectRequest {
        subject: Some(Subject::Email("a@example.com".into())),
        integration_id: String::new(),
    };
    let mut privacy =
        proto::privacy_service_client::PrivacyServiceClient::new(world.channel.clone());
    let refused = privacy
        .erase_subject(by("scoped", everywhere.clone()))
        .await;
    assert_eq!(refused.expect_err("refused").code(), Code::PermissionDenied);
    privacy
        .erase_subject(by("all", everywhere))
        .await
        .expect("erased");
    // Lists show what is its own.
    let listed = world
        .integrations()
        .list_integrations(by("scoped", ListIntegrationsRequest::default()))
        .await
        .expect("listed")
        .into_inner();
    assert!(
        listed
            .integrations
            .iter()
            .all(|one| one.integration_id == "mine")
    );
    let receipts = privacy
        .list_erasure_receipts(by("scoped", ListErasureReceiptsRequest::default()))
        .await
        .expect("listed")
        .into_inner();
    let of: Vec<_> = receipts
        .receipts
        .iter()
        .map(|one| one.integration_id.as_str())
        .collect();
    assert_eq!(of, ["mine"]);
    world.stop().await;
}

#[tokio::test]
async fn a_scoped_caller_sees_and_moves_no_dead_letter_and_no_change_of_others() {
    let world = World::with(&callers()).await;
    let mut dead_letters =
        proto::dead_letter_service_client::DeadLetterServiceClient::new(world.channel.clone());
    for id in ["mine", "acme"] {
        let integration = Some(Integration {
            integration_id: id.into(),
            ..acme()
        });
        let request = by("all", CreateIntegrationRequest { integration });
        world
            .integrations()
            .create_integration(request)
            .await
            .expect("created");
    }
    let watch = by("scoped", WatchDeliveriesRequest::default());
    let mut updates = world
        .relay()
        .watch_deliveries(watch)
        .await
        .expect("watches")
        .into_inner();
    world.misbehave(segment_relay::sandbox::Rule {
        status: Some(400),
        ..Default::default()
    });
    for id in ["acme", "mine"] {
        let request = CaptureRequest {
            integration_id: id.into(),
            capture: Some(numbered(1)),
            wait_for: proto::WaitFor::Delivered.into(),
        };
        world
            .relay()
            .capture(by("all", request))
            .await
            .expect("accepted");
    }
    let first = updates.message().await.expect("no error").expect("one");
    assert_eq!(first.integration_id, "mine");
    let list = |name: &str| by(name, ListDeadLettersRequest::default());
    let all = dead_letters
        .list_dead_letters(list("all"))
        .await
        .expect("listed")
        .into_inner();
    assert_eq!(all.dead_letters.len(), 4);
    let own = dead_letters
        .list_dead_letters(list("scoped"))
        .await
        .expect("listed")
        .into_inner();
    assert_eq!(own.dead_letters.len(), 2);
    // Ids of others are as if they were not there.
    let ids: Vec<_> = all
        .dead_letters
        .iter()
        .map(|one| one.dead_letter_id.clone())
        .collect();
    let discard = DiscardDeadLettersRequest {
        dead_letter_ids: ids,
        ..Default::default()
    };
    let gone = dead_letters
        .discard_dead_letters(by("scoped", discard))
        .await
        .expect("discarded");
    assert_eq!(gone.into_inner().event_count, 2);
    let everything = ReplayDeadLettersRequest {
        filter: Some(DeadLetterFilter::default()),
        ..Default::default()
    };
    let replayed = dead_letters
        .replay_dead_letters(by("scoped", everything))
        .await
        .expect("replayed");
    assert_eq!(replayed.into_inner().event_count, 0);
    let left = dead_letters
        .list_dead_letters(list("all"))
        .await
        .expect("listed")
        .into_inner();
    assert!(
        left.dead_letters
            .iter()
            .all(|one| one.integration_id == "acme")
    );
    assert_eq!(left.dead_letters.len(), 2);
    world.stop().await;
}

#[tokio::test]
async fn eu_data_goes_nowhere_without_eu_credentials() {
    let world = World::start().await;
    world.create(acme()).await;
    let capture = proto::Capture {
        data_region: DataRegion::Eu.into(),
        ..worked_example()
    };
    let refused = world
        .capture(capture.clone(), proto::WaitFor::Accepted)
        .await;
    let refused = refused.expect_err("refused");
    assert_eq!(reason(&refused), "REGION_NOT_CONFIGURED");
    assert_eq!(world.sandbox.stats().requests, 0);

    // Accepted while there were credentials, which then go: it waits, and goes
    // nowhere else.
    let both = Integration {
        integration_id: "acme".into(),
        credentials: vec![
            credential(DataRegion::Eu, "eu-write-key-0001"),
            credential(DataRegion::NonEu, "write-key-of-acme-0001"),
        ],
        ..Integration::default()
    };
    let update = |integration: Integration| UpdateIntegrationRequest {
        integration: Some(integration),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["credentials".into()],
        }),
    };
    let mut integrations = world.integrations();
    integrations
        .update_integration(update(both))
        .await
        .expect("updated");
    world.misbehave(segment_relay::sandbox::Rule {
        status: Some(503),
        ..Default::default()
    });
    world.accept(capture.clone()).await;
    integrations
        .update_integration(update(acme()))
        .await
        .expect("updated");
    world.behave();
    world.deliver(numbered(1)).await;
    let arrived = world.sandbox.entries();
    let regions: BTreeSet<_> = arrived
        .iter()
        .filter(|entry| matches!(entry.outcome, segment_relay::sandbox::Outcome::Accepted))
        .map(|entry| entry.request.region)
        .collect();
    assert!(
        !regions.contains(&segment_relay::sandbox::Region::Eu),
        "{regions:?}"
    );
    assert!(world.sandbox.stats().events_accepted == 2);
    world.stop().await;
}
