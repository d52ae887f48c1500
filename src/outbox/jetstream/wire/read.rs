//! Reads messages: many at once from any replica, single ones from the stream's leader.

use async_nats::{
    HeaderMap, Message,
    jetstream::{
        message::StreamMessage,
        stream::{LastRawMessageError, LastRawMessageErrorKind},
    },
};
use futures_util::StreamExt;
use serde::Serialize;

use super::{Stored, Wire, unavailable};
use crate::outbox::{OutboxError, jetstream::ANSWER_TIMEOUT};

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

impl Wire {
    /// Messages of a subject from a sequence on, at most `count` or about `max_bytes`;
    /// from any replica, so the newest may be missing. At least one if there is one.
    pub(in super::super) async fn read(
        &self,
        stream: &str,
        subject: &str,
        from: u64,
        (count, max_bytes): (usize, usize),
    ) -> Result<Vec<Stored>, OutboxError> {
        #[cfg(test)]
        if self.faults.strikes(super::faults::Fault::Behind) {
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
    pub(in super::super) async fn last_of_each(
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

    /// The last message of a subject, as the stream's leader has it.
    pub(in super::super) async fn last(
        &self,
        stream: &str,
        subject: &str,
    ) -> Result<Option<(Stored, HeaderMap)>, OutboxError> {
        let stream = self.stream(stream).await?;
        found(stream.get_last_raw_message_by_subject(subject).await)
    }

    /// The first message of subjects from a sequence on, as the stream's leader has it.
    pub(in super::super) async fn next(
        &self,
        stream: &str,
        subjects: &str,
        from: u64,
    ) -> Result<Option<Stored>, OutboxError> {
        let stream = self.stream(stream).await?;
        let next = stream.get_first_raw_message_by_subject(subjects, from);
        Ok(found(next.await)?.map(|(stored, _)| stored))
    }

    /// A message by its sequence, as the stream's leader has it.
    pub(in super::super) async fn at(
        &self,
        stream: &str,
        sequence: u64,
    ) -> Result<Option<Stored>, OutboxError> {
        let stream = self.stream(stream).await?;
        Ok(found(stream.get_raw_message(sequence).await)?.map(|(stored, _)| stored))
    }

    /// How many messages each subject below a filter has.
    pub(in super::super) async fn count(
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

/// What the leader has answered.
fn found(
    answer: Result<StreamMessage, LastRawMessageError>,
) -> Result<Option<(Stored, HeaderMap)>, OutboxError> {
    match answer {
        Ok(message) => {
            let stored = Stored {
                sequence: message.sequence,
                subject: message.subject.to_string(),
                payload: message.payload,
            };
            Ok(Some((stored, message.headers)))
        }
        Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(unavailable(error)),
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
