//! Tokens of an issuer whose keys are fetched.

use std::time::Duration;

use tonic::Code;

use crate::{
    auth::{call, with},
    harness::{PATIENCE, World, reason},
    receiver::Receiver,
};

#[tokio::test]
async fn a_key_set_without_end_or_elsewhere_is_none() {
    let vectors: serde_json::Value =
        serde_json::from_str(include_str!("../vectors/jwt.json")).expect("JSON");
    let bearer = format!(
        "Bearer {}",
        vectors["tokens"]["RS256 2048"].as_str().expect("a token")
    );
    let (issuer, elsewhere) = (Receiver::start().await, Receiver::start().await);
    elsewhere.answer(&vectors["jwks"].to_string());
    let settings = format!(
        "[jwt]\nissuer = \"https://issuer.example\"\naudience = \"segment-relay\"\n\
         jwks_url = \"http://{}/jwks\"\n",
        issuer.address
    );
    let path = "/jebbit.segmentrelay.v1.IntegrationService/ListIntegrations";
    for endless in [true, false] {
        if endless {
            issuer.answer_without_end();
        } else {
            issuer.redirect_to(format!("http://{}/jwks", elsewhere.address));
        }
        // A set without end would be read until the time-out, which is later.
        let starts = tokio::time::timeout(Duration::from_secs(8), World::with(&settings));
        let world = starts.await.expect("started in time");
        let refused = call(&world, path, with(&bearer, Vec::new())).await;
        let refused = refused.expect_err("there are no keys");
        assert_eq!(reason(&refused), "TOKEN_KEYS_UNAVAILABLE");
        world.stop().await;
    }
    assert!(elsewhere.received().is_empty(), "a redirect was followed");
}

#[tokio::test]
async fn tokens_of_an_issuer_are_taken_once_its_keys_can_be_read() {
    let issuer = Receiver::start().await;
    let vectors: serde_json::Value =
        serde_json::from_str(include_str!("../vectors/jwt.json")).expect("JSON");
    // Its server has a fault when the relay starts.
    issuer.fail_with(&[500]);
    issuer.answer(&vectors["jwks"].to_string());
    let settings = format!(
        "[jwt]\nissuer = \"https://issuer.example\"\naudience = \"segment-relay\"\n\
         jwks_url = \"http://{}/jwks\"\nrefresh_interval_ms = 100\n",
        issuer.address
    );
    let world = World::with(&settings).await;
    let path = "/jebbit.segmentrelay.v1.IntegrationService/ListIntegrations";
    let token = vectors["tokens"]["RS256 2048"].as_str().expect("a token");
    let bearer = format!("Bearer {token}");
    let taken = async {
        while let Err(status) = call(&world, path, with(&bearer, Vec::new())).await {
            assert_eq!(reason(&status), "TOKEN_KEYS_UNAVAILABLE");
            assert_eq!(status.code(), Code::Unavailable);
            issuer.wait_for(2).await;
        }
    };
    tokio::time::timeout(PATIENCE, taken)
        .await
        .expect("taken in time");
    // Its scope is capture and read.
    let erase = "/jebbit.segmentrelay.v1.PrivacyService/EraseSubject";
    let refused = call(&world, erase, with(&bearer, Vec::new())).await;
    assert_eq!(refused.expect_err("refused").code(), Code::PermissionDenied);
    let cut = format!("Bearer {}", &token[..token.len() - 8]);
    let refused = call(&world, path, with(&cut, Vec::new()))
        .await
        .expect_err("refused");
    assert_eq!(reason(&refused), "TOKEN_REFUSED");
    world.stop().await;
}
