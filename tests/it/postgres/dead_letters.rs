//! Dead letters that are replayed, discarded and erased at several relays.

use std::collections::HashSet;

use segment_relay::{
    proto::{
        Capture, DeadLetter, DeadLetterFilter, DeleteIntegrationRequest, DeliveryReason,
        DeliveryState, DiscardDeadLettersRequest, ReplayDeadLettersRequest, WaitFor,
        dead_letter_service_client::DeadLetterServiceClient,
        integration_service_client::IntegrationServiceClient,
    },
    sandbox::Rule,
};
use tokio_postgres::NoTls;

use super::{Fleet, capture_of};
use crate::{
    harness::{PATIENCE, acme, reason, states},
    postgres_server,
};

/// What a replay or a discard selects.
enum Letters<'a> {
    All,
    These(&'a [DeadLetter]),
}

impl Letters<'_> {
    fn selection(&self) -> (Option<DeadLetterFilter>, Vec<String>) {
        match self {
            Self::All => (Some(DeadLetterFilter::default()), Vec::new()),
            Self::These(letters) => {
                let ids = letters.iter().map(|one| one.dead_letter_id.clone());
                (None, ids.collect())
            }
        }
    }
}

/// `\x08051009` is DEAD_LETTERED for REQUEST_REJECTED.
const GIVE_UP: &str = "
    BEGIN;
    WITH gone AS (DELETE FROM queue RETURNING *)
    INSERT INTO dead_letters (integration, seq, event, reason, dead_millis, accept_millis, bytes,
        payload)
    SELECT c.integration, g.seq, e.event, 9, c.accept_millis, c.accept_millis, e.bytes, e.payload
    FROM gone g JOIN captures c ON c.seq = g.seq, LATERAL (VALUES
        (1::int2, g.identify, g.identify_bytes), (2::int2, g.track, g.track_bytes)
    ) AS e (event, payload, bytes) ORDER BY g.seq, e.event;
    UPDATE captures c SET identify = '\\x08051009', track = '\\x08051009'
    WHERE EXISTS (SELECT 1 FROM dead_letters d WHERE d.seq = c.seq);
    UPDATE backlog SET events = 0, bytes = 0;
    UPDATE lanes SET blocked_until = NULL;
    COMMIT";

impl Fleet {
    async fn replay(&self, relay: usize, letters: Letters<'_>) -> u64 {
        let (filter, dead_letter_ids) = letters.selection();
        let request = ReplayDeadLettersRequest {
            filter,
            dead_letter_ids,
            ..ReplayDeadLettersRequest::default()
        };
        let mut client = DeadLetterServiceClient::new(self.channel(relay));
        let answer = client.replay_dead_letters(request).await.expect("replayed");
        answer.into_inner().event_count
    }

    async fn discard(&self, relay: usize, letters: Letters<'_>) -> u64 {
        let (filter, dead_letter_ids) = letters.selection();
        let request = DiscardDeadLettersRequest {
            filter,
            dead_letter_ids,
            ..DiscardDeadLettersRequest::default()
        };
        let mut client = DeadLetterServiceClient::new(self.channel(relay));
        let answer = client.discard_dead_letters(request).await;
        answer.expect("discarded").into_inner().event_count
    }

    /// Accepts captures, and makes dead letters of them as a settlement does.
    async fn give_up(&self, captures: Vec<Capture>) {
        let connected = tokio_postgres::connect(&self.urls, NoTls).await;
        let (client, connection) = connected.expect("connected");
        tokio::spawn(connection);
        let held = "UPDATE lanes SET blocked_until = now() + interval '1 minute'";
        client.batch_execute(held).await.expect("held");
        let results = self.batch(0, captures, WaitFor::Accepted).await;
        assert!(results.iter().all(|result| result.error.is_none()));
        client.batch_execute(GIVE_UP).await.expect("given up");
    }

    /// Waits until there are so many dead letters.
    async fn given_up(&self, relay: usize, count: usize) -> Vec<DeadLetter> {
        let given_up = async {
            loop {
                let letters = self.letters(relay).await;
                if letters.len() == count {
                    return letters;
                }
                tokio::task::yield_now().await;
            }
        };
        let given_up = tokio::time::timeout(PATIENCE, given_up).await;
        given_up.expect("the lanes go on")
    }

    /// Both events of a capture are delivered, as the relay says.
    async fn is_delivered(&self, relay: usize, capture: Capture) {
        let result = self.capture(relay, capture, WaitFor::Delivered).await;
        let result = result.expect("accepted");
        assert_eq!(states(&result.events), [DeliveryState::Delivered; 2]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_that_is_replayed_event_by_event_is_delivered_once_and_its_lane_goes_on() {
    let Some(database) = postgres_server::database() else {
        return;
    };
    let mut fleet = Fleet::start(database.url(), 2).await;
    fleet.create(0, acme()).await.expect("created");
    // The second event while the first is on its way.
    let slow = Rule {
        delay_ms: Some(200),
        ..Rule::default()
    };
    let mut arrived = 0;
    for [first, second] in [[0, 0], [0, 1], [1, 0], [1, 1]] {
        let capture = capture_of(1, &format!("pair-{first}-{second}"));
        fleet.give_up(vec![capture.clone()]).await;
        let letters = fleet.letters(0).await;
        assert_eq!(letters.len(), 2);
        fleet.misbehave(slow.clone());
        let identify = fleet.replay(first, Letters::These(&letters[..1])).await;
        let track = fleet.replay(second, Letters::These(&letters[1..])).await;
        let again = fleet.replay(second, Letters::These(&letters[1..])).await;
        assert_eq!((identify, track, again), (1, 1, 0));
        fleet.is_delivered(second, capture).await;
        arrived += 2;
        fleet.arrived(arrived).await;
    }
    // Both at once, and a capture of the same lane meanwhile.
    fleet.give_up(vec![capture_of(1, "pair")]).await;
    let letters = fleet.letters(1).await;
    fleet.misbehave(slow);
    let (identify, track, ()) = tokio::join!(
        fleet.replay(0, Letters::These(&letters[..1])),
        fleet.replay(1, Letters::These(&letters[1..])),
        fleet.is_delivered(1, capture_of(1, "meanwhile")),
    );
    assert_eq!((identify, track), (1, 1));
    fleet.is_delivered(0, capture_of(1, "pair")).await;
    fleet.behave();
    for relay in [0, 1] {
        let later = capture_of(1, &format!("later-{relay}"));
        fleet.is_delivered(relay, later).await;
    }
    arrived += 8;
    fleet.arrived(arrived).await;
    assert_eq!(fleet.letters(0).await, []);
    fleet.restart_sends_nothing().await;
    fleet.is_delivered(0, capture_of(1, "last")).await;
    fleet.arrived(arrived + 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_of_several_hundred_sends_each_event_once() {
    const CAPTURES: usize = 300;
    let Some(database) = postgres_server::database() else {
        return;
    };
    let mut fleet = Fleet::start(database.url(), 2).await;
    fleet.create(0, acme()).await.expect("created");
    let captures = (0..CAPTURES).map(|number| capture_of(number % 20, &format!("c-{number}")));
    fleet.give_up(captures.collect()).await;
    let letters = 2 * CAPTURES as u64;
    assert_eq!(fleet.replay(1, Letters::All).await, letters);
    fleet.arrived(2 * CAPTURES).await;
    for person in 0..20 {
        let later = capture_of(person, &format!("later-{person}"));
        fleet.is_delivered(person % 2, later).await;
    }
    fleet.arrived(2 * CAPTURES + 40).await;
    assert_eq!(fleet.letters(0).await, []);
    fleet.restart_sends_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_replay_and_a_discard_at_once_each_event_is_sent_or_gone() {
    // More than one transaction of a replay or a discard takes.
    const CAPTURES: usize = 400;
    let Some(database) = postgres_server::database() else {
        return;
    };
    let mut fleet = Fleet::start(database.url(), 2).await;
    fleet.create(0, acme()).await.expect("created");
    let captures = (0..CAPTURES).map(|number| capture_of(number % 5, &format!("c-{number}")));
    fleet.give_up(captures.collect()).await;
    let (replayed, discarded) = tokio::join!(
        fleet.replay(0, Letters::All),
        fleet.discard(1, Letters::All)
    );
    assert_eq!(replayed + discarded, 2 * CAPTURES as u64);
    assert_eq!(fleet.letters(0).await, []);
    let replayed = usize::try_from(replayed).expect("few");
    fleet.arrived(replayed).await;
    for person in 0..5 {
        let later = capture_of(person, &format!("later-{person}"));
        fleet.is_delivered(person % 2, later).await;
    }
    fleet.arrived(replayed + 10).await;
    fleet.restart_sends_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_and_a_forced_deletion_get_replayed_events_out() {
    let Some(database) = postgres_server::database() else {
        return;
    };
    let mut fleet = Fleet::start(database.url(), 2).await;
    fleet.create(0, acme()).await.expect("created");
    fleet
        .give_up(vec![capture_of(1, "erased"), capture_of(2, "deleted")])
        .await;
    fleet.refuse(503);
    let letters = fleet.letters(0).await;
    for (place, letter) in letters.iter().enumerate() {
        let one = std::slice::from_ref(letter);
        assert_eq!(fleet.replay(place % 2, Letters::These(one)).await, 1);
    }
    let receipt = fleet.erase(1, 1).await;
    assert!(receipt.completed);
    assert_eq!(receipt.waiting_event_count, 2);
    let request = DeleteIntegrationRequest {
        integration_id: "acme".into(),
        force: true,
        ..DeleteIntegrationRequest::default()
    };
    let mut integrations = IntegrationServiceClient::new(fleet.channel(0));
    let deleted = integrations.delete_integration(request).await;
    assert_eq!(
        deleted.expect("deleted").into_inner().dead_lettered_events,
        2
    );
    let given_up = fleet.given_up(1, 2).await;
    let of = |letter: &DeadLetter| {
        let event = letter.event.as_ref().expect("an event");
        (letter.capture_id.clone(), event.reason())
    };
    let deleted = ("deleted".to_owned(), DeliveryReason::IntegrationDeleted);
    assert_eq!(
        given_up.iter().map(of).collect::<HashSet<_>>(),
        HashSet::from([deleted])
    );
    fleet.behave();
    fleet.restart_sends_nothing().await;
    let created = fleet.create(1, acme()).await;
    created.unwrap_or_else(|status| panic!("{status}: {}", reason(&status)));
    for person in [1, 2] {
        let later = capture_of(person, &format!("later-{person}"));
        fleet.is_delivered(person % 2, later).await;
    }
    fleet.arrived(4).await;
    // What the deleted one has left is never sent with the new one's key.
    assert_eq!(fleet.replay(1, Letters::All).await, 0);
    assert_eq!(fleet.given_up(1, 2).await.len(), 2);
    fleet.restart_sends_nothing().await;
}
