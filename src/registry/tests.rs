//! Integrations that several relays change, over one shared outbox.

mod removals;

use super::*;
use crate::{
    audit::Audit,
    notify::Notices,
    outbox::shared_double::SharedDouble,
    proto::{Credential, DataRegion, Integration as Spec},
};

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

fn spec(id: &str, name: &str) -> Spec {
    Spec {
        integration_id: id.into(),
        display_name: name.into(),
        credentials: vec![Credential {
            data_region: DataRegion::NonEu.into(),
            write_key: "a-write-key-for-tests".into(),
            ..Credential::default()
        }],
        ..Spec::default()
    }
}

/// As another relay stores it: with an etag of its own.
fn stored(id: &str, name: &str, etag: &str) -> Spec {
    Spec {
        etag: etag.into(),
        mapping_version: 1,
        ..spec(id, name)
    }
}

fn acme() -> IntegrationId {
    IntegrationId::new("acme").expect("valid")
}

async fn start(
    outbox: &Arc<SharedDouble>,
    version: u64,
    integrations: &[Spec],
) -> Result<Registry, LoadError> {
    let (audit, notices) = (Audit::new(), Notices::nobody());
    let told = Told {
        audit: &audit,
        notices: &notices,
    };
    let configured = Configured {
        integrations,
        version,
    };
    let outbox = Arc::clone(outbox) as Arc<dyn Outbox>;
    Registry::load(outbox, configured, &told, NOW).await
}

async fn relay(outbox: &Arc<SharedDouble>) -> Registry {
    start(outbox, 0, &[]).await.expect("loads")
}

fn names(registry: &Registry) -> Vec<String> {
    let all = registry.list(None, &Scope::All, 100);
    all.iter().map(|one| one.display_name.clone()).collect()
}

async fn stored_names(outbox: &Arc<SharedDouble>) -> Vec<String> {
    let mut all = outbox.integrations().await.expect("read");
    all.sort_by(|one, other| one.integration_id.cmp(&other.integration_id));
    all.into_iter().map(|one| one.display_name).collect()
}

fn renamed(name: &str, etag: &str) -> Spec {
    Spec {
        integration_id: "acme".into(),
        display_name: name.into(),
        etag: etag.into(),
        ..Spec::default()
    }
}

mod look_ups {
    use super::*;

    #[tokio::test]
    async fn find_what_another_relay_has_made() {
        let outbox = SharedDouble::new();
        let (one, other) = (relay(&outbox).await, relay(&outbox).await);
        one.create(&spec("acme", "Acme"), NOW).await.expect("made");
        assert!(other.get(&acme()).is_none());
        let found = other.find("acme").await.expect("found");
        assert_eq!(found.display_name, "Acme");
        other.find("acme").await.expect("known");
        assert_eq!(outbox.calls("integration"), 2, "one for the creation");
    }

    #[tokio::test]
    async fn ask_the_outbox_only_for_ids() {
        let outbox = SharedDouble::new();
        let registry = relay(&outbox).await;
        for id in ["", "Acme", "a b", &"a".repeat(64)] {
            let refused = registry.find(id).await.map(|_| ());
            let name = first_chars(id, 64).to_owned();
            assert_eq!(refused, Err(RegistryError::NotFound(name)));
        }
        assert_eq!(outbox.calls("integration"), 0);
    }

    #[tokio::test]
    async fn do_not_say_unknown_while_the_outbox_is_away() {
        let outbox = SharedDouble::new();
        let registry = relay(&outbox).await;
        outbox.fail("integration", OutboxError::Closed);
        let refused = registry.find("acme").await.map(|_| ());
        assert_eq!(refused, Err(RegistryError::Outbox(OutboxError::Closed)));
        let unknown = registry.find("acme").await.map(|_| ());
        assert_eq!(unknown, Err(RegistryError::NotFound("acme".into())));
    }

    #[tokio::test]
    async fn blame_no_caller_for_what_is_stored() {
        let outbox = SharedDouble::new();
        let registry = relay(&outbox).await;
        let broken = Spec {
            credentials: Vec::new(),
            ..stored("acme", "Acme", "e1")
        };
        outbox.put_integration(broken, None).await.expect("stored");
        let refused = registry.find("acme").await.map(|_| ());
        assert!(
            matches!(
                refused,
                Err(RegistryError::Outbox(OutboxError::Unavailable(_)))
            ),
            "{refused:?}"
        );
    }

    #[tokio::test]
    async fn of_one_id_at_a_time_share_a_read() {
        let outbox = SharedDouble::new();
        let registry = relay(&outbox).await;
        let all = (0..20).map(|_| registry.find("acme"));
        let found = futures_util::future::join_all(all).await;
        assert!(found.iter().all(Result::is_err));
        // The first one begins to read before the others ask.
        assert_eq!(outbox.calls("integration"), 2);
    }
}

mod changes {
    use super::*;

    #[tokio::test]
    async fn start_from_what_is_stored() {
        let outbox = SharedDouble::new();
        let (one, other) = (relay(&outbox).await, relay(&outbox).await);
        one.create(&spec("acme", "Acme"), NOW).await.expect("made");
        other.refresh().await.expect("read");
        let disabled = Spec {
            enabled: Some(false),
            ..renamed("", "")
        };
        one.update(&disabled, &[], NOW).await.expect("updated");
        let updated = other.update(&renamed("Acme 2", ""), &[], NOW).await;
        let updated = updated.expect("updated");
        assert!(!updated.before.enabled && !updated.now.enabled);
        assert_eq!(stored_names(&outbox).await, ["Acme 2"]);
    }

    #[tokio::test]
    async fn without_an_etag_are_applied_anew_until_no_other_relay_is_faster() {
        let outbox = SharedDouble::new();
        let registry = relay(&outbox).await;
        registry
            .create(&spec("acme", "Acme"), NOW)
            .await
            .expect("made");
        for (times, expected) in [(9, true), (10, false)] {
            for time in 0..times {
                let name = format!("Other {time}");
                outbox.meanwhile(stored("acme", &name, &format!("etag-{times}-{time}")));
            }
            let updated = registry.update(&renamed("Mine", ""), &[], NOW).await;
            assert_eq!(updated.is_ok(), expected);
            let name = if expected { "Mine" } else { "Other 9" };
            assert_eq!(stored_names(&outbox).await, [name]);
        }
    }

    #[tokio::test]
    async fn of_a_pause_note_when_it_ended() {
        let outbox = SharedDouble::new();
        let registry = relay(&outbox).await;
        let made = registry.create(&spec("acme", "Acme"), NOW).await;
        assert!(!made.expect("made").paused);
        let at = |seconds: u64| NOW.plus(Duration::from_secs(seconds));
        let mut resumed = Vec::new();
        for (paused, seconds) in [(true, 1), (true, 2), (false, 3), (false, 4), (true, 5)] {
            let change = Spec {
                paused: Some(paused),
                ..renamed("", "")
            };
            let updated = registry.update(&change, &[], at(seconds)).await;
            let now = updated.expect("updated").now;
            assert_eq!((now.paused, now.revision.mapping_version), (paused, 1));
            resumed.push(now.revision.resume_time);
        }
        let end = Some(at(3));
        assert_eq!(resumed, [None, None, end, end, end]);
        // It is kept over a restart.
        let kept = relay(&outbox).await.get(&acme()).expect("stored");
        assert_eq!((kept.paused, kept.revision.resume_time), (true, end));
    }

    #[tokio::test]
    async fn with_an_etag_compare_it_with_what_is_stored() {
        let outbox = SharedDouble::new();
        let (one, other) = (relay(&outbox).await, relay(&outbox).await);
        let made = one.create(&spec("acme", "Acme"), NOW).await.expect("made");
        other.refresh().await.expect("read");
        let (old, mask) = (made.revision.etag.clone(), []);
        let updated = one.update(&renamed("Two", &old), &mask, NOW).await;
        let fresh = updated.expect("updated").now.revision.etag.clone();
        let refused = other.update(&renamed("Three", &old), &mask, NOW).await;
        assert!(matches!(refused, Err(RegistryError::StaleEtag(_))));
        let updated = other.update(&renamed("Three", &fresh), &mask, NOW).await;
        let etag = updated.expect("updated").now.revision.etag.clone();
        // Another relay is faster: the caller decides anew.
        outbox.meanwhile(stored("acme", "Four", "e4"));
        let refused = one.update(&renamed("Five", &etag), &mask, NOW).await;
        assert!(matches!(refused, Err(RegistryError::StaleEtag(_))));
        assert_eq!(stored_names(&outbox).await, ["Four"]);
    }

    #[tokio::test]
    async fn delete_what_another_relay_has_changed() {
        let outbox = SharedDouble::new();
        let (one, other) = (relay(&outbox).await, relay(&outbox).await);
        one.create(&spec("acme", "Acme"), NOW).await.expect("made");
        other.refresh().await.expect("read");
        one.update(&renamed("Acme 2", ""), &[], NOW)
            .await
            .expect("updated");
        outbox.meanwhile(stored("acme", "Acme 3", "e3"));
        assert_eq!(other.delete("acme", "", false).await, Ok(0));
        assert!(stored_names(&outbox).await.is_empty());
        let gone = Err(RegistryError::NotFound("acme".into()));
        assert_eq!(one.delete("acme", "", false).await, gone);
    }

    #[tokio::test]
    async fn find_what_exists_elsewhere() {
        let outbox = SharedDouble::new();
        let (one, other) = (relay(&outbox).await, relay(&outbox).await);
        one.create(&spec("acme", "Acme"), NOW).await.expect("made");
        let exists = || Err(RegistryError::Exists(acme()));
        let again = other.create(&spec("acme", "Acme"), NOW).await;
        assert_eq!(again.map(|_| ()), exists());
        one.delete("acme", "", false).await.expect("gone");
        outbox.meanwhile(stored("acme", "Other", "e1"));
        let late = other.create(&spec("acme", "Mine"), NOW).await;
        assert_eq!(late.map(|_| ()), exists());
        assert_eq!(stored_names(&outbox).await, ["Other"]);
    }

    #[tokio::test]
    async fn of_other_relays_are_followed() {
        let outbox = SharedDouble::new();
        let (one, other) = (relay(&outbox).await, Arc::new(relay(&outbox).await));
        let stop = CancellationToken::new();
        let following = tokio::spawn(Arc::clone(&other).follow(stop.clone()));
        one.create(&spec("acme", "Acme"), NOW).await.expect("made");
        outbox.fail("integrations", OutboxError::Closed);
        outbox.notify();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while names(&other).is_empty() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(names(&other), ["Acme"]);
        stop.cancel();
        following.await.expect("ends");
    }

    #[tokio::test]
    async fn wake_all_lanes_whoever_has_made_them() {
        let outbox = SharedDouble::new();
        let (one, other) = (relay(&outbox).await, relay(&outbox).await);
        one.create(&spec("acme", "Acme"), NOW).await.expect("made");
        let all = usize::from(SHARDS) * Region::ALL.len();
        other.find("acme").await.expect("found");
        assert_eq!(outbox.signals().ready_lanes().await.len(), all);
        one.update(&renamed("Acme 2", ""), &[], NOW)
            .await
            .expect("updated");
        assert_eq!(outbox.signals().ready_lanes().await.len(), all);
        other.refresh().await.expect("read");
        assert_eq!(outbox.signals().ready_lanes().await.len(), all);
    }
}

mod configuration {
    use super::*;

    #[tokio::test]
    async fn of_the_highest_version_is_stored() {
        let outbox = SharedDouble::new();
        let old = [spec("acme", "Acme"), spec("beta", "Beta")];
        let new = [spec("acme", "Acme 2"), spec("gamma", "Gamma")];
        let first = start(&outbox, 0, &old).await.expect("loads");
        assert_eq!(names(&first), ["Acme", "Beta"]);
        let second = start(&outbox, 7, &new).await.expect("loads");
        assert_eq!(names(&second), ["Acme 2", "Gamma"]);
        // The old file changes nothing any more, and the relay serves what is stored.
        let third = start(&outbox, 0, &old).await.expect("loads");
        assert_eq!(names(&third), ["Acme 2", "Gamma"]);
        assert_eq!(stored_names(&outbox).await, ["Acme 2", "Gamma"]);
        assert!(
            third
                .list(None, &Scope::All, 9)
                .iter()
                .all(|one| one.revision.read_only)
        );
        // Nothing is left of it with an empty file, once its version says so.
        let none = start(&outbox, 8, &[]).await.expect("loads");
        assert!(names(&none).is_empty());
    }

    #[tokio::test]
    async fn that_differs_under_one_version_is_refused() {
        let outbox = SharedDouble::new();
        let file = [spec("acme", "Acme"), spec("beta", "Beta")];
        start(&outbox, 3, &file).await.expect("loads");
        let mut other_key = file.clone();
        other_key[0].credentials[0].write_key = "another-write-key".into();
        for differs in [&other_key[..], &file[..1], &[]] {
            let refused = start(&outbox, 3, differs).await.map(|_| ());
            assert_eq!(refused, Err(LoadError::Conflict(3)));
        }
        let text = LoadError::Conflict(3).to_string();
        assert!(text.contains("integrations_version = 3"), "{text}");
        assert!(
            text.contains("raise it") && text.contains("the same file"),
            "{text}"
        );
        assert_eq!(stored_names(&outbox).await, ["Acme", "Beta"]);
    }

    #[tokio::test]
    async fn is_the_same_in_any_order() {
        let outbox = SharedDouble::new();
        let eu = Credential {
            data_region: DataRegion::Eu.into(),
            write_key: "a-key-of-the-eu".into(),
            ..Credential::default()
        };
        let mut file = [spec("acme", "Acme"), spec("beta", "Beta")];
        file[0].credentials.push(eu);
        start(&outbox, 0, &file).await.expect("loads");
        let puts = outbox.calls("put_integration");
        file[0].credentials.reverse();
        file.reverse();
        start(&outbox, 0, &file).await.expect("loads");
        assert_eq!(
            outbox.calls("put_integration"),
            puts,
            "nothing was left to do"
        );
    }

    #[tokio::test]
    async fn without_integrations_leaves_nothing() {
        let outbox = SharedDouble::new();
        relay(&outbox)
            .await
            .create(&spec("acme", "Acme"), NOW)
            .await
            .expect("made");
        relay(&outbox).await;
        assert_eq!(outbox.calls("claim_configuration"), 0);
        assert_eq!(stored_names(&outbox).await, ["Acme"]);
    }

    #[tokio::test]
    async fn that_breaks_rules_claims_nothing() {
        let outbox = SharedDouble::new();
        let refused = start(&outbox, 1, &[spec("Acme", "Acme")]).await.map(|_| ());
        assert!(matches!(
            refused,
            Err(LoadError::Registry(RegistryError::Invalid(_)))
        ));
        assert_eq!(outbox.calls("claim_configuration"), 0);
    }

    #[tokio::test]
    async fn gives_way_to_a_newer_one_that_comes_meanwhile() {
        let outbox = SharedDouble::new();
        let old = [spec("acme", "Acme"), spec("beta", "Beta")];
        start(&outbox, 1, &old).await.expect("loads");
        // It is claimed and stores its integration between a read and a change of this one.
        let newer = Spec {
            read_only: true,
            ..stored("acme", "Acme 3", "e3")
        };
        outbox.meanwhile_claims(3, newer);
        let changed = [spec("acme", "Acme 2"), spec("beta", "Beta 2")];
        let registry = start(&outbox, 2, &changed).await.expect("loads");
        assert_eq!(names(&registry), ["Acme 3", "Beta"]);
        assert_eq!(stored_names(&outbox).await, ["Acme 3", "Beta"]);
    }
}
