use super::*;
use crate::sandbox::check::{BatchRequest, Keys, check_batch};

fn store(change: impl FnOnce(&mut SandboxOptions)) -> Store {
    let mut options = SandboxOptions::default();
    change(&mut options);
    Store::new(&options, 4)
}

/// Takes a batch of identify events with these `messageId`s.
fn take(store: &Store, region: Region, ids: &[&str]) {
    let events: Vec<String> = ids
        .iter()
        .map(|id| format!(r#"{{"type":"identify","userId":"u","messageId":"{id}"}}"#))
        .collect();
    let body = Arc::new(format!(
        r#"{{"batch":[{}],"writeKey":"k"}}"#,
        events.join(",")
    ));
    let request = BatchRequest {
        region,
        authorization: None,
        body: &body,
        now: jiff::Timestamp::UNIX_EPOCH,
    };
    let batch = check_batch(&request, &Keys::new(Vec::new())).expect("a batch");
    let info = RequestInfo {
        number: store.begin_request(),
        received_at: String::new(),
        region,
        write_key_hint: String::new(),
        retry_count: 0,
        status: Some(200),
        warnings: Vec::new(),
        body: Arc::clone(&body),
    };
    store.take(info, &batch);
}

fn taken(store: &Store) -> (u64, u64) {
    let stats = store.stats();
    (stats.events_accepted, stats.events_duplicate)
}

#[test]
fn repeated_message_ids_are_duplicates_within_a_region() {
    let store = store(|_| {});
    take(&store, Region::NonEu, &["a", "b", "a"]);
    assert_eq!(taken(&store), (2, 1));
    let outcomes: Vec<Outcome> = store.entries().iter().map(|entry| entry.outcome).collect();
    assert_eq!(
        outcomes,
        [Outcome::Accepted, Outcome::Accepted, Outcome::Duplicate]
    );
    take(&store, Region::NonEu, &["b"]);
    assert_eq!(taken(&store), (2, 2));
    take(&store, Region::Eu, &["b"]);
    assert_eq!(taken(&store), (3, 2));
}

#[test]
fn events_without_message_id_are_never_duplicates() {
    let store = store(|_| {});
    take(&store, Region::Eu, &["", ""]);
    assert_eq!(taken(&store), (2, 0));
}

#[test]
fn the_oldest_message_ids_are_forgotten() {
    let store = store(|options| options.remember_message_ids = 2);
    take(&store, Region::Eu, &["a", "b", "c", "b", "c"]);
    assert_eq!(taken(&store), (3, 2));
    take(&store, Region::Eu, &["a"]);
    assert_eq!(taken(&store), (4, 2));
    let state = store.lock();
    assert_eq!(
        (state.seen.hashes.len(), state.seen.oldest_first.len()),
        (2, 2)
    );
}

#[test]
fn the_oldest_entries_are_forgotten() {
    let store = store(|options| options.keep_entries = 3);
    take(&store, Region::Eu, &["a", "b"]);
    take(&store, Region::Eu, &["c", "d"]);
    let kept: Vec<u64> = store.entries().iter().map(|entry| entry.seq).collect();
    assert_eq!(kept, [2, 3, 4]);
    assert_eq!(store.entries()[1].event()["messageId"], "c");
}

#[test]
fn kept_entries_hold_on_to_bounded_bytes() {
    let long = "x".repeat(90);
    let one_body = store(|_| {});
    take(&one_body, Region::Eu, &[&long]);
    let body_bytes = one_body.lock().kept_bytes;
    let store = store(|options| options.keep_bytes = 3 * body_bytes);
    for _ in 0..10 {
        take(&store, Region::Eu, &[&long]);
    }
    assert_eq!(store.entries().len(), 3);
    assert_eq!(store.lock().kept_bytes, 3 * body_bytes);
}

#[test]
fn reset_forgets_all_but_what_is_open() {
    let store = store(|_| {});
    store.count(|stats| stats.connections_open = 1);
    take(&store, Region::Eu, &["a"]);
    store.reset();
    assert_eq!(store.entries().len(), 0);
    let expected = Stats {
        connections_open: 1,
        requests_in_flight: 1,
        most_requests_in_flight: 1,
        ..Stats::default()
    };
    assert_eq!(store.stats(), expected);
    take(&store, Region::Eu, &["a"]);
    assert_eq!(taken(&store), (1, 0));
    assert_eq!(store.entries()[0].seq, 2);
}

#[test]
fn a_slow_subscriber_loses_the_oldest_and_is_told() {
    let store = store(|_| {});
    let mut news = store.subscribe();
    take(&store, Region::Eu, &["a", "b", "c", "d", "e", "f"]);
    let lagged = news.try_recv().expect_err("it lags");
    assert_eq!(lagged, broadcast::error::TryRecvError::Lagged(2));
    assert_eq!(news.try_recv().map(|entry| entry.seq).ok(), Some(3));
}

#[test]
fn what_is_hashed_already_keeps_its_hash() {
    let mut hasher = IsHashed::default();
    hasher.write_u64(42);
    assert_eq!(hasher.finish(), 42);
}
