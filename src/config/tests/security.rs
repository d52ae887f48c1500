//! TLS, callers, JWTs, keys and notifications: what is refused, and that no fault
//! shows a secret.

use super::*;
use crate::permission::CertificateName;

const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

fn caller(rest: &str) -> String {
    format!("[[callers]]\nname = \"a\"\n{rest}\n")
}

#[test]
fn callers_are_read_with_their_rights() {
    let text = format!(
        "{}certificates = [\"A.internal\", \"spiffe://x/A\"]\nintegrations = [\"acme\"]\n",
        caller(&format!(
            "token_sha256 = [\"{HASH}\"]\npermissions = [\"capture\", \"dead-letters\"]"
        ))
    );
    let config = load(&text, &[]).expect("fine");
    assert!(config.authenticates());
    let [known] = config.callers.as_slice() else {
        panic!("{:?}", config.callers);
    };
    assert_eq!(hex::encode(known.token_hashes[0]), HASH);
    let names = ["A.internal", "spiffe://x/A"].map(CertificateName::parse);
    assert_eq!(known.certificate_names, names);
    assert!(known.caller.may_touch("acme") && !known.caller.may_touch("other"));
    assert_eq!(known.caller.permissions.len(), 2);
}

#[test]
fn faults_of_callers_stand_at_their_lines_and_show_no_token() {
    let good = format!("token_sha256 = [\"{HASH}\"]\npermissions = [\"read\"]");
    for (text, fault) in [
        (
            caller("token_sha256 = [\"planted-token\"]\npermissions = [\"read\"]"),
            "f.toml:3:1: callers[0].token_sha256: must be an array, each 64 hex digits",
        ),
        (
            caller("token_sha256 = \"planted-token\"\npermissions = [\"read\"]"),
            "f.toml:3:1: callers[0].token_sha256: must be an array",
        ),
        (
            caller("permissions = [\"read\"]"),
            "callers[0].token_sha256: give token_sha256, certificates, or both",
        ),
        (
            caller(&format!("token_sha256 = [\"{HASH}\"]")),
            "callers[0].permissions: say what the caller may do",
        ),
        (
            caller(&good.replace("read", "planted-token")),
            "callers[0].permissions: must be an array, each one of capture, read,",
        ),
        (
            caller(&format!("{good}\nintegrations = [\"Planted\"]")),
            "callers[0].integrations: must be an array, each an integration_id",
        ),
        (
            caller(&format!("{good}\ntoken = \"planted-token\"")),
            "f.toml:5:1: callers[0].token: unknown",
        ),
        (
            format!(
                "{}{}",
                caller(&good),
                caller(&good).replace("\"a\"", "\"b\"")
            ),
            "callers[1].token_sha256: is taken already by another caller",
        ),
        (
            format!(
                "{}{}",
                caller(&good),
                caller("certificates = [\"x\"]\npermissions = [\"read\"]")
            ),
            "callers[1].name: is taken already by another caller",
        ),
    ] {
        let found = faults(&text, &[]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(fault), "{fault} is not {found:?}");
        assert!(!found[0].contains("lanted"), "{found:?}");
    }
}

#[test]
fn settings_that_protect_together_are_given_together() {
    for (text, fault) in [
        (
            "[server.tls]\ncertificate_file = \"c\"\n",
            "certificate_file and key_file go together",
        ),
        (
            "[server.tls]\nclient_ca_file = \"c\"\n",
            "client certificates need certificate_file and key_file",
        ),
        (
            "[jwt]\nissuer = \"https://issuer\"\naudience = \"relay\"\n",
            "go together: a token that is checked against less",
        ),
        (
            "[jwt]\nissuer = \"i\"\naudience = \"a\"\njwks_file = \"f\"\njwks_url = \"https://x\"\n",
            "give jwks_file or jwks_url, not both",
        ),
        (
            "[jwt]\nissuer = \"i\"\naudience = \"a\"\njwks_url = \"http://keys.example\"\n",
            "must be an https URL",
        ),
        (
            "[notify]\nurl = \"https://hooks.example\"\n",
            "url and secret go together",
        ),
        (
            "[notify]\nurl = \"https://hooks.example\"\nsecret = \"planted\"\n",
            "must be whsec_ and 24 to 64 bytes in base64",
        ),
    ] {
        let found = faults(text, &[]);
        assert!(found[0].contains(fault), "{fault} is not in {found:?}");
        assert!(!found.concat().contains("planted"), "{found:?}");
    }
}

#[test]
fn what_is_loaded_prints_no_secret() {
    let secret = "whsec_cGxhbnRlZC13ZWJob29rLXNlY3JldC1vZi10ZXN0cw==";
    let config = load(
        &format!("[notify]\nurl = \"https://hooks.example\"\nsecret = \"{secret}\"\n"),
        &[("SEGMENT_RELAY__SECRETS__KEYS", "srk1_planted")],
    );
    let printed = format!("{:?}", config.expect("fine"));
    assert!(
        !printed.contains("whsec") && !printed.contains("srk1"),
        "{printed}"
    );
}
