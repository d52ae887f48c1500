//! How a command reaches the relay, and proves who it is.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::ClientError;

const DEFAULT_ADDRESS: &str = "http://127.0.0.1:50051";
/// Largest file of certificates, a key or a token, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// How to reach the relay.
#[derive(Args, Debug)]
pub struct Reach {
    /// Address of the relay; https:// for TLS
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
    /// Seconds until the call has to be answered
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
    /// Print canonical proto JSON
    #[arg(long)]
    pub json: bool,
}

/// A channel that proves who calls.
pub(super) type Wire = InterceptedService<Channel, Bearer>;

/// Adds the token to each call.
#[derive(Clone)]
pub(super) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl Reach {
    /// Connects within a time.
    pub(super) async fn connect(&self, timeout: Duration) -> Result<Wire, ClientError> {
        let address = &self.address;
        let url = if address.contains("://") {
            address.clone()
        } else {
            format!("http://{address}")
        };
        let bearer = self.bearer(url.starts_with("https://"))?;
        let mut endpoint = Endpoint::from_shared(url.clone())
            .map_err(|error| ClientError::Input(format!("--address {address}: {error}")))?;
        if url.starts_with("https://") {
            endpoint = endpoint
                .tls_config(self.tls()?)
                .map_err(|error| self.refused(&error))?;
        } else if self.ca_file.is_some() || self.certificate_file.is_some() {
            let rule = "--ca-file and --certificate-file need an https:// address";
            return Err(ClientError::Input(rule.to_owned()));
        }
        let channel = endpoint
            .connect_timeout(timeout)
            .connect()
            .await
            .map_err(|error| self.refused(&error))?;
        Ok(InterceptedService::new(channel, bearer))
    }

    fn refused(&self, error: &tonic::transport::Error) -> ClientError {
        let mut cause: &dyn std::error::Error = error;
        while let Some(inner) = cause.source() {
            cause = inner;
        }
        ClientError::Connect {
            address: self.address.clone(),
            cause: cause.to_string(),
        }
    }

    fn tls(&self) -> Result<ClientTlsConfig, ClientError> {
        let mut tls = ClientTlsConfig::new();
        tls = match &self.ca_file {
            Some(path) => tls.ca_certificate(Certificate::from_pem(read("--ca-file", path)?)),
            None => tls.with_native_roots(),
        };
        if let (Some(certificate), Some(key)) = (&self.certificate_file, &self.key_file) {
            let certificate = read("--certificate-file", certificate)?;
            tls = tls.identity(Identity::from_pem(certificate, read("--key-file", key)?));
        }
        Ok(tls)
    }

    fn bearer(&self, is_tls: bool) -> Result<Bearer, ClientError> {
        let token = match (&self.token_file, &self.token) {
            (Some(path), _) => Some(read("--token-file", path)?.trim().to_owned().into()),
            (None, token) => token.clone(),
        };
        let Some(token) = token else {
            return Ok(Bearer(None));
        };
        if !is_tls && !self.is_loopback() {
            let rule = "a token is sent over https:// alone, or to this machine";
            return Err(ClientError::Input(format!(
                "--address {}: {rule}",
                self.address
            )));
        }
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.expose_secret())
            .parse()
            .map_err(|_| {
            ClientError::Input("the token has to be printable ASCII".to_owned())
        })?;
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
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
        self.reach.connect(Duration::from_secs(self.timeout)).await
    }
}

pub(super) fn request<T>(connection: &Connection, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_secs(connection.timeout));
    request
}

fn read(flag: &str, path: &std::path::Path) -> Result<String, ClientError> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text))
        .map_err(|error| ClientError::Input(format!("{flag} {}: {error}", path.display())))?;
    Ok(text)
}
