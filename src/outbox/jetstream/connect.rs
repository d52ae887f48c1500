//! How the servers are reached.

mod fault;
mod files;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_nats::{Auth, AuthError, Client, ConnectOptions, Event};
use secrecy::{ExposeSecret, SecretString};

use super::error::JetStreamError;

/// Longest wait for one server at start.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait between two tries to connect again.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(1);

/// The servers, and who the relay is to them.
#[derive(Clone, Debug)]
pub struct NatsConnection {
    /// URLs such as `nats://10.0.0.1:4222`.
    pub servers: Vec<String>,
    /// Who the relay is.
    pub auth: NatsAuth,
    /// TLS; `None` where the servers decide.
    pub tls: Option<NatsTls>,
}

/// Who the relay is to the servers.
#[derive(Clone, Debug, Default)]
pub enum NatsAuth {
    /// Nobody in particular.
    #[default]
    None,
    /// A file with a JWT and its seed.
    Credentials(PathBuf),
    /// A user and a password.
    User {
        /// The user.
        user: String,
        /// The password.
        password: SecretString,
    },
    /// A token.
    Token(SecretString),
}

/// TLS towards the servers.
#[derive(Clone, Debug, Default)]
pub struct NatsTls {
    /// CAs of the servers' certificates, PEM; the machine's by default.
    pub ca_file: Option<PathBuf>,
    /// The relay's own certificate and key, PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Connects, or says what is wrong with which setting.
pub(super) async fn connect(connection: &NatsConnection) -> Result<Client, JetStreamError> {
    if let NatsAuth::Credentials(path) = &connection.auth {
        files::check_credentials(path)?;
    }
    if let Some(tls) = &connection.tls {
        files::check_tls(tls)?;
    }
    let mut options = authenticated(&connection.auth)
        .name("segment-relay")
        .connection_timeout(CONNECT_TIMEOUT)
        .request_timeout(Some(super::ANSWER_TIMEOUT))
        .ping_interval(Duration::from_secs(5))
        .reconnect_delay_callback(|attempts| {
            let doubled = 50_u64.saturating_mul(1 << attempts.min(10));
            Duration::from_millis(doubled).min(MAX_RECONNECT_DELAY)
        })
        .event_callback(|event| async move {
            match event {
                Event::Connected => tracing::info!("connected to NATS"),
                Event::Disconnected => tracing::warn!("NATS is away; connecting again"),
                // Such as a permission that the relay lacks, or TLS that fails.
                Event::ServerError(error) => tracing::warn!(%error, "NATS refuses something"),
                Event::ClientError(error) => tracing::warn!(%error, "NATS cannot be reached"),
                event => tracing::debug!(%event, "NATS"),
            }
        });
    // One URL with TLS is enough: servers that the first one tells of are named without it.
    let by_url = connection
        .servers
        .iter()
        .any(|url| url.starts_with("tls://"));
    options = options.require_tls(by_url || connection.tls.is_some());
    if let Some(tls) = &connection.tls {
        if let Some(path) = &tls.ca_file {
            options = options.add_root_certificates(path.clone());
        }
        if let Some((certificate, key)) = &tls.identity {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
    }
    options
        .connect(connection.servers.as_slice())
        .await
        .map_err(|error| fault::explain(connection, &error))
}

fn authenticated(auth: &NatsAuth) -> ConnectOptions {
    match auth {
        NatsAuth::None => ConnectOptions::new(),
        NatsAuth::Credentials(path) => {
            let path: Arc<Path> = path.as_path().into();
            ConnectOptions::with_auth_callback(move |nonce| signed(Arc::clone(&path), nonce))
        }
        NatsAuth::User { user, password } => ConnectOptions::with_user_and_password(
            user.clone(),
            password.expose_secret().to_owned(),
        ),
        NatsAuth::Token(token) => ConnectOptions::with_token(token.expose_secret().to_owned()),
    }
}

/// What the credentials say to a server, as they are now.
async fn signed(path: Arc<Path>, nonce: Vec<u8>) -> Result<Auth, AuthError> {
    let read = tokio::task::spawn_blocking(move || files::Credentials::read(&path)).await;
    let credentials = read.map_err(AuthError::new)?.map_err(AuthError::new)?;
    let signature = credentials.key.sign(&nonce).map_err(AuthError::new)?;
    let mut auth = Auth::new();
    auth.jwt = Some(credentials.jwt);
    auth.signature = Some(signature);
    Ok(auth)
}

fn file_fault(setting: &'static str, path: &Path, rule: String) -> JetStreamError {
    JetStreamError::File {
        setting,
        path: path.to_owned(),
        rule,
    }
}
