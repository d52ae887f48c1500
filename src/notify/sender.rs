//! Sends what is to be told.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Notices;
use crate::{config, notice::Notice, time::UnixMillis};

/// Longest request.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Waits after failures in a row; the last one repeats.
const WAITS_SECONDS: [u64; 6] = [5, 30, 120, 600, 1_800, 7_200];
/// A notice that could not be told for so long is given up.
const MAX_AGE: Duration = Duration::from_secs(3 * 24 * 3_600);
/// Wait after the outbox failed.
const OUTBOX_RETRY: Duration = Duration::from_secs(5);
/// Notices that are read at once.
const READ: usize = 16;

/// How notices are sent.
#[derive(Clone, Debug)]
pub struct SenderOptions {
    /// Where they go, and what signs them.
    pub notify: config::Notify,
    /// Waits after failures are divided by this: for tests.
    pub haste: u32,
}

/// Sends until `stop`; what is left is sent after the next start.
pub async fn run(notices: Notices, options: SenderOptions, stop: CancellationToken) {
    let client = match client(&options.notify) {
        Ok(client) => client,
        Err(error) => {
            tracing::error!(%error, "no notifications are sent");
            return;
        }
    };
    let work = async {
        let mut failures = 0;
        loop {
            match notices.stored(READ).await {
                Ok(waiting) if waiting.is_empty() => notices.rung().await,
                Ok(waiting) => {
                    for notice in waiting {
                        if !attempt(&client, &options, &notices, &notice, &mut failures).await {
                            break;
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot read the notifications; trying again");
                    tokio::time::sleep(OUTBOX_RETRY).await;
                }
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

/// Sends one notice, or waits after a failure; returns whether it is done with.
async fn attempt(
    client: &reqwest::Client,
    options: &SenderOptions,
    notices: &Notices,
    notice: &Notice,
    failures: &mut usize,
) -> bool {
    let outcome = send(client, &options.notify, notice).await;
    if let Err(error) = &outcome {
        if UnixMillis::now().since(notice.time) < MAX_AGE {
            let last = WAITS_SECONDS.len() - 1;
            let wait = WAITS_SECONDS[(*failures).min(last)];
            *failures += 1;
            tracing::warn!(id = notice.id, error, wait_seconds = wait, "not notified");
            // Half to all of it, so that several relays don't come at once.
            let jitter = 0.5 + fastrand::f64() / 2.0;
            let wait = Duration::from_secs(wait).mul_f64(jitter) / options.haste;
            tokio::time::sleep(wait).await;
            return false;
        }
        tracing::error!(id = notice.id, error, "a notification is given up");
    } else {
        *failures = 0;
    }
    if let Err(error) = notices.done(&notice.id).await {
        tracing::warn!(%error, "a notification will be sent twice");
        tokio::time::sleep(OUTBOX_RETRY).await;
        return false;
    }
    true
}

async fn send(
    client: &reqwest::Client,
    notify: &config::Notify,
    notice: &Notice,
) -> Result<(), String> {
    // Of the attempt, since receivers refuse old ones.
    let timestamp = UnixMillis::now().0.div_euclid(1_000);
    let signature = notify.secret.sign(&notice.id, timestamp, &notice.body);
    let answer = client
        .post(notify.url.as_str())
        .header(http::header::CONTENT_TYPE, "application/json")
        .header("webhook-id", &notice.id)
        .header("webhook-timestamp", timestamp)
        .header("webhook-signature", signature)
        .body(notice.body.clone())
        .send()
        .await
        .map_err(|error| innermost(&error))?;
    // The answer's body is not read.
    if answer.status().is_success() {
        Ok(())
    } else {
        Err(format!("HTTP {}", answer.status().as_u16()))
    }
}

fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn client(notify: &config::Notify) -> Result<reqwest::Client, reqwest::Error> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut client = reqwest::Client::builder()
        .user_agent(concat!("segment-relay/", env!("CARGO_PKG_VERSION")))
        .timeout(TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy();
    if !notify.url.is_tls() {
        // Plain HTTP to loopback needs no trust roots, which a bare machine lacks.
        client = client.tls_certs_only([]);
    }
    client.build()
}
