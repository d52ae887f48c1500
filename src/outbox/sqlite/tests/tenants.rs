//! What a caller who is bound to one integration costs beside the dead letters of another,
//! counted in rows and in turns of the writer.

use futures_util::FutureExt;

use super::*;
use crate::{
    outbox::{DeadLetterFilter, Taken},
    proto::DeliveryReason,
};

/// Events of the large tenant that were given up.
const LARGE: u64 = 6_000;

async fn dead_letters(outbox: &SqliteOutbox, integration: &str, captures: usize) {
    for first in (0..captures).step_by(500) {
        let last = captures.min(first + 500);
        let new = (first..last).map(|number| {
            let capture = format!("{number:05}");
            new_capture(integration, &capture, 1)
        });
        let submitted = submit(outbox, new.collect()).await;
        assert!(
            submitted
                .iter()
                .all(|one| matches!(one, Submitted::Accepted(_)))
        );
        loop {
            // Bounded in bytes, too.
            let leased = lease(outbox, integration, 1_000).await;
            if leased.is_empty() {
                break;
            }
            let reason = DeliveryReason::Expired;
            settle(outbox, leased, |_, _| Outcome::DeadLetter { reason }).await;
        }
    }
    outbox.flush().await.expect("flushed");
}

fn wide(directory: &Path) -> SqliteOutbox {
    let options = SqliteOptions {
        limits: Limits {
            max_events: 1_000_000,
            max_bytes: 1 << 30,
            max_integration_events: 1_000_000,
            max_integration_bytes: 1 << 30,
        },
        ..options(directory)
    };
    SqliteOutbox::open(&options, &vault()).expect("opens")
}

fn of(integration: &str) -> DeadLetterFilter {
    DeadLetterFilter {
        integrations: Some(vec![id(integration)]),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_caller_pays_for_its_own_rows_and_nothing_is_done_alone_for_none() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = wide(directory.path());
    dead_letters(&outbox, "large", LARGE as usize / 2).await;
    dead_letters(&outbox, "small", 2).await;
    let all = outbox
        .dead_letters(of("large"), 0, 10)
        .await
        .expect("listed");
    let foreign: Vec<_> = all.iter().map(|letter| letter.id).collect();
    let reason = |integration| DeadLetterFilter {
        reason: Some(DeliveryReason::RequestRejected),
        ..of(integration)
    };
    let ids = Selection::Ids {
        ids: foreign.clone(),
        integrations: Some(vec![id("small")]),
    };
    let empty = [
        Selection::Filter(of("none")),
        Selection::Filter(reason("small")),
        ids,
    ];
    let looked_at = |before: u64| outbox.shared.scanned() - before;
    for (integration, letters) in [("none", 0), ("small", 4)] {
        let before = outbox.shared.scanned();
        let listed = outbox.dead_letters(of(integration), 0, 1_000).await;
        assert_eq!(listed.expect("listed").len(), letters);
        let counted = outbox.count_dead_letters(Selection::Filter(of(integration)), NOW);
        assert_eq!(counted.await.expect("counted").events, letters as u64);
        assert!(
            looked_at(before) <= 40,
            "{integration}: {}",
            looked_at(before)
        );
    }
    for selection in empty {
        let before = outbox.shared.scanned();
        assert_eq!(
            outbox.discard(selection.clone()).await,
            Ok(Taken::default())
        );
        let replayed = outbox.replay(selection, NOW).await;
        assert_eq!(replayed, Ok(Ok(Taken::default())));
        assert!(looked_at(before) <= 40, "{}", looked_at(before));
    }
    assert!(
        !outbox.exclusive.has_run(),
        "accepts were held up for nothing"
    );
    let discarded = outbox
        .discard(Selection::Filter(of("small")))
        .await
        .expect("done");
    assert_eq!(discarded.each().collect::<Vec<_>>(), [("small", 4)]);
    assert!(outbox.exclusive.has_run());
    let left = outbox
        .count_dead_letters(Selection::Filter(of("large")), NOW)
        .await;
    assert_eq!(left.expect("counted").events, LARGE);
    outbox.close().await;
}

#[tokio::test]
async fn what_callers_who_have_gone_asked_for_is_not_done() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = wide(directory.path());
    dead_letters(&outbox, "large", LARGE as usize / 2).await;
    let all = Selection::Filter(of("large"));
    let before = outbox.shared.scanned();
    outbox
        .count_dead_letters(all.clone(), NOW)
        .await
        .expect("counted");
    let one = outbox.shared.scanned() - before;
    assert!(one >= LARGE, "{one}");

    submit_one(&outbox, "small", "waits").await;
    outbox.flush().await.expect("flushed");
    let stalled = outbox.shared.hold();
    // The reader waits in it.
    let mut leased = std::pin::pin!(lease(&outbox, "small", 10));
    let before = outbox.shared.scanned();
    for _ in 0..200 {
        let list = outbox.dead_letters(of("large"), 0, 1_000).now_or_never();
        let count = outbox.count_dead_letters(all.clone(), NOW).now_or_never();
        assert!(list.is_none() && count.is_none());
    }
    assert!(leased.as_mut().now_or_never().is_none());
    drop(stalled);
    assert_eq!(ids(&leased.await), ["waits"]);
    outbox.count_dead_letters(all, NOW).await.expect("counted");
    let done = outbox.shared.scanned() - before;
    // One piece may have been taken before the reader was held.
    assert!(done <= one + 500, "{done} rows for {one}");
    outbox.close().await;
}

#[tokio::test]
async fn large_selections_are_walked_in_pieces_in_the_order_of_ids() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = wide(directory.path());
    // Interleaved ids in several lanes of two integrations.
    for (integration, captures) in [("a", 300), ("b", 300), ("c", 300)] {
        dead_letters(&outbox, integration, captures).await;
    }
    let both = DeadLetterFilter {
        integrations: Some(vec![id("c"), id("a"), id("none")]),
        ..Default::default()
    };
    let listed = outbox
        .dead_letters(both.clone(), 0, 10_000)
        .await
        .expect("listed");
    assert_eq!(listed.len(), 1_200);
    assert!(listed.is_sorted_by_key(|letter| letter.id));
    assert!(
        listed
            .iter()
            .all(|letter| letter.record.integration_id != id("b"))
    );
    let mut paged = Vec::new();
    loop {
        let after = paged
            .last()
            .map_or(0, |letter: &crate::outbox::DeadLetter| letter.id);
        let page = outbox
            .dead_letters(both.clone(), after, 97)
            .await
            .expect("listed");
        if page.is_empty() {
            break;
        }
        paged.extend(page);
    }
    assert_eq!(paged, listed);
    let count = outbox
        .count_dead_letters(Selection::Filter(both), NOW)
        .await;
    assert_eq!(count.expect("counted").events, 1_200);
    let everything = Selection::Filter(DeadLetterFilter::default());
    let count = outbox
        .count_dead_letters(everything, NOW)
        .await
        .expect("counted");
    assert_eq!(count.events, 1_800);
    outbox.close().await;
}
