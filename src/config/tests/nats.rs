//! `[nats]`.

use super::*;

#[test]
fn what_does_not_fit_together_is_named_without_its_secrets() {
    let messages = |text: &str| lines(&load(text, &[]).expect_err("a fault")).join("\n");
    for (text, wanted) in [
        ("[outbox]\nkind = \"jetstream\"\n", "needs [nats] servers"),
        ("[nats]\nservers = \"http://a:1\"\n", "nats://"),
        (
            "[nats]\nservers = \"nats://u:planted@a:1\"\n",
            "settings of their own",
        ),
        ("[nats]\nreplicas = 2\n", "1, 3 or 5"),
        ("[nats]\npassword = \"planted\"\n", "go together"),
        (
            "[nats]\ntoken = \"planted\"\ncredentials_file = \"c\"\n",
            "give one of",
        ),
        ("[nats]\nca_file = \"ca.pem\"\n", "need tls = true"),
        ("[nats]\nprefix = \"a.b\"\n", "A-Z, a-z, 0-9"),
    ] {
        let said = messages(text);
        assert!(said.contains(wanted), "{text}: {said}");
        assert!(!said.contains("planted"), "{said}");
    }
    let text = "[outbox]\nkind = \"jetstream\"\n[nats]\nservers = \"nats://a:1, tls://b:2\"\ntoken = \"planted\"\n";
    let config = load(text, &[]).expect("fine");
    assert_eq!(config.nats.servers, ["nats://a:1", "tls://b:2"]);
    assert_eq!((config.nats.replicas, config.nats.partitions), (3, 1));
    assert!(!format!("{config:?}").contains("planted"));
}
