//! How a command reaches the relay, and proves who it is.

use std::{
    future::poll_fn,
    io,
    path::PathBuf,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use clap::Args;
use http::{HeaderValue, header::AUTHORIZATION};
use secrecy::{ExposeSecret, SecretString};
use tonic::{
    Request, Status,
    body::Body,
    codegen::BoxFuture,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tower_service::Service;

use super::{
    ClientError,
    dial::Connector,
    place::{Kind, Place},
    seen::{Seen, causes},
};

const DEFAULT_ADDRESS: &str = "http://127.0.0.1:50051";
/// Largest file of certificates, a key or a token, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// How to reach the relay.
#[derive(Args, Debug)]
pub struct Reach {
    /// Address of the relay; https:// for TLS, unix: and a path for a socket
    #[arg(long, env = "SEGMENT_RELAY_ADDRESS", default_value = DEFAULT_ADDRESS)]
    pub address: String,
    /// CAs that sign the relay's certificate, PEM; this machine's by default
    #[arg(long, env = "SEGMENT_RELAY_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Client certificate, PEM
    #[arg(
        long,
        env = "SEGMENT_RELAY_CERTIFICATE_FILE",
        value_name = "FILE",
        requires = "key_file"
    )]
    pub certificate_file: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(
        long,
        env = "SEGMENT_RELAY_KEY_FILE",
        value_name = "FILE",
        requires = "certificate_file"
    )]
    pub key_file: Option<PathBuf>,
    /// File with the bearer token; or put the token into SEGMENT_RELAY_TOKEN
    #[arg(long, env = "SEGMENT_RELAY_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    // Never a flag: other users see the flags of a process.
    #[arg(env = "SEGMENT_RELAY_TOKEN", hide = true, hide_env_values = true, long = "token-from-env-only", value_parser = secret)]
    pub(super) token: Option<SecretString>,
}

#[expect(clippy::unnecessary_wraps, reason = "clap wants a result")]
fn secret(text: &str) -> Result<SecretString, std::convert::Infallible> {
    Ok(text.to_owned().into())
}

/// How to reach the relay, and how to print.
#[derive(Args, Debug)]
pub struct Connection {
    /// Where it is
    #[command(flatten)]
    pub reach: Reach,
    /// Time until the call has to be answered, such as 500ms, 10s (or 10), 2m
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    pub timeout: Duration,
    /// Print canonical proto JSON
    #[arg(long)]
    pub json: bool,
}

/// A channel that proves who calls, and says why it does not reach the relay.
#[derive(Clone)]
pub(super) struct Wire {
    channel: Channel,
    bearer: Option<HeaderValue>,
    seen: Arc<Seen>,
    place: Arc<Place>,
}

impl Service<http::Request<Body>> for Wire {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = BoxFuture<Self::Response, Status>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        // The call waits for the channel: an error is explained there.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        if let Some(bearer) = &self.bearer {
            request.headers_mut().insert(AUTHORIZATION, bearer.clone());
        }
        let mut wire = self.clone();
        Box::pin(async move {
            let channel = &mut wire.channel;
            let ready =
                poll_fn(|context| Service::<http::Request<Body>>::poll_ready(channel, context));
            let answered = match ready.await {
                Ok(()) => channel.call(request).await,
                Err(error) => Err(error),
            };
            match answered {
                Ok(answer) => Ok(answer),
                Err(error) => Err(wire.failed(&error).await),
            }
        })
    }
}

impl Wire {
    /// The status of a call that got no answer.
    async fn failed(&self, error: &tonic::transport::Error) -> Status {
        let (text, address) = (causes(error), &self.place.address);
        match self.place.diagnosis(&self.seen, &text).await {
            Some(known) => Status::unavailable(format!("{address}: {known}")),
            None if text.contains("Timeout expired") => {
                Status::deadline_exceeded(format!("{address} did not answer in time (--timeout)"))
            }
            None => Status::unavailable(format!("{address}: {text}")),
        }
    }
}

impl Reach {
    /// Connects within a time.
    pub(super) async fn connect(&self, timeout: Duration) -> Result<Wire, ClientError> {
        let mut place = Place::new(&self.address)?;
        let bearer = self.bearer(&place)?;
        if !place.is_tls() && (self.ca_file.is_some() || self.certificate_file.is_some()) {
            let rule = "--ca-file and --certificate-file need an https:// address";
            return Err(ClientError::Input(rule.to_owned()));
        }
        let invalid = |error: tonic::transport::Error| {
            let address = &self.address;
            ClientError::Input(format!("--address {address}: {}", causes(&error)))
        };
        let url = match &place.kind {
            Kind::Plain(url) | Kind::Tls(url) => url.clone(),
            // Names nothing: the connector has the path.
            Kind::Unix(_) => "http://localhost".to_owned(),
        };
        let mut endpoint = Endpoint::from_shared(url).map_err(invalid)?;
        if place.is_tls() {
            place.ca = self.ca()?;
            place.has_certificate = self.certificate_file.is_some();
            let tls = self.tls(place.ca.as_deref())?;
            endpoint = endpoint.tls_config(tls).map_err(invalid)?;
        }
        let seen = Arc::new(Seen::default());
        let connector = Connector {
            socket: match &place.kind {
                Kind::Unix(path) => Some(path.clone()),
                Kind::Plain(_) | Kind::Tls(_) => None,
            },
            seen: Arc::clone(&seen),
        };
        let connected = endpoint.connect_with_connector(connector);
        let connected = tokio::time::timeout(timeout, connected).await;
        match connected {
            Ok(Ok(channel)) => Ok(Wire {
                channel,
                bearer,
                seen,
                place: Arc::new(place),
            }),
            Ok(Err(error)) => Err(place.unreachable(&seen, &error).await),
            Err(_) => {
                let silent = io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
                Err(place.unreachable(&seen, &silent).await)
            }
        }
    }

    fn ca(&self) -> Result<Option<String>, ClientError> {
        let file = self.ca_file.as_ref();
        file.map(|path| read("--ca-file", path)).transpose()
    }

    fn tls(&self, ca: Option<&str>) -> Result<ClientTlsConfig, ClientError> {
        let mut tls = ClientTlsConfig::new();
        tls = match ca {
            Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
            None => tls.with_native_roots(),
        };
        if let (Some(certificate), Some(key)) = (&self.certificate_file, &self.key_file) {
            let certificate = read("--certificate-file", certificate)?;
            tls = tls.identity(Identity::from_pem(certificate, read("--key-file", key)?));
        }
        Ok(tls)
    }

    fn bearer(&self, place: &Place) -> Result<Option<HeaderValue>, ClientError> {
        let token: SecretString = match (&self.token_file, &self.token) {
            (Some(path), _) => read("--token-file", path)?.trim().to_owned().into(),
            (None, Some(token)) => token.clone(),
            (None, None) => return Ok(None),
        };
        let is_safe = match &place.kind {
            Kind::Tls(_) | Kind::Unix(_) => true,
            Kind::Plain(_) => self.is_loopback(),
        };
        if !is_safe {
            let rule = "a token is sent over https:// alone, or to this machine";
            return Err(ClientError::Input(format!(
                "--address {}: {rule}",
                self.address
            )));
        }
        let text = format!("Bearer {}", token.expose_secret());
        let mut value = HeaderValue::from_str(&text)
            .map_err(|_| ClientError::Input("the token has to be printable ASCII".to_owned()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    fn is_loopback(&self) -> bool {
        let authority = self.address.split("://").last().unwrap_or("");
        let host = authority.split('/').next().unwrap_or("");
        let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
        let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
        host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }
}

impl Connection {
    /// Connects within the time for the call.
    pub(super) async fn connect(&self) -> Result<Wire, ClientError> {
        self.reach.connect(self.timeout).await
    }
}

pub(super) fn request<T>(connection: &Connection, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(connection.timeout);
    request
}

/// A time of 1 ms to 1 h: a number of seconds, or one with its unit.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "ms" => Some(1),
        "" | "s" => Some(1_000),
        "m" => Some(60_000),
        _ => None,
    };
    let millis = factor.and_then(|factor| number.parse::<u64>().ok()?.checked_mul(factor));
    match millis {
        Some(millis @ 1..=3_600_000) => Ok(Duration::from_millis(millis)),
        _ => Err("give 1ms to 60m, such as 500ms, 10s or 2m".to_owned()),
    }
}

fn read(flag: &str, path: &std::path::Path) -> Result<String, ClientError> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text))
        .map_err(|error| ClientError::Input(format!("{flag} {}: {error}", path.display())))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let ms = Duration::from_millis;
        for (text, expected) in [
            ("10", ms(10_000)),
            ("10s", ms(10_000)),
            ("500ms", ms(500)),
            ("2m", ms(120_000)),
            ("3600", ms(3_600_000)),
        ] {
            assert_eq!(time(text), Ok(expected), "{text}");
        }
        for bad in [
            "",
            "0",
            "0ms",
            "3601",
            "61m",
            "1.5s",
            "-1",
            "10 s",
            "1h",
            "ms",
            "99999999999999999999",
        ] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
