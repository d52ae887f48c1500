//! What every outbox has to do, as one suite for all implementations:
//! `conformance::suite!(rig)` in an implementation's tests runs it.

mod dead_letters;
mod incarnations;
mod leases;
mod privacy;
mod skipped;

use std::{sync::Arc, time::Duration};

use sha2::{Digest, Sha256};

use super::{
    Backlog, BoxFuture, Content, DeadLetterFilter, Erasure, EventSet, LaneKey, LeaseBudget,
    LeaseScope, LeasedCapture, Limits, NewCapture, Outbox, OutboxError, Quota, Selection,
    SettledCapture, Settlement, SubjectQuery, Submitted, Taken, Watched,
};
use crate::{
    event::{EventPair, EventType},
    integration::IntegrationId,
    notice::{Happening, Notice},
    proto::{DeliveryReason, ErasureReceipt},
    region::Region,
    status::{Attempt, CaptureRecord, Outcome, State},
    time::UnixMillis,
    trace::TraceLink,
};

pub(crate) use dead_letters::{
    dead_letters_are_listed_replayed_behind_live_captures_and_discarded,
    dead_letters_keep_their_payload_and_delivered_events_do_not,
    ids_of_dead_letters_never_come_again,
};
pub(crate) use incarnations::a_later_integration_of_a_name_inherits_nothing;
pub(crate) use leases::{
    a_lease_keeps_to_its_bytes_but_always_makes_progress, a_lease_keeps_to_its_users,
    a_pair_is_split_only_where_one_event_is_asked_for,
};
pub(crate) use privacy::a_persons_data_is_erased_and_nobody_elses;
pub(crate) use skipped::{
    a_skipped_capture_leaves_its_id_free, a_skipped_capture_of_an_erased_person_keeps_its_id,
    a_skipped_capture_stays_where_there_is_no_room_for_the_next,
    of_a_group_a_skipped_one_gives_way, skipped,
};

/// Bounds with which the suite opens an outbox.
pub(crate) const LIMITS: Limits = Limits {
    max_events: 1_000,
    max_bytes: 1_000_000,
    max_integration_events: 100,
    max_integration_bytes: 100_000,
};

/// One outbox that can be closed and opened again.
pub(crate) trait Rig {
    /// Opens it with [`LIMITS`]; what was stored before is still there.
    fn open(&self) -> BoxFuture<'_, Arc<dyn Outbox>>;
}

/// Calls a macro with the names of all tests of the suite behind other tokens.
macro_rules! names {
    ($called:path; $($before:tt)*) => {
        $called!($($before)*
            captures_come_back_in_order_also_after_a_restart_and_go_when_delivered
            a_capture_id_is_taken_once_also_by_callers_at_the_same_time
            a_pair_is_split_only_where_one_event_is_asked_for
            a_lease_keeps_to_its_bytes_but_always_makes_progress
            a_lease_keeps_to_its_users
            dead_letters_keep_their_payload_and_delivered_events_do_not
            bounds_refuse_whole_captures_and_a_delivery_makes_room
            waiting_callers_and_watchers_hear_of_what_is_durable
            dead_letters_are_listed_replayed_behind_live_captures_and_discarded
            ids_of_dead_letters_never_come_again
            integrations_are_kept
            a_later_integration_of_a_name_inherits_nothing
            a_persons_data_is_erased_and_nobody_elses
            notices_are_kept_in_order_until_they_are_done
            a_skipped_capture_leaves_its_id_free
            of_a_group_a_skipped_one_gives_way
            a_skipped_capture_stays_where_there_is_no_room_for_the_next
            a_skipped_capture_of_an_erased_person_keeps_its_id
        );
    };
}
pub(crate) use names;

/// All tests of the suite against a new rig each.
macro_rules! suite {
    ($rig:expr) => {
        $crate::outbox::conformance::names!($crate::outbox::conformance::suite_tests; $rig;);
    };
}
/// The tests of these names.
macro_rules! suite_tests {
    ($rig:expr; $($name:ident)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                $crate::outbox::conformance::$name(&$rig).await;
            }
        )*
    };
}
pub(crate) use {suite, suite_tests};

pub(crate) const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

pub(crate) fn id(name: &str) -> IntegrationId {
    IntegrationId::stored(name).expect("valid")
}

pub(crate) fn lane(name: &str) -> LaneKey {
    LaneKey {
        integration_id: id(name),
        region: Region::NonEu,
        shard: 1,
    }
}

pub(crate) fn new_capture(name: &str, capture_id: &str, content: u8) -> NewCapture {
    let payload = |event: &str| format!("{{\"{event}\":\"{capture_id}\"}}").into_bytes();
    NewCapture {
        integration_id: id(name),
        capture_id: capture_id.to_owned(),
        digest: [content; 16],
        region: Region::NonEu,
        mapping_version: 1,
        revision: 0,
        accept_time: NOW,
        user_id: Some(user_of(capture_id)),
        room: None,
        trace: TraceLink::from_bytes(&[7; TraceLink::BYTES]),
        content: Content::Send {
            shard: 1,
            events: EventPair {
                identify: payload("identify"),
                track: payload("track"),
            },
        },
    }
}

/// The person of a capture: by what stands before the dash in its id.
pub(crate) fn user_of(capture_id: &str) -> String {
    let person = capture_id.split('-').next().unwrap_or("");
    hex::encode(Sha256::digest(person))
}

pub(crate) async fn submit(outbox: &dyn Outbox, captures: Vec<NewCapture>) -> Vec<Submitted> {
    let receipt = outbox.submit(captures).await.expect("queued");
    receipt.wait().await.expect("durable")
}

pub(crate) async fn submit_one(outbox: &dyn Outbox, name: &str, capture_id: &str) -> Submitted {
    submit(outbox, vec![new_capture(name, capture_id, 0)])
        .await
        .remove(0)
}

pub(crate) async fn lease(
    outbox: &dyn Outbox,
    name: &str,
    max_events: usize,
) -> Vec<LeasedCapture> {
    lease_of(outbox, name, max_events, LeaseScope::All).await
}

async fn lease_of(
    outbox: &dyn Outbox,
    name: &str,
    max_events: usize,
    scope: LeaseScope,
) -> Vec<LeasedCapture> {
    let budget = LeaseBudget {
        max_events,
        max_bytes: 10_000,
    };
    let leased = outbox.lease(&lane(name), budget, scope).await;
    leased.expect("leased")
}

pub(crate) fn ids(leased: &[LeasedCapture]) -> Vec<&str> {
    leased
        .iter()
        .map(|capture| capture.record.capture_id.as_str())
        .collect()
}

/// Settles events of one lease: those that `outcome` names.
pub(crate) async fn settle(
    outbox: &dyn Outbox,
    leased: Vec<LeasedCapture>,
    outcome: impl Fn(&str, EventType) -> Outcome,
) {
    let settlement = settlement(leased, outcome);
    outbox.settle(settlement).await.expect("settled");
}

pub(crate) fn settlement(
    leased: Vec<LeasedCapture>,
    outcome: impl Fn(&str, EventType) -> Outcome,
) -> Arc<Settlement> {
    let lane = lane(leased[0].record.integration_id.as_str());
    let mut captures = Vec::new();
    for capture in leased {
        let mut record = CaptureRecord::clone(&capture.record);
        record.note_attempt(Attempt {
            identify: capture.identify.is_some(),
            track: capture.track.is_some(),
            time: NOW,
            http_status: 200,
            latency: Duration::from_millis(4),
            reason: DeliveryReason::Unspecified,
            error: String::new(),
        });
        let carried = |event: &EventType| capture.payload(*event).is_some();
        let changed: EventSet = EventType::ALL.into_iter().filter(carried).collect();
        for event in changed.iter() {
            let outcome = outcome(&capture.record.capture_id, event);
            record.event_mut(event).advance(outcome, NOW);
        }
        captures.push(SettledCapture {
            sequence: capture.sequence,
            record: Arc::new(record),
            changed,
        });
    }
    Arc::new(Settlement { lane, captures })
}

pub(crate) async fn captures_come_back_in_order_also_after_a_restart_and_go_when_delivered(
    rig: &impl Rig,
) {
    let outbox = rig.open().await;
    let outbox = outbox.as_ref();
    for capture in ["c", "a", "b"] {
        assert!(matches!(
            submit_one(outbox, "acme", capture).await,
            Submitted::Accepted(_)
        ));
    }
    outbox.close().await;

    let outbox = rig.open().await;
    let outbox = outbox.as_ref();
    assert_eq!(outbox.waiting_lanes().await, Ok(vec![lane("acme")]));
    let leased = lease(outbox, "acme", 4).await;
    assert_eq!(ids(&leased), ["c", "a"]);
    assert_eq!(
        leased[0].identify.as_deref(),
        Some(&b"{\"identify\":\"c\"}"[..])
    );
    settle(outbox, leased, |_, _| Outcome::Delivered).await;
    assert_eq!(ids(&lease(outbox, "acme", 4).await), ["b"]);
    assert_eq!(outbox.backlog(&id("acme")).await.expect("read").events, 2);
    assert_eq!(
        outbox.backlog(&id("acme")).await.expect("read").oldest,
        Some(NOW)
    );
    let found = outbox
        .find(&id("acme"), "c")
        .await
        .expect("read")
        .expect("remembered");
    assert_eq!(found.track.state, State::Delivered { at: NOW });
    assert_eq!(found.attempts.len(), 1);
    outbox.close().await;
}

pub(crate) async fn a_capture_id_is_taken_once_also_by_callers_at_the_same_time(rig: &impl Rig) {
    let outbox = rig.open().await;
    let outbox = outbox.as_ref();
    let calls = (0..20).map(|index| submit(outbox, vec![new_capture("acme", "c", index % 2)]));
    let answers: Vec<_> = futures_util::future::join_all(calls)
        .await
        .into_iter()
        .flatten()
        .collect();
    let of = |wanted: fn(&Submitted) -> bool| answers.iter().filter(|a| wanted(a)).count();
    assert_eq!(of(|a| matches!(a, Submitted::Accepted(_))), 1);
    assert_eq!(of(|a| matches!(a, Submitted::Duplicate(_))), 9);
    assert_eq!(of(|a| matches!(a, Submitted::Conflict)), 10);
    // Another integration has ids of its own.
    assert!(matches!(
        submit_one(outbox, "other", "c").await,
        Submitted::Accepted(_)
    ));
    outbox.close().await;
}

pub(crate) async fn bounds_refuse_whole_captures_and_a_delivery_makes_room(rig: &impl Rig) {
    let outbox = rig.open().await;
    let outbox = outbox.as_ref();
    let many = (0..51)
        .map(|index| new_capture("acme", &index.to_string(), 0))
        .collect();
    let answers = submit(outbox, many).await;
    assert!(
        answers[..50]
            .iter()
            .all(|a| matches!(a, Submitted::Accepted(_)))
    );
    assert_eq!(answers[50], Submitted::Full(Quota::IntegrationEvents));
    assert_eq!(outbox.find(&id("acme"), "50").await, Ok(None));
    assert!(matches!(
        submit_one(outbox, "other", "x").await,
        Submitted::Accepted(_)
    ));
    let leased = lease(outbox, "acme", 2).await;
    settle(outbox, leased, |_, _| Outcome::Delivered).await;
    assert!(matches!(
        submit_one(outbox, "acme", "50").await,
        Submitted::Accepted(_)
    ));
    outbox.close().await;
}

/// How many dead letters a replay has taken.
pub(crate) fn taken(replayed: Result<Result<Taken, Quota>, OutboxError>) -> u64 {
    replayed.expect("done").expect("room").events()
}

pub(crate) async fn waiting_callers_and_watchers_hear_of_what_is_durable(rig: &impl Rig) {
    let outbox = rig.open().await;
    let outbox = outbox.as_ref();
    let mut watcher = outbox.signals().watch(|_| true);
    submit_one(outbox, "acme", "a").await;
    assert!(outbox.signals().ready_lanes().await.contains(&lane("acme")));
    let expectation = outbox.signals().expect(&id("acme"), "a");
    let change = expectation.next_change();
    let leased = lease(outbox, "acme", 10).await;
    settle(outbox, leased, |_, _| Outcome::Delivered).await;
    change.await;
    let mut seen = Vec::new();
    while let Some(Watched::Change(change)) = watcher.take() {
        seen.push((
            change.event,
            change.record.event(change.event).state.to_proto(),
        ));
    }
    use crate::proto::DeliveryState::{Delivered, Queued};
    assert_eq!(
        seen,
        [
            (EventType::Identify, Queued),
            (EventType::Track, Queued),
            (EventType::Identify, Delivered),
            (EventType::Track, Delivered),
        ]
    );
    outbox.close().await;
    assert!(matches!(
        outbox.find(&id("acme"), "a").await,
        Err(OutboxError::Closed)
    ));
}

pub(crate) async fn integrations_are_kept(rig: &impl Rig) {
    let spec = |id: &str, name: &str| crate::proto::Integration {
        integration_id: id.into(),
        display_name: name.into(),
        incarnation: 1,
        ..Default::default()
    };
    let outbox = rig.open().await;
    outbox
        .put_integration(spec("b", "one"), None)
        .await
        .expect("stored");
    outbox
        .put_integration(spec("a", "two"), None)
        .await
        .expect("stored");
    outbox
        .put_integration(spec("b", "three"), Some(String::new()))
        .await
        .expect("stored");
    outbox.close().await;
    let outbox = rig.open().await;
    let expected = vec![spec("a", "two"), spec("b", "three")];
    assert_eq!(outbox.integrations().await, Ok(expected));
    outbox
        .delete_integration(&id("a"), String::new())
        .await
        .expect("deleted");
    assert_eq!(outbox.integrations().await, Ok(vec![spec("b", "three")]));
    outbox.close().await;
}

/// Erases all that is found of a person.
pub(crate) async fn notices_are_kept_in_order_until_they_are_done(rig: &impl Rig) {
    let outbox = rig.open().await;
    let notice =
        |facts: &str| Notice::new(Happening::Updated, &id("acme"), &[("n", facts.into())], NOW);
    let notices = [notice("1"), notice("2"), notice("3")];
    for one in &notices {
        outbox.put_notice(one.clone()).await.expect("stored");
    }
    outbox.delete_notice(&notices[1].id).await.expect("deleted");
    outbox.close().await;
    let outbox = rig.open().await;
    let kept = outbox.notices(10).await.expect("read");
    assert_eq!(kept, [notices[0].clone(), notices[2].clone()]);
    assert_eq!(outbox.notices(1).await.expect("read").len(), 1);
    outbox.close().await;
}
