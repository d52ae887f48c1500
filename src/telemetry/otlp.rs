//! The way to the collector: OTLP over gRPC or HTTP.
//!
//! Exporters run on threads of the SDK's own, with bounded queues and a time-out
//! for each export: whatever the collector does, the relay goes on.

use std::{fmt, fs};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{
    MetricExporter, Protocol, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
};
use tokio::runtime::Handle;
use tonic::{
    metadata::MetadataMap,
    transport::{Certificate, Channel, ClientTlsConfig},
};

use crate::config::{Otlp, OtlpProtocol};

/// How much of an answer is read, in bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// Why the way to the collector can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// The file of CAs can't be read.
    #[error("[otlp] ca_file {path}: {rule}")]
    CaFile {
        /// Its path.
        path: String,
        /// What is wrong.
        rule: String,
    },
    /// The client can't be made.
    #[error("[otlp]: {0}")]
    Client(String),
}

impl OtlpError {
    fn client(error: &dyn std::error::Error) -> Self {
        let mut innermost = error;
        while let Some(inner) = innermost.source() {
            innermost = inner;
        }
        Self::Client(innermost.to_string())
    }
}

/// What sends spans. To be made on a runtime, which it keeps using.
///
/// # Errors
/// [`OtlpError`].
pub fn span_exporter(otlp: &Otlp) -> Result<SpanExporter, OtlpError> {
    let built = match otlp.protocol {
        OtlpProtocol::Grpc => SpanExporter::builder()
            .with_tonic()
            .with_channel(channel(otlp)?)
            .with_metadata(MetadataMap::from_headers(otlp.headers.expose().clone()))
            .with_timeout(otlp.timeout)
            .build(),
        OtlpProtocol::Http => SpanExporter::builder()
            .with_http()
            .with_http_client(Client::new(otlp)?)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(below(otlp, "v1/traces"))
            .with_timeout(otlp.timeout)
            .build(),
    };
    built.map_err(|error| OtlpError::client(&error))
}

/// What sends metrics. To be made on a runtime, which it keeps using.
///
/// # Errors
/// [`OtlpError`].
pub fn metric_exporter(otlp: &Otlp) -> Result<MetricExporter, OtlpError> {
    let built = match otlp.protocol {
        OtlpProtocol::Grpc => MetricExporter::builder()
            .with_tonic()
            .with_channel(channel(otlp)?)
            .with_metadata(MetadataMap::from_headers(otlp.headers.expose().clone()))
            .with_timeout(otlp.timeout)
            .build(),
        OtlpProtocol::Http => MetricExporter::builder()
            .with_http()
            .with_http_client(Client::new(otlp)?)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(below(otlp, "v1/metrics"))
            .with_timeout(otlp.timeout)
            .build(),
    };
    built.map_err(|error| OtlpError::client(&error))
}

/// The URL of a signal below the configured one.
fn below(otlp: &Otlp, path: &str) -> String {
    format!("{}/{path}", otlp.endpoint.as_str().trim_end_matches('/'))
}

/// The CAs of the file, if one is named.
fn own_roots(otlp: &Otlp) -> Result<Option<Vec<u8>>, OtlpError> {
    let Some(path) = &otlp.ca_file else {
        return Ok(None);
    };
    let read = fs::read(path).map_err(|error| OtlpError::CaFile {
        path: path.display().to_string(),
        rule: error.to_string(),
    });
    read.map(Some)
}

/// A channel that connects with the first export.
fn channel(otlp: &Otlp) -> Result<Channel, OtlpError> {
    let failed = |error: tonic::transport::Error| OtlpError::client(&error);
    let mut endpoint = Channel::from_shared(otlp.endpoint.as_str().to_owned())
        .map_err(|error| OtlpError::client(&error))?
        .connect_timeout(otlp.timeout)
        .timeout(otlp.timeout);
    if otlp.endpoint.is_tls() {
        let tls = match own_roots(otlp)? {
            Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        endpoint = endpoint.tls_config(tls).map_err(failed)?;
    }
    Ok(endpoint.connect_lazy())
}

/// reqwest on the relay's runtime, for an exporter that runs on none.
struct Client {
    client: reqwest::Client,
    headers: http::HeaderMap,
    runtime: Handle,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    fn new(otlp: &Otlp) -> Result<Self, OtlpError> {
        // An error says that it is installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut client = reqwest::Client::builder()
            .user_agent(concat!("segment-relay/", env!("CARGO_PKG_VERSION")))
            .timeout(otlp.timeout)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        if !otlp.endpoint.is_tls() {
            // Plain HTTP needs no trust roots, which a bare machine lacks.
            client = client.tls_certs_only([]);
        } else if let Some(pem) = own_roots(otlp)? {
            let roots = reqwest::Certificate::from_pem_bundle(&pem);
            client = client.tls_certs_only(roots.map_err(|error| OtlpError::client(&error))?);
        }
        Ok(Self {
            client: client.build().map_err(|error| OtlpError::client(&error))?,
            headers: otlp.headers.expose().clone(),
            runtime: Handle::current(),
        })
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (mut head, body) = request.into_parts();
        head.headers.extend(self.headers.clone());
        let request = reqwest::Request::try_from(Request::from_parts(head, body))?;
        let client = self.client.clone();
        self.runtime.spawn(fetch(client, request)).await?
    }
}

async fn fetch(
    client: reqwest::Client,
    request: reqwest::Request,
) -> Result<Response<Bytes>, HttpError> {
    let mut answer = client.execute(request).await?;
    let mut body = BytesMut::new();
    while let Some(chunk) = answer.chunk().await? {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ANSWER_BYTES {
            return Err(format!("an answer of more than {MAX_ANSWER_BYTES} bytes").into());
        }
    }
    let mut response = Response::new(body.freeze());
    *response.status_mut() = answer.status();
    *response.headers_mut() = answer.headers().clone();
    Ok(response)
}
