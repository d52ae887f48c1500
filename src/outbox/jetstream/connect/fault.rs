//! Why the servers can't be reached, said with the setting to change.

use std::{error::Error, io};

use async_nats::{ConnectError, ConnectErrorKind};
use rustls::{AlertDescription, CertificateError, Error as TlsError};

use super::{NatsAuth, NatsConnection, NatsTls};
use crate::outbox::jetstream::error::JetStreamError;

/// The error for whoever starts the relay.
pub(super) fn explain(connection: &NatsConnection, error: &ConnectError) -> JetStreamError {
    let why = match (error.kind(), tls_error(error)) {
        (ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication, _) => {
            refused(&connection.auth).to_owned()
        }
        (_, Some(tls)) => tls_fault(connection.tls.as_ref(), tls),
        (ConnectErrorKind::TimedOut, _) => "no answer in time".to_owned(),
        (ConnectErrorKind::Io | ConnectErrorKind::Tls, None) if hung_up(error) => {
            hung_up_at(connection.tls.as_ref()).to_owned()
        }
        _ => error.to_string(),
    };
    JetStreamError::Connect {
        servers: connection.servers.join(","),
        why,
    }
}

fn refused(auth: &NatsAuth) -> &'static str {
    match auth {
        NatsAuth::None => {
            "they want to know who the relay is; set [nats] credentials_file, user with password, or token"
        }
        NatsAuth::Credentials(_) => {
            "they refuse the user of [nats] credentials_file; is it one of an account that they know, \
             not expired and not revoked?"
        }
        NatsAuth::User { .. } => "they refuse [nats] user with this password",
        NatsAuth::Token(_) => "they refuse [nats] token",
    }
}

/// The error of TLS below others, where there is one.
fn tls_error(error: &ConnectError) -> Option<&TlsError> {
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(one) = cause {
        if let Some(found) = one.downcast_ref::<TlsError>() {
            return Some(found);
        }
        // What an I/O error holds is not its source.
        let held = one.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(found) = held.and_then(|held| held.downcast_ref::<TlsError>()) {
            return Some(found);
        }
        cause = held.map_or_else(|| one.source(), |held| Some(held));
    }
    None
}

fn tls_fault(tls: Option<&NatsTls>, error: &TlsError) -> String {
    let own_ca = tls.is_some_and(|tls| tls.ca_file.is_some());
    // A CA of the same name with another key: its signature does not fit.
    let unknown = matches!(
        error,
        TlsError::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature
        )
    );
    match error {
        _ if unknown && own_ca => {
            "their certificate is not signed by a CA of [nats] ca_file".to_owned()
        }
        _ if unknown => {
            "their certificate is not signed by a CA that this machine trusts; name its CA in [nats] ca_file, \
             with tls = true"
                .to_owned()
        }
        TlsError::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => format!("{error}; name each server in [nats] servers as its certificate does"),
        TlsError::InvalidCertificate(_) => format!("their certificate is not taken: {error}"),
        TlsError::InvalidMessage(_) => {
            "they don't speak TLS; configure it there, or set [nats] tls = false (and nats:// URLs) on a network \
             that nobody else reaches"
                .to_owned()
        }
        TlsError::AlertReceived(alert) if is_about_us(*alert) => match tls {
            Some(tls) if tls.identity.is_some() => {
                format!("they refuse the relay's certificate, [nats] certificate_file ({error})")
            }
            _ => format!(
                "they want a certificate of the relay; set [nats] certificate_file and key_file, with tls = true ({error})"
            ),
        },
        _ => format!("TLS failed: {error}"),
    }
}

/// Alerts of a server about the relay's certificate.
fn is_about_us(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::HandshakeFailure
            | AlertDescription::AccessDenied
    )
}

/// Whether the connection was closed before the relay was let in.
fn hung_up(error: &ConnectError) -> bool {
    let text = error.to_string();
    [
        "broken pipe",
        "Connection reset",
        "Broken pipe",
        "unexpected end of file",
        "close_notify",
    ]
    .into_iter()
    .any(|one| text.contains(one))
}

fn hung_up_at(tls: Option<&NatsTls>) -> &'static str {
    match tls {
        Some(_) => {
            "they hang up during the handshake; do they want another client certificate than that of [nats] \
             certificate_file? Their log says why"
        }
        None => "they hang up before the relay is let in; their log says why",
    }
}
