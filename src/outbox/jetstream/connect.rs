//! How the servers are reached.

use std::{path::PathBuf, time::Duration};

use async_nats::{Client, ConnectOptions};
use secrecy::{ExposeSecret, SecretString};

use super::open::JetStreamError;

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

/// Connects, or says which server did not answer.
pub(super) async fn connect(connection: &NatsConnection) -> Result<Client, JetStreamError> {
    let mut options = ConnectOptions::new()
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
                async_nats::Event::Connected => tracing::info!("connected to NATS"),
                async_nats::Event::Disconnected => tracing::warn!("NATS is away; connecting again"),
                event => tracing::debug!(%event, "NATS"),
            }
        });
    options = match &connection.auth {
        NatsAuth::None => options,
        NatsAuth::Credentials(path) => {
            let text = std::fs::read_to_string(path)
                .map(zeroize::Zeroizing::new)
                .map_err(|source| JetStreamError::Credentials {
                    path: path.clone(),
                    source,
                })?;
            options
                .credentials(&text)
                .map_err(|source| JetStreamError::Credentials {
                    path: path.clone(),
                    source,
                })?
        }
        NatsAuth::User { user, password } => {
            options.user_and_password(user.clone(), password.expose_secret().to_owned())
        }
        NatsAuth::Token(token) => options.token(token.expose_secret().to_owned()),
    };
    if let Some(tls) = &connection.tls {
        options = options.require_tls(true);
        if let Some(path) = &tls.ca_file {
            options = options.add_root_certificates(path.clone());
        }
        if let Some((certificate, key)) = &tls.identity {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
    }
    let servers = connection.servers.join(",");
    options
        .connect(connection.servers.as_slice())
        .await
        .map_err(|source| JetStreamError::Connect { servers, source })
}
