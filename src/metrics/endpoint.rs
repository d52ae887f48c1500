//! `GET /metrics`, for Prometheus.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::Metrics;

/// Connections at once. One more ends the oldest one: a scraper has its answer within
/// milliseconds, and silent connections must not keep it out.
const MAX_CONNECTIONS: usize = 64;
/// Longest time for a request's head, and longest life of a connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);
/// Wait after the system could not give a connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, metrics: Metrics, stop: CancellationToken) {
    let mut open: VecDeque<CancellationToken> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((tcp, _)) = accepted else {
            tokio::time::sleep(ACCEPT_RETRY).await;
            continue;
        };
        open.retain(|one| !one.is_cancelled());
        if open.len() >= MAX_CONNECTIONS
            && let Some(oldest) = open.pop_front()
        {
            oldest.cancel();
        }
        let end = stop.child_token();
        open.push_back(end.clone());
        tokio::spawn(serve_one(tcp, metrics.clone(), end));
    }
}

/// Serves a connection until it ends, or is to end; `end` is cancelled then.
async fn serve_one(tcp: TcpStream, metrics: Metrics, end: CancellationToken) {
    let service = service_fn(|request| {
        let answer = answer(&request, &metrics);
        async { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(tcp), service);
    tokio::select! {
        () = end.cancelled() => {}
        // What a scraper does that has gone concerns no other.
        _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection) => {}
    }
    end.cancel();
}

fn answer(request: &Request<Incoming>, metrics: &Metrics) -> Response<Full<Bytes>> {
    let text = |status: StatusCode, text: String| {
        let mut answer = Response::new(Full::new(Bytes::from(text)));
        *answer.status_mut() = status;
        let kind = "text/plain; version=0.0.4; charset=utf-8";
        let kind = http::HeaderValue::from_static(kind);
        answer.headers_mut().insert(CONTENT_TYPE, kind);
        answer
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => text(StatusCode::OK, metrics.text()),
        (_, "/metrics") => text(StatusCode::METHOD_NOT_ALLOWED, "GET /metrics\n".to_owned()),
        _ => text(StatusCode::NOT_FOUND, "GET /metrics\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn silent_connections_keep_no_scraper_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, Metrics::off(), stop.clone()));
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS * 2 {
            silent.push(TcpStream::connect(address).await.expect("connects"));
        }
        let mut scraper = TcpStream::connect(address).await.expect("connects");
        let request = b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        scraper.write_all(request).await.expect("written");
        let mut answer = String::new();
        let read = scraper.read_to_string(&mut answer);
        tokio::time::timeout(HEAD_TIMEOUT / 2, read)
            .await
            .expect("at once")
            .expect("read");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // The oldest ones were ended, the others are open.
        let mut byte = [0];
        assert_eq!(silent[0].read(&mut byte).await.expect("ended"), 0);
        stop.cancel();
        server.await.expect("no panic");
    }
}
