//! Integrations that have gone from the configuration file.

use super::*;
use crate::{
    outbox::{NewCapture, conformance},
    status::Outcome,
};

const LATER: UnixMillis = UnixMillis(NOW.0 + 1_000);

/// A relay that has `acme` from its file, with a capture that waits.
async fn with_a_capture(outbox: &Arc<SharedDouble>) {
    let registry = start(outbox, 1, &[spec("acme", "Acme")]).await;
    let acme = registry.expect("loads").get(&acme()).expect("of the file");
    let capture = NewCapture {
        revision: acme.revision.number(),
        ..conformance::new_capture("acme", "a", 0)
    };
    conformance::submit(&**outbox, vec![capture]).await;
}

async fn deliver(outbox: &Arc<SharedDouble>) {
    let leased = conformance::lease(&**outbox, "acme", 10).await;
    conformance::settle(&**outbox, leased, |_, _| Outcome::Delivered).await;
}

async fn drained(registry: &Registry) -> Vec<IntegrationId> {
    let (audit, notices) = (Audit::new(), Notices::nobody());
    let told = Told {
        audit: &audit,
        notices: &notices,
    };
    let removed = registry.remove_drained(&told, LATER).await;
    removed.expect("looked through")
}

#[tokio::test]
async fn wait_for_events_and_take_no_captures_also_after_a_restart() {
    let outbox = SharedDouble::new();
    with_a_capture(&outbox).await;
    for restart in 0..3 {
        let registry = start(&outbox, 2 + restart, &[]).await.expect("loads");
        let kept = registry.find("acme").await.expect("still there");
        assert_eq!(kept.revision.removal_time, Some(NOW));
        assert!(kept.revision.read_only && kept.write_key(Region::NonEu).is_some());
        let refused = registry.find_open("acme").await.map(|_| ());
        assert_eq!(refused, Err(RegistryError::Removed(acme())));
        let created = registry.create(&spec("acme", "Mine"), LATER).await;
        assert_eq!(created.map(|_| ()), Err(RegistryError::Exists(acme())));
        let updated = registry.update(&renamed("Mine", ""), &[], LATER).await;
        assert!(matches!(updated, Err(RegistryError::ReadOnly(_))));
        assert_eq!(drained(&registry).await, []);
    }
    let registry = relay(&outbox).await;
    deliver(&outbox).await;
    assert_eq!(drained(&registry).await, [acme()]);
    let unknown = registry.find("acme").await.map(|_| ());
    assert_eq!(unknown, Err(RegistryError::NotFound("acme".into())));
    assert!(stored_names(&outbox).await.is_empty());
}

#[tokio::test]
async fn end_at_a_start_where_nothing_waits_any_more() {
    let outbox = SharedDouble::new();
    with_a_capture(&outbox).await;
    start(&outbox, 2, &[]).await.expect("loads");
    deliver(&outbox).await;
    let registry = start(&outbox, 2, &[]).await.expect("loads");
    assert!(names(&registry).is_empty());
    assert!(stored_names(&outbox).await.is_empty());
}

#[tokio::test]
async fn end_where_the_file_has_the_integration_again() {
    let outbox = SharedDouble::new();
    with_a_capture(&outbox).await;
    start(&outbox, 2, &[]).await.expect("loads");
    let file = [spec("acme", "Acme")];
    let registry = start(&outbox, 3, &file).await.expect("loads");
    let back = registry.find_open("acme").await.expect("takes captures");
    assert_eq!(back.revision.removal_time, None);
    assert!(back.revision.read_only);
    deliver(&outbox).await;
    assert_eq!(drained(&registry).await, []);
}

#[tokio::test]
async fn are_hastened_by_a_deletion_by_force() {
    let outbox = SharedDouble::new();
    with_a_capture(&outbox).await;
    let registry = start(&outbox, 2, &[]).await.expect("loads");
    let waiting = registry.delete("acme", "", false).await;
    assert!(matches!(waiting, Err(RegistryError::EventsWaiting { .. })));
    assert_eq!(registry.delete("acme", "", true).await, Ok(2));
    assert!(stored_names(&outbox).await.is_empty());
}

#[tokio::test]
async fn are_those_of_all_relays_and_done_by_one() {
    let outbox = SharedDouble::new();
    with_a_capture(&outbox).await;
    let other = relay(&outbox).await;
    let one = start(&outbox, 2, &[]).await.expect("loads");
    other.refresh().await.expect("read");
    let refused = other.find_open("acme").await.map(|_| ());
    assert_eq!(refused, Err(RegistryError::Removed(acme())));
    deliver(&outbox).await;
    assert_eq!(drained(&other).await, [acme()]);
    assert_eq!(drained(&one).await, []);
    one.refresh().await.expect("read");
    assert!(names(&one).is_empty());
}
