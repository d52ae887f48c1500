//! One connection in HTTP/2, by the h2 crate. hyper's server is not used here: it offers no
//! setting for the bound on small unread frames, and its default closes the connections of
//! honest clients (docs/adr/0070-http2-by-h2.md).

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong, Reason, RecvStream, SendStream,
    server::{Builder, SendResponse},
};
use http::{Request, Response};
use http_body::Body;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::transport::Connection;
use crate::{
    config,
    grpc::{Activity, Answering, Calls, Incoming},
};

/// Bytes of a connection that may be unread.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes of one call that may be unread: a call that is not read leaves room for others.
const STREAM_WINDOW: u32 = CONNECTION_WINDOW / 4;
/// h2 counts an unread DATA frame of fewer than 256 bytes with what lacks, and closes the
/// connection beyond this sum. A window of frames of 20 bytes each counts 11.8 windows, so
/// flow control acts first unless frames are smaller than messages of gRPC ever are.
const SMALL_FRAMES: usize = 12 * CONNECTION_WINDOW as usize;
/// Size of all headers of a call, in bytes.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Streams that a client may open and reset before its connection is closed:
/// against rapid reset (CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 64;
/// A connection that was asked to end is closed once it had no call for this time: calls
/// that were sent before the client read the request to end arrive within it.
const LAST_CALLS: Duration = Duration::from_secs(1);
/// The share of a connection's age by which it may be older or younger, so that
/// those of one moment don't all end in one.
const AGE_JITTER: f64 = 0.1;

/// Answers the calls of a connection until it ends: of itself, asked to for its age or its
/// idleness, or once `closing`.
///
/// # Errors
/// The peer broke the protocol, or has gone.
pub(super) async fn serve(
    io: Connection,
    options: &config::Server,
    activity: Arc<Activity>,
    calls: Calls,
    closing: CancellationToken,
) -> Result<(), h2::Error> {
    let heard = io.heard();
    let http = builder(options);
    let mut connection = tokio::select! {
        begun = http.handshake(io) => begun?,
        () = closing.cancelled() => return Ok(()),
    };
    let calls = Arc::new(calls);
    let mut asked = pin!(asked_to_end(Arc::clone(&activity), options, &closing));
    let mut lost = pin!(lost(connection.ping_pong(), heard, options));
    let grace = loop {
        tokio::select! {
            call = connection.accept() => match call {
                Some(call) => begin(&calls, call?),
                None => return Ok(()),
            },
            grace = &mut asked => break grace,
            () = &mut lost => return close(connection).await,
        }
    };
    connection.graceful_shutdown();
    let mut over = pin!(ends_after(grace));
    let mut quiet = pin!(idle(Arc::clone(&activity), LAST_CALLS));
    loop {
        tokio::select! {
            call = connection.accept() => match call {
                Some(call) => begin(&calls, call?),
                None => return Ok(()),
            },
            () = &mut quiet => {
                // An answer that is not read is no call any more, but is still to be sent.
                if !connection.has_streams() {
                    return close(connection).await;
                }
                quiet.set(idle(Arc::clone(&activity), LAST_CALLS));
            }
            // What is left is cut off.
            () = &mut over => return close(connection).await,
            () = &mut lost => return close(connection).await,
        }
    }
}

type Http2 = h2::server::Connection<Connection, Bytes>;

/// Closes a connection for good, and waits for a peer that reads no longer than it has to.
async fn close(mut connection: Http2) -> Result<(), h2::Error> {
    connection.abrupt_shutdown(Reason::NO_ERROR);
    let closed = poll_fn(|context| connection.poll_closed(context));
    timeout(LAST_CALLS, closed).await.unwrap_or(Ok(()))
}

fn begin(calls: &Arc<Calls>, (request, respond): (Request<RecvStream>, SendResponse<Bytes>)) {
    tokio::spawn(answer(Arc::clone(calls), request, respond));
}

/// Ready when a connection has to end; with the time for its calls, where the drain has none.
async fn asked_to_end(
    activity: Arc<Activity>,
    options: &config::Server,
    closing: &CancellationToken,
) -> Option<Duration> {
    tokio::select! {
        () = closing.cancelled() => None,
        () = idle(activity, options.max_connection_idle) => Some(options.max_connection_age_grace),
        () = sleep(age(options.max_connection_age, fastrand::f64())) => {
            Some(options.max_connection_age_grace)
        }
    }
}

async fn ends_after(time: Option<Duration>) {
    match time {
        Some(time) => sleep(time).await,
        None => std::future::pending().await,
    }
}

/// Ready when the peer has sent nothing for the interval and then does not answer a PING.
async fn lost(pings: Option<PingPong>, heard: Arc<AtomicBool>, options: &config::Server) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        sleep(options.keepalive_interval).await;
        if heard.swap(false, Ordering::Relaxed) {
            continue;
        }
        let answered = timeout(options.keepalive_timeout, pings.ping(Ping::opaque())).await;
        if !matches!(answered, Ok(Ok(_))) {
            return;
        }
    }
}

/// Answers one call. Where its peer has ended it, so does the work for it.
async fn answer(calls: Arc<Calls>, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let mut answered = calls.answer(request.map(Incoming::new));
    let answered = poll_fn(|context| {
        let ready = answered.as_mut().poll(context).map(|answer| match answer {
            Ok(answer) => Some(answer),
            Err(never) => match never {},
        });
        if ready.is_pending() && respond.poll_reset(context).is_ready() {
            return Poll::Ready(None);
        }
        ready
    });
    let Some((head, body)) = answered.await.map(Response::into_parts) else {
        return;
    };
    let ends = body.is_end_stream();
    match respond.send_response(Response::from_parts(head, ()), ends) {
        Ok(stream) if !ends => {
            // An error says that the peer has gone.
            let _ = send(body, stream).await;
        }
        _ => {}
    }
}

/// Sends an answer's body as far as its peer reads.
async fn send(mut body: Answering, mut stream: SendStream<Bytes>) -> Result<(), h2::Error> {
    loop {
        let frame = poll_fn(|context| {
            if stream.poll_reset(context).is_ready() {
                return Poll::Ready(None);
            }
            Pin::new(&mut body).poll_frame(context).map(Some)
        });
        match frame.await {
            // The peer has ended the call.
            None => return Ok(()),
            Some(None) => return stream.send_data(Bytes::new(), true),
            Some(Some(Err(_))) => {
                stream.send_reset(Reason::INTERNAL_ERROR);
                return Ok(());
            }
            Some(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => {
                    let ends = body.is_end_stream();
                    if !data.is_empty() && !room(&mut stream).await? {
                        return Ok(());
                    }
                    stream.send_data(data, ends)?;
                    if ends {
                        return Ok(());
                    }
                }
                Err(other) => {
                    if let Ok(trailers) = other.into_trailers() {
                        stream.reserve_capacity(0);
                        return stream.send_trailers(trailers);
                    }
                }
            },
        }
    }
}

/// Waits until the peer takes more. It does not, where it has ended the call.
///
/// One byte is asked for, so that an answer in hand does not take the connection's window
/// from others; h2 asks for the rest.
async fn room(stream: &mut SendStream<Bytes>) -> Result<bool, h2::Error> {
    stream.reserve_capacity(1);
    poll_fn(|context| {
        while stream.capacity() == 0 {
            if stream.poll_reset(context).is_ready() {
                return Poll::Ready(Ok(false));
            }
            match stream.poll_capacity(context) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Ok(false)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(true))
    })
    .await
}

fn builder(options: &config::Server) -> Builder {
    let mut builder = Builder::new();
    builder
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_window_size(STREAM_WINDOW)
        .data_frame_budget(SMALL_FRAMES)
        .max_concurrent_streams(options.max_concurrent_streams)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        // Of ours: a call that is refused while its body comes is one, and no fault.
        .max_local_error_reset_streams(None);
    builder
}

/// The age of one connection; `random` is from 0 to 1.
fn age(middle: Duration, random: f64) -> Duration {
    middle.mul_f64(1.0 + AGE_JITTER * (2.0 * random - 1.0))
}

/// Ready when the peer has had no call for `longest`.
async fn idle(activity: Arc<Activity>, longest: Duration) {
    let mut since = Instant::now();
    loop {
        match activity.idle_since() {
            None => since = Instant::now(),
            Some(ended) => since = ended.map_or(since, |moment| moment.max(since)),
        }
        let left = (since + longest).saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_of_one_moment_end_within_a_fifth_of_their_age() {
        let ages = [0.0, 0.5, 1.0].map(|random| age(Duration::from_secs(1_000), random));
        assert_eq!(ages, [900, 1_000, 1_100].map(Duration::from_secs));
    }
}
