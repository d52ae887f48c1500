//! Notices that nobody takes.

use super::*;
use crate::notice::{Happening, Notice};

#[tokio::test]
async fn of_too_many_notices_the_oldest_go() {
    let directory = tempfile::tempdir().expect("a directory");
    let outbox = open(directory.path());
    let notice = |number: i64| {
        let time = UnixMillis(number);
        Notice::new(Happening::Tested, &id("acme"), &[], time)
    };
    for first in (0..1_250).step_by(250) {
        let puts = (first..first + 250).map(|number| outbox.put_notice(notice(number)));
        for put in futures_util::future::join_all(puts).await {
            put.expect("stored");
        }
    }
    let kept = outbox.notices(2_000).await.expect("read");
    assert_eq!(kept.len(), 1_000);
    assert!(kept.iter().all(|one| one.time >= UnixMillis(250)));
    outbox.close().await;
}
