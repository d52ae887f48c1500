//! What the outbox asks of JetStream, beyond what async-nats has calls for: atomic
//! batches, and reading many messages at once.

#[cfg(test)]
pub(super) mod faults;

use std::{sync::Arc, time::Duration};

use async_nats::{
    Client, HeaderMap, Message, Request, RequestErrorKind,
    jetstream::{self, stream::Stream},
};
use bytes::Bytes;
use futures_util::StreamExt;
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

#[derive(Default, Serialize)]
struct GetMany<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_by_subj: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    multi_last: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_bytes: Option<usize>,
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

    /// Messages of a subject from a sequence on, at most `count` or about `max_bytes`;
    /// from any replica, so the newest may be missing. At least one if there is one.
    pub(super) async fn read(
        &self,
        stream: &str,
        subject: &str,
        from: u64,
        (count, max_bytes): (usize, usize),
    ) -> Result<Vec<Stored>, OutboxError> {
        #[cfg(test)]
        if self.faults.strikes(faults::Fault::Behind) {
            return Ok(Vec::new());
        }
        let request = GetMany {
            seq: Some(from.max(1)),
            next_by_subj: Some(subject),
            batch: Some(count),
            max_bytes: Some(max_bytes),
            ..GetMany::default()
        };
        self.get_many(stream, &request).await
    }

    /// The last message of each subject; from any replica, all as of one moment.
    pub(super) async fn last_of_each(
        &self,
        stream: &str,
        subjects: &[String],
    ) -> Result<Vec<Stored>, OutboxError> {
        let request = GetMany {
            multi_last: Some(subjects),
            ..GetMany::default()
        };
        self.get_many(stream, &request).await
    }

    async fn get_many(
        &self,
        stream: &str,
        request: &GetMany<'_>,
    ) -> Result<Vec<Stored>, OutboxError> {
        let payload = serde_json::to_vec(request).map_err(unavailable)?;
        let inbox = self.client.new_inbox();
        let mut answers = self
            .client
            .subscribe(inbox.clone())
            .await
            .map_err(unavailable)?;
        self.client
            .publish_with_reply(
                format!("$JS.API.DIRECT.GET.{stream}"),
                inbox,
                payload.into(),
            )
            .await
            .map_err(unavailable)?;
        let mut found = Vec::new();
        loop {
            let answer = tokio::time::timeout(ANSWER_TIMEOUT, answers.next()).await;
            let answer = answer.map_err(|_| unavailable("no answer to a read"))?;
            let Some(message) = answer else {
                return Err(unavailable("the connection was lost during a read"));
            };
            match message.status.map(|status| status.as_u16()) {
                Some(204) => return Ok(found),
                Some(404) if found.is_empty() => return Ok(found),
                Some(404) => return Err(unavailable("a message went while it was read")),
                Some(503) => return Err(unavailable("the stream cannot be read now")),
                Some(status) if status >= 400 => {
                    let why = message.description.unwrap_or_default();
                    return Err(unavailable(format!("a read was refused: {status} {why}")));
                }
                _ => found.push(stored(message)?),
            }
        }
    }

    fn stream(&self, name: &str) -> impl Future<Output = Result<Stream<()>, OutboxError>> + use<> {
        let (context, name) = (self.context.clone(), name.to_owned());
        async move { context.get_stream_no_info(name).await.map_err(unavailable) }
    }

    /// The last message of a subject, as the stream's leader has it.
    pub(super) async fn last(
        &self,
        stream: &str,
        subject: &str,
    ) -> Result<Option<(Stored, HeaderMap)>, OutboxError> {
        use jetstream::stream::LastRawMessageErrorKind::NoMessageFound;
        match self
            .stream(stream)
            .await?
            .get_last_raw_message_by_subject(subject)
            .await
        {
            Ok(message) => {
                let stored = Stored {
                    sequence: message.sequence,
                    subject: message.subject.to_string(),
                    payload: message.payload,
                };
                Ok(Some((stored, message.headers)))
            }
            Err(error) if error.kind() == NoMessageFound => Ok(None),
            Err(error) => Err(unavailable(error)),
        }
    }

    /// The first message of subjects from a sequence on, as the stream's leader has it.
    pub(super) async fn next(
        &self,
        stream: &str,
        subjects: &str,
        from: u64,
    ) -> Result<Option<Stored>, OutboxError> {
        use jetstream::stream::LastRawMessageErrorKind::NoMessageFound;
        let stream = self.stream(stream).await?;
        let found = stream.get_first_raw_message_by_subject(subjects, from);
        match found.await {
            Ok(message) => Ok(Some(Stored {
                sequence: message.sequence,
                subject: message.subject.to_string(),
                payload: message.payload,
            })),
            Err(error) if error.kind() == NoMessageFound => Ok(None),
            Err(error) => Err(unavailable(error)),
        }
    }

    /// A message by its sequence, as the stream's leader has it.
    pub(super) async fn at(
        &self,
        stream: &str,
        sequence: u64,
    ) -> Result<Option<Stored>, OutboxError> {
        use jetstream::stream::LastRawMessageErrorKind::NoMessageFound;
        match self.stream(stream).await?.get_raw_message(sequence).await {
            Ok(message) => Ok(Some(Stored {
                sequence: message.sequence,
                subject: message.subject.to_string(),
                payload: message.payload,
            })),
            Err(error) if error.kind() == NoMessageFound => Ok(None),
            Err(error) => Err(unavailable(error)),
        }
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

    /// How many messages each subject below a filter has.
    pub(super) async fn count(
        &self,
        stream: &str,
        filter: &str,
    ) -> Result<Vec<(String, u64)>, OutboxError> {
        let stream = self.stream(stream).await?;
        let mut found = Vec::new();
        let mut info = stream
            .info_with_subjects(filter)
            .await
            .map_err(unavailable)?;
        while let Some(next) = info.next().await {
            let (subject, count) = next.map_err(unavailable)?;
            found.push((subject, count as u64));
        }
        Ok(found)
    }
}

fn stored(message: Message) -> Result<Stored, OutboxError> {
    let header = |name: &str| {
        let headers = message.headers.as_ref()?;
        headers.get(name).map(|value| value.as_str().to_owned())
    };
    let sequence = header("Nats-Sequence").and_then(|value| value.parse().ok());
    match (sequence, header("Nats-Subject")) {
        (Some(sequence), Some(subject)) => Ok(Stored {
            sequence,
            subject,
            payload: message.payload,
        }),
        _ => Err(unavailable("a read was answered without a sequence")),
    }
}

pub(super) fn unavailable(error: impl std::fmt::Display) -> OutboxError {
    OutboxError::Unavailable(format!("JetStream: {error}"))
}
