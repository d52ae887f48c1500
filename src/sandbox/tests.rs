//! The imitation over real loopback connections.

mod faults;
mod requests;

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Client, RequestBuilder, Response};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Region, Sandbox, SandboxOptions, Stats, run};

/// Long enough for a busy machine; a test that passes never waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// A sandbox with a listener for each region.
struct Running {
    sandbox: Arc<Sandbox>,
    non_eu: SocketAddr,
    eu: SocketAddr,
    client: Client,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn start() -> Self {
        Self::start_with(SandboxOptions::default()).await
    }

    async fn start_with(options: SandboxOptions) -> Self {
        let sandbox = Arc::new(Sandbox::new(options));
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        for region in [Region::NonEu, Region::Eu] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            addresses.push(listener.local_addr().expect("an address"));
            listeners.push((region, listener));
        }
        let shutdown = CancellationToken::new();
        let running = run(listeners, Arc::clone(&sandbox), shutdown.clone());
        Self {
            sandbox,
            non_eu: addresses[0],
            eu: addresses[1],
            client: client(false),
            shutdown,
            task: tokio::spawn(running),
        }
    }

    fn post(&self, body: impl Into<reqwest::Body>) -> RequestBuilder {
        let url = format!("http://{}/v1/batch", self.non_eu);
        let request = self.client.post(url).body(body);
        request.header("content-type", "application/json")
    }

    /// Posts events with a fine envelope and returns the status.
    async fn send(&self, events: &[&str]) -> u16 {
        let response = self.post(batch(events)).send().await.expect("an answer");
        response.status().as_u16()
    }

    /// The same for a single event.
    async fn send_one(&self, event: &str) -> u16 {
        self.send(&[event]).await
    }

    async fn get(&self, path: &str) -> Response {
        let url = format!("http://{}{path}", self.non_eu);
        self.client.get(url).send().await.expect("an answer")
    }

    async fn get_json(&self, path: &str) -> Value {
        let response = self.get(path).await;
        assert_eq!(response.status(), 200, "{path}");
        parse(response).await
    }

    async fn wait_for(&self, enough: impl Fn(&Stats) -> bool) -> Stats {
        let waiting = self.sandbox.wait_for(enough, PATIENCE);
        waiting.await.expect("it happens")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn client(http2: bool) -> Client {
    // Fails where another test was first, which is fine.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let builder = Client::builder().no_proxy().timeout(PATIENCE);
    let builder = if http2 {
        builder.http2_prior_knowledge()
    } else {
        builder
    };
    builder.build().expect("a client")
}

async fn parse(response: Response) -> Value {
    let bytes = response.bytes().await.expect("a body");
    serde_json::from_slice(&bytes).expect("JSON")
}

fn identify(message_id: &str) -> String {
    format!(
        r#"{{"type":"identify","userId":"u-{message_id}","messageId":"{message_id}","timestamp":"2021-03-12T00:00:00.000Z"}}"#
    )
}

fn batch(events: &[&str]) -> String {
    batch_with_key(events, "write-key-1234")
}

fn batch_with_key(events: &[&str], key: &str) -> String {
    let now = format!("{:.3}", jiff::Timestamp::now());
    let events = events.join(",");
    format!(r#"{{"batch":[{events}],"writeKey":"{key}","sentAt":"{now}"}}"#)
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(plain).expect("memory");
    encoder.finish().expect("memory")
}

/// Sends a batch over a bare connection and returns all that comes until it closes.
async fn send_raw(address: SocketAddr, body: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    let request = format!(
        "POST /v1/batch HTTP/1.1\r\nhost: sandbox\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream
        .write_all(request.as_bytes())
        .await
        .expect("it takes");
    let mut answer = String::new();
    let reading = stream.read_to_string(&mut answer);
    let read = tokio::time::timeout(PATIENCE, reading).await;
    read.expect("it closes").expect("it closes cleanly");
    answer
}
