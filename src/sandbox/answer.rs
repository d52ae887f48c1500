//! Answers, also such as break off.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use ::http::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use ::http::{Response, StatusCode};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use serde::Serialize;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

/// How long the part of a broken answer has for its way to the client before the
/// connection is closed behind it.
const PART_ON_ITS_WAY: Duration = Duration::from_millis(20);

/// What is answered instead of 200.
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) message: String,
}

/// An answer's body.
pub(super) enum AnswerBody {
    /// All of it at once.
    Whole(Option<Bytes>),
    /// A part of what was announced; then the connection is closed.
    Broken {
        part: Option<Bytes>,
        announced: u64,
        /// Set when the part has been handed on.
        pause: Option<Pin<Box<Sleep>>>,
        close: CancellationToken,
    },
}

impl AnswerBody {
    /// The first half of `whole`, with `close` cancelled shortly afterwards.
    pub(super) fn broken(whole: &Bytes, close: CancellationToken) -> Self {
        Self::Broken {
            part: Some(whole.slice(..whole.len() / 2)),
            announced: whole.len() as u64,
            pause: None,
            close,
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Broken {
                part, pause, close, ..
            } => {
                if let Some(part) = part.take() {
                    return Poll::Ready(Some(Ok(Frame::data(part))));
                }
                let pause =
                    pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(PART_ON_ITS_WAY)));
                if pause.as_mut().poll(context).is_ready() {
                    // Whoever serves the connection drops it, and this body with it.
                    close.cancel();
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::Whole(bytes) => bytes.as_ref().map_or(0, |bytes| bytes.len() as u64),
            Self::Broken { announced, .. } => *announced,
        })
    }
}

/// An answer with a body of the given type.
pub(super) fn answer(
    status: StatusCode,
    content_type: &'static str,
    body: AnswerBody,
) -> Response<AnswerBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// Plain text, answered 200.
pub(super) fn text(text: impl Into<Bytes>) -> Response<AnswerBody> {
    let body = AnswerBody::Whole(Some(text.into()));
    answer(StatusCode::OK, "text/plain; charset=utf-8", body)
}

/// A value as JSON, answered 200.
pub(super) fn json(value: &impl Serialize) -> Response<AnswerBody> {
    match serde_json::to_vec(value) {
        Ok(json) => {
            let body = AnswerBody::Whole(Some(json.into()));
            answer(StatusCode::OK, "application/json", body)
        }
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// `{"success": false, "message": …}`.
pub(super) fn problem(status: StatusCode, message: &str) -> Response<AnswerBody> {
    let json = problem_json(message);
    answer(status, "application/json", AnswerBody::Whole(Some(json)))
}

/// The body of [`problem`].
pub(super) fn problem_json(message: &str) -> Bytes {
    let json = serde_json::json!({"success": false, "message": message});
    json.to_string().into()
}

/// 405 with the methods that would be right.
pub(super) fn wrong_method(allowed: &'static str) -> Response<AnswerBody> {
    let message = format!("the methods here are: {allowed}");
    let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, &message);
    let allowed = HeaderValue::from_static(allowed);
    response.headers_mut().insert(ALLOW, allowed);
    response
}
