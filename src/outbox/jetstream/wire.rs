//! What the outbox asks of JetStream, beyond what async-nats has calls for: atomic
//! batches, and reading many messages at once.

#[cfg(test)]
pub(super) mod faults;
mod read;

use std::{sync::Arc, time::Duration};

use async_nats::{
    Client, HeaderMap, Request, RequestErrorKind,
    jetstream::{self, stream::Stream},
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::{ANSWER_TIMEOUT, OutboxError};

/// Error codes of the servers: the sequence that was expected is not the last one.
const WRONG_LAST_SEQUENCE: [u64; 2] = [10_071, 10_164];
/// Too many batches are under way at the stream, so that this one was not begun.
const NOT_BEGUN: [u64; 2] = [10_176, 10_210];
/// Tries of a batch that was not begun.
const BEGIN_TRIES: u32 = 20;
/// Batches under way at once: a stream takes 50 of all relays together.
const BATCHES: usize = 12;

/// A message to delete is not there: the HTTP-like code, and the code of its own.
const NOT_FOUND: u64 = 404;
const NO_SUCH_SEQUENCE: u64 = 10_043;
/// What servers say of a message that was deleted before, under a code for any failure.
const DELETED_BEFORE: &str = "no message found";

/// A message to store.
#[derive(Clone, Debug)]
pub(super) struct ToStore {
    pub(super) subject: String,
    pub(super) payload: Bytes,
    /// What has to be the last sequence of the subject; 0 for none.
    pub(super) expected: Option<u64>,
    /// How long it is kept.
    pub(super) keep: Option<Duration>,
}

/// A stored message.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) sequence: u64,
    pub(super) subject: String,
    pub(super) payload: Bytes,
}

/// Why nothing was stored, or why nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum StoreError {
    /// Another message came first.
    #[error("another relay was faster")]
    Conflict,
    /// The stream has too much to do.
    #[error("too many batches at once")]
    NotBegun,
    /// The servers refused it.
    #[error("{0}")]
    Refused(String),
    /// No answer: it may be stored or not.
    #[error("no answer: {0}")]
    Unknown(String),
}

impl From<StoreError> for OutboxError {
    fn from(error: StoreError) -> Self {
        Self::Unavailable(format!("JetStream: {error}"))
    }
}

#[derive(Deserialize)]
struct Ack {
    #[serde(default)]
    seq: u64,
    error: Option<ApiError>,
}

#[derive(Deserialize)]
struct ApiError {
    #[serde(default)]
    code: u64,
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

#[derive(Serialize)]
struct Delete {
    seq: u64,
    no_erase: bool,
}

#[derive(Deserialize)]
struct Answer {
    error: Option<ApiError>,
}

/// The connection.
#[derive(Clone)]
pub(super) struct Wire {
    pub(super) client: Client,
    pub(super) context: jetstream::Context,
    batches: Arc<Semaphore>,
    #[cfg(test)]
    pub(super) faults: faults::Faults,
}

impl Wire {
    pub(super) fn new(client: Client) -> Self {
        let context = jetstream::ContextBuilder::new()
            .timeout(ANSWER_TIMEOUT)
            .build(client.clone());
        Self {
            client,
            context,
            batches: Arc::new(Semaphore::new(BATCHES)),
            #[cfg(test)]
            faults: faults::Faults::default(),
        }
    }

    /// Stores all of the messages or none; returns the sequence of the first. The
    /// others have the ones that follow.
    pub(super) async fn store(&self, messages: Vec<ToStore>) -> Result<u64, StoreError> {
        let _turn = self.batches.acquire().await;
        for _ in 1..BEGIN_TRIES {
            match self.try_store(messages.clone()).await {
                Err(StoreError::NotBegun) => {
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(5..50))).await;
                }
                stored => return stored,
            }
        }
        self.try_store(messages).await
    }

    async fn try_store(&self, messages: Vec<ToStore>) -> Result<u64, StoreError> {
        let count = messages.len() as u64;
        // Of the few that are open at a time; servers look through all headers for each of theirs.
        let batch = (count > 1).then(|| format!("{:016x}", fastrand::u64(..)));
        let mut last = None;
        for (index, message) in (1_u64..).zip(messages) {
            let mut headers = HeaderMap::new();
            if let Some(expected) = message.expected {
                headers.insert("Nats-Expected-Last-Subject-Sequence", expected.to_string());
            }
            if let Some(keep) = message.keep {
                headers.insert("Nats-TTL", format!("{}s", keep.as_secs().max(1)));
            }
            if let Some(batch) = &batch {
                headers.insert("Nats-Batch-Id", batch.as_str());
                headers.insert("Nats-Batch-Sequence", index.to_string());
            }
            if index < count {
                self.client
                    .publish_with_headers(message.subject, headers, message.payload)
                    .await
                    .map_err(|error| StoreError::Unknown(error.to_string()))?;
                continue;
            }
            if batch.is_some() {
                headers.insert("Nats-Batch-Commit", "1");
            }
            last = Some((message.subject, headers, message.payload));
        }
        let Some((subject, headers, payload)) = last else {
            return Ok(0);
        };
        let request = Request::new()
            .headers(headers)
            .payload(payload)
            .timeout(Some(ANSWER_TIMEOUT));
        let answer =
            self.client
                .send_request(subject, request)
                .await
                .map_err(|error| match error.kind() {
                    // Nobody has taken it: the stream has no leader now.
                    RequestErrorKind::NoResponders => {
                        StoreError::Refused("the stream has no leader now".to_owned())
                    }
                    _ => StoreError::Unknown(error.to_string()),
                })?;
        let ack: Ack = serde_json::from_slice(&answer.payload)
            .map_err(|error| StoreError::Unknown(error.to_string()))?;
        #[cfg(test)]
        if self.faults.strikes(faults::Fault::LostAnswer) {
            return Err(StoreError::Unknown("planted".to_owned()));
        }
        match ack.error {
            None => Ok(ack.seq + 1 - count),
            Some(error) if WRONG_LAST_SEQUENCE.contains(&error.err_code) => {
                Err(StoreError::Conflict)
            }
            Some(error) if NOT_BEGUN.contains(&error.err_code) => Err(StoreError::NotBegun),
            Some(error) => Err(StoreError::Refused(error.description)),
        }
    }

    fn stream(&self, name: &str) -> impl Future<Output = Result<Stream<()>, OutboxError>> + use<> {
        let (context, name) = (self.context.clone(), name.to_owned());
        async move { context.get_stream_no_info(name).await.map_err(unavailable) }
    }

    /// Removes a message; `erase` overwrites it on the disk, which takes the servers longer.
    pub(super) async fn delete(
        &self,
        stream: &str,
        sequence: u64,
        erase: bool,
    ) -> Result<(), OutboxError> {
        #[cfg(test)]
        if erase && self.faults.strikes(faults::Fault::Delete) {
            return Err(unavailable("planted"));
        }
        let request = Delete {
            seq: sequence,
            no_erase: !erase,
        };
        let subject = format!("STREAM.MSG.DELETE.{stream}");
        let answer: Answer = self
            .context
            .request(subject, &request)
            .await
            .map_err(unavailable)?;
        match answer.error {
            // It is gone already.
            Some(error)
                if error.code == NOT_FOUND
                    || error.err_code == NO_SUCH_SEQUENCE
                    || error.description == DELETED_BEFORE =>
            {
                Ok(())
            }
            Some(error) => Err(unavailable(error.description)),
            None => Ok(()),
        }
    }

    /// Removes the messages of a subject before a sequence.
    pub(super) async fn purge_before(
        &self,
        stream: &str,
        subject: &str,
        sequence: u64,
    ) -> Result<(), OutboxError> {
        #[cfg(test)]
        if self.faults.strikes(faults::Fault::Purge) {
            return Err(unavailable("planted"));
        }
        let stream = self.stream(stream).await?;
        let purge = stream.purge().filter(subject).sequence(sequence);
        purge.await.map(drop).map_err(unavailable)
    }
}

pub(super) fn unavailable(error: impl std::fmt::Display) -> OutboxError {
    OutboxError::Unavailable(format!("JetStream: {error}"))
}
