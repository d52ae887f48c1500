//! A `.creds` file: a user's JWT of an account that the server knows by its operator.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use nkeys::KeyPair;
use serde_json::{Value, json};

use super::access::{RIGHTS, Settings, Working, configured, refused};
use crate::certificates::Files;

/// A JWT as NATS has them: signed with an nkey over its own kind of algorithm.
fn jwt(issuer: &KeyPair, subject: &KeyPair, nats: Value) -> String {
    let header = json!({"typ": "JWT", "alg": "ed25519-nkey"});
    let claims = json!({
        "jti": format!("{:016x}", fastrand::u64(..)),
        "iat": 1_700_000_000,
        "iss": issuer.public_key(),
        "sub": subject.public_key(),
        "name": "test",
        "nats": nats,
    });
    let signed = [header, claims]
        .map(|part| URL_SAFE_NO_PAD.encode(part.to_string()))
        .join(".");
    let signature = issuer.sign(signed.as_bytes()).expect("signed");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// An operator with two accounts: its own, and that of relays.
struct Operator {
    operator: KeyPair,
    system: KeyPair,
    account: KeyPair,
}

impl Operator {
    fn new() -> Self {
        Self {
            operator: KeyPair::new_operator(),
            system: KeyPair::new_account(),
            account: KeyPair::new_account(),
        }
    }

    fn account_jwt(&self, account: &KeyPair, storage: i64, revoked: &Value) -> String {
        let mut nats = json!({
            "type": "account", "version": 2, "revocations": revoked,
            "limits": {
                "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
                "conn": -1, "leaf": -1,
            },
        });
        if storage != 0 {
            for limit in ["mem_storage", "disk_storage", "streams", "consumer"] {
                nats["limits"][limit] = json!(storage);
            }
        }
        jwt(&self.operator, account, nats)
    }

    /// What a server needs to know.
    fn server(&self, storage: i64, revoked: &Value) -> String {
        let operator = json!({"type": "operator", "version": 2});
        let accounts = [(&self.system, 0), (&self.account, storage)].map(|(account, storage)| {
            let jwt = self.account_jwt(account, storage, revoked);
            format!("{}: {jwt}\n", account.public_key())
        });
        format!(
            "operator: {}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {} }}\n",
            jwt(&self.operator, &self.operator, operator),
            self.system.public_key(),
            accounts.concat(),
        )
    }

    /// A file as `nsc generate creds` writes it.
    fn creds(&self, user: &KeyPair, network: Option<&str>) -> String {
        let mut nats = json!({
            "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1,
            "pub": {"allow": RIGHTS[0]}, "sub": {"allow": RIGHTS[1]},
        });
        if let Some(network) = network {
            nats["src"] = json!([network]);
        }
        let user_jwt = jwt(&self.account, user, nats);
        let seed = user.seed().expect("a seed");
        format!(
            "-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n\
             ************************* IMPORTANT *************************\n\
             NKEY Seed printed below can be used to sign and prove identity.\n\
             NKEYs are sensitive and should be treated as secrets.\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
    }
}

fn settings(files: &Files, name: &str) -> Settings {
    vec![("CREDENTIALS_FILE", files.path(name).display().to_string())]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credentials_file_lets_a_relay_in_and_is_read_again_with_each_connection() {
    let (files, operator) = (Files::new(), Operator::new());
    let Some(mut server) = configured(&files, &operator.server(-1, &json!({}))) else {
        return;
    };
    let (user, next) = (KeyPair::new_user(), KeyPair::new_user());
    files.put("relay.creds", &operator.creds(&user, None));
    let right = settings(&files, "relay.creds");
    let working = Working::start(&server, &right).await;
    working.delivers(1).await;
    let seeds = [&user, &next].map(|user| user.seed().expect("a seed"));

    let stranger = Operator::new().creds(&KeyPair::new_user(), None);
    files.put("stranger.creds", &stranger);
    files.put(
        "elsewhere.creds",
        &operator.creds(&user, Some("192.0.2.0/24")),
    );
    files.put("garbled.creds", &seeds[0]);
    for (name, wanted) in [
        (
            "stranger.creds",
            "they refuse the user of [nats] credentials_file",
        ),
        (
            "elsewhere.creds",
            "they refuse the user of [nats] credentials_file",
        ),
        (
            "garbled.creds",
            "garbled.creds: has to hold a user's JWT and its seed",
        ),
        ("none.creds", "none.creds: there is no such file"),
        (".", "it is a directory"),
    ] {
        let said = refused(&server, &settings(&files, name));
        assert!(said.contains(wanted) && said.contains("[nats] "), "{said}");
        assert!(!said.contains(&seeds[0][1..]), "{said}");
    }
    let said = refused(&server, &Vec::new());
    assert!(said.contains("set [nats] credentials_file"), "{said}");

    // The user is revoked, and another one is put in its place: the relay needs no restart.
    files.put("relay.creds", &operator.creds(&next, None));
    server.kill();
    let revoked = json!({(user.public_key()): 4_000_000_000_u32});
    files.put("nats.conf", &operator.server(-1, &revoked));
    server.run();
    working.delivers_again(2).await;
    files.put("former.creds", &operator.creds(&user, None));
    let said = refused(&server, &settings(&files, "former.creds"));
    assert!(said.contains("not expired and not revoked"), "{said}");
    for seed in &seeds {
        assert_eq!(working.relay.log.count(|line| line.contains(&seed[1..])), 0);
    }
    drop(working);

    // An account without JetStream.
    server.kill();
    files.put("nats.conf", &operator.server(0, &json!({})));
    server.run();
    let said = refused(&server, &right);
    assert!(said.contains("enable it for the account"), "{said}");
}
