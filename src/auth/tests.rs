//! JWTs: which are taken, and which are not.

use std::{path::Path, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};

use super::*;
use crate::{
    config::{Endpoint, JwksSource, Jwt},
    permission::{Permission, Scope},
};

/// An issuer with one key.
struct Issuer {
    key: Ed25519KeyPair,
    kid: &'static str,
}

impl Issuer {
    fn new(kid: &'static str) -> Self {
        let key =
            Ed25519KeyPair::from_seed_unchecked(&crate::vault::random::<32>().expect("random"));
        Self {
            key: key.expect("a key"),
            kid,
        }
    }

    fn jwk(&self) -> Value {
        let x = URL_SAFE_NO_PAD.encode(self.key.public_key());
        json!({ "kty": "OKP", "crv": "Ed25519", "use": "sig", "kid": self.kid, "x": x })
    }

    fn sign(&self, claims: &Value) -> String {
        self.sign_with(&json!({ "alg": "EdDSA", "kid": self.kid }), claims)
    }

    fn sign_with(&self, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        let signature = self.key.sign(message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

fn claims() -> Value {
    json!({
        "iss": "https://issuer.example",
        "aud": ["other", "segment-relay"],
        "sub": "service-a",
        "scope": "openid capture read",
        "exp": now() + 60,
    })
}

fn now() -> i64 {
    crate::time::UnixMillis::now().0 / 1_000
}

fn changed(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn options(path: &Path) -> Jwt {
    Jwt {
        issuer: "https://issuer.example".into(),
        audience: "segment-relay".into(),
        jwks: JwksSource::File(path.to_owned()),
        refresh_interval: Duration::from_secs(3_600),
        permissions_claim: "scope".into(),
        integrations_claim: None,
    }
}

async fn verifier(path: &Path) -> JwtVerifier {
    let jwks = Jwks::open(JwksSource::File(path.to_owned())).await;
    JwtVerifier::new(options(path), jwks.expect("keys"))
}

fn put(directory: &tempfile::TempDir, keys: &[Value]) -> std::path::PathBuf {
    let path = directory.path().join("jwks.json");
    std::fs::write(&path, json!({ "keys": keys }).to_string()).expect("written");
    path
}

#[tokio::test]
async fn a_good_token_names_its_caller_and_nothing_else_does() {
    let directory = tempfile::tempdir().expect("a directory");
    let (issuer, stranger) = (Issuer::new("k1"), Issuer::new("k1"));
    let verifier = verifier(&put(&directory, &[issuer.jwk()])).await;
    let caller = verifier
        .verify(&issuer.sign(&claims()))
        .await
        .expect("good");
    assert_eq!(caller.name, "jwt:service-a");
    assert!(
        caller
            .permissions
            .iter()
            .copied()
            .eq([Permission::Capture, Permission::Read])
    );
    assert_eq!(caller.scope, Scope::All);

    let good = issuer.sign(&claims());
    let (message, signature) = good.rsplit_once('.').expect("three parts");
    let (_, payload) = message.split_once('.').expect("three parts");
    let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none","kid":"k1"}"#);
    let public = issuer.key.public_key().as_ref();
    let hmac_header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","kid":"k1"}"#);
    let hmac_message = format!("{hmac_header}.{payload}");
    let hmac_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, public);
    let forged = URL_SAFE_NO_PAD.encode(ring::hmac::sign(&hmac_key, hmac_message.as_bytes()));
    for (token, why) in [
        (
            issuer.sign(&changed("exp", json!(now() - 60))),
            "it has expired",
        ),
        (
            issuer.sign(&changed("nbf", json!(now() + 120))),
            "it is not valid yet",
        ),
        (
            issuer.sign(&changed("iss", json!("https://other.example"))),
            "it is another issuer's",
        ),
        (
            issuer.sign(&changed("iss", json!(["https://issuer.example"]))),
            "it is another issuer's",
        ),
        (
            issuer.sign(&changed(
                "iss",
                json!(["https://other.example", "https://issuer.example"]),
            )),
            "it is another issuer's",
        ),
        (
            issuer.sign(&changed("iss", json!({"https://issuer.example": 1}))),
            "it lacks one of exp, iss, aud and sub",
        ),
        (
            issuer.sign(&changed("sub", json!(["service-a"]))),
            "it is malformed",
        ),
        (
            issuer.sign(&changed("aud", json!("other"))),
            "it is meant for another audience",
        ),
        (
            issuer.sign(&changed("exp", Value::Null)),
            "it lacks one of exp, iss, aud and sub",
        ),
        (
            issuer.sign(&changed("aud", Value::Null)),
            "it lacks one of exp, iss, aud and sub",
        ),
        (
            issuer.sign(&changed("sub", json!(""))),
            "its sub is empty or too long",
        ),
        (stranger.sign(&claims()), "its signature is wrong"),
        (
            issuer.sign_with(&json!({ "alg": "EdDSA", "kid": "k2" }), &claims()),
            "its key is not the issuer's",
        ),
        (
            format!("{message}.{}", "A".repeat(signature.len())),
            "its signature is wrong",
        ),
        (format!("{none}.{payload}."), "it is malformed"),
        (
            format!("{hmac_message}.{forged}"),
            "its algorithm is not taken",
        ),
        (
            issuer.sign_with(&json!({ "alg": "RS256", "kid": "k1" }), &claims()),
            "its signature is wrong",
        ),
        (
            issuer.sign_with(
                &json!({ "alg": "EdDSA", "kid": "k1", "crit": ["exp"] }),
                &claims(),
            ),
            "it has extensions that are not known here",
        ),
        ("a.b.c".into(), "it is malformed"),
        ("..".into(), "it is malformed"),
    ] {
        assert_eq!(
            verifier.verify(&token).await,
            Err(AuthError::BadJwt(why)),
            "{token}"
        );
    }
    for end in 0..good.len() {
        let cut = verifier.verify(&good[..end]).await;
        assert!(matches!(cut, Err(AuthError::BadJwt(_))), "cut at {end}");
    }
}

#[tokio::test]
async fn every_algorithm_of_another_librarys_tokens_is_taken_and_short_keys_are_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let vectors: Value =
        serde_json::from_str(include_str!("../../tests/vectors/jwt.json")).expect("JSON");
    let keys = vectors["jwks"]["keys"].as_array().expect("keys");
    let verifier = verifier(&put(&directory, keys)).await;
    let tokens = vectors["tokens"].as_object().expect("tokens");
    assert_eq!(tokens.len(), 9);
    for (name, token) in tokens {
        let verified = verifier.verify(token.as_str().expect("text")).await;
        assert_eq!(
            verified.is_ok(),
            !name.ends_with("1024"),
            "{name}: {verified:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_key_has_the_set_read_again_but_not_all_the_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let (first, second) = (Issuer::new("k1"), Issuer::new("k2"));
    let verifier = verifier(&put(&directory, &[first.jwk()])).await;
    put(&directory, &[second.jwk()]);
    let unknown = Err(AuthError::BadJwt("its key is not the issuer's"));
    // The set was read just now.
    assert_eq!(verifier.verify(&second.sign(&claims())).await, unknown);
    tokio::time::advance(Duration::from_secs(11)).await;
    verifier
        .verify(&second.sign(&claims()))
        .await
        .expect("the new key is known");
    assert_eq!(verifier.verify(&first.sign(&claims())).await, unknown);
}

#[tokio::test(start_paused = true)]
async fn keys_that_cannot_be_read_again_are_used_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let issuer = Issuer::new("k1");
    let path = put(&directory, &[issuer.jwk()]);
    let verifier = verifier(&path).await;
    let unknown = Issuer::new("k2");
    for broken in [Some("{\"keys\": ["), Some("{\"keys\": []}"), None] {
        match broken {
            Some(text) => std::fs::write(&path, text).expect("written"),
            None => std::fs::remove_file(&path).expect("removed"),
        }
        tokio::time::advance(Duration::from_secs(11)).await;
        let refused = verifier.verify(&unknown.sign(&claims())).await;
        assert_eq!(
            refused,
            Err(AuthError::BadJwt("its key is not the issuer's"))
        );
        let other = json!({ "jti": broken, "aud": "segment-relay" });
        let mut claims = claims();
        for (name, value) in other.as_object().expect("an object") {
            claims[name] = value.clone();
        }
        verifier
            .verify(&issuer.sign(&claims))
            .await
            .expect("known as before");
    }
}

#[tokio::test]
async fn tokens_can_be_bound_to_integrations_and_addresses_are_no_names() {
    let directory = tempfile::tempdir().expect("a directory");
    let issuer = Issuer::new("k1");
    let path = put(&directory, &[issuer.jwk()]);
    let jwks = Jwks::open(JwksSource::File(path.clone()))
        .await
        .expect("keys");
    let options = Jwt {
        integrations_claim: Some("tenants".into()),
        ..options(&path)
    };
    let verifier = JwtVerifier::new(options, jwks);
    let unbound = verifier.verify(&issuer.sign(&claims())).await;
    assert_eq!(unbound, Err(AuthError::BadJwt("it names no integration")));
    let mut bound = changed("tenants", json!(["acme", "Not An Id"]));
    bound["sub"] = json!("ann@example.com");
    let caller = verifier.verify(&issuer.sign(&bound)).await.expect("good");
    assert!(caller.may_touch("acme") && !caller.may_touch("other"));
    assert!(!caller.name.contains("example"), "{}", caller.name);
}

#[tokio::test]
async fn key_sets_without_a_usable_key_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let secret = json!({ "kty": "oct", "k": "c2VjcmV0", "kid": "k1" });
    let mut encrypts = Issuer::new("k1").jwk();
    encrypts["use"] = json!("enc");
    for keys in [vec![], vec![secret], vec![encrypts]] {
        let path = put(&directory, &keys);
        let refused = Jwks::open(JwksSource::File(path)).await;
        assert!(matches!(refused, Err(JwksError::Content(_))));
    }
    let missing = Jwks::open(JwksSource::File("/nowhere".into())).await;
    assert!(matches!(missing, Err(JwksError::File { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_key_server_that_never_answers_is_not_asked_by_each_who_waits() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let silent = silent.expect("a free port");
    let address = silent.local_addr().expect("an address");
    let url = Endpoint::new(&format!("http://{address}/jwks")).expect("a URL");
    let jwks = Jwks::open(JwksSource::Url(url))
        .await
        .expect("tried again later");
    let verifier = JwtVerifier::new(options(Path::new("/nowhere")), jwks);
    let token = Issuer::new("k1").sign(&changed("exp", json!(now() + 3_600)));
    tokio::time::advance(Duration::from_secs(60)).await;
    let begun = tokio::time::Instant::now();
    let calls = (0..300).map(|_| async {
        let refused = verifier.verify(&token).await;
        assert_eq!(refused, Err(AuthError::NoKeys));
        begun.elapsed()
    });
    let waits = futures_util::future::join_all(calls).await;
    let longest = waits.iter().max().expect("300 of them");
    assert!(*longest < Duration::from_secs(15), "{longest:?}");
    // And not by any number of them.
    let at_once = waits.iter().filter(|wait| wait.is_zero()).count();
    assert_eq!(at_once, 300 - 256);
}
