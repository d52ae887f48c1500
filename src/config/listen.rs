//! Where the gRPC server listens.

use std::{fmt, net::SocketAddr, path::PathBuf};

use super::value::{Expected, Parsed, Raw};

/// What stands before the path of a Unix socket.
const UNIX: &str = "unix:";
/// Longest path of a Unix socket in bytes, with the byte that ends it (`sun_path`, unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// An address, or a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// An IP address with a port.
    Tcp(SocketAddr),
    /// The file of a socket, for programs of this machine or this pod.
    Unix(PathBuf),
}

impl Listen {
    /// Whether no other machine reaches it.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

pub(super) fn listen(raw: Raw<'_>) -> Parsed<Listen> {
    const RULE: &str = "an IP address with a port, such as 127.0.0.1:50051 or [::]:50051 (all \
        interfaces), or the path of a Unix socket, such as unix:/run/segment-relay.sock";
    let text = raw.text().ok_or_else(|| Expected::new(RULE))?;
    if let Some(path) = text.strip_prefix(UNIX) {
        let path = path.strip_prefix("//").unwrap_or(path);
        if !path.starts_with('/') || path.len() > MAX_SOCKET_PATH {
            let rule = "unix: and an absolute path of at most 107 bytes";
            return Err(Expected::new(rule));
        }
        return Ok(Listen::Unix(path.into()));
    }
    let address = text.parse().map_err(|_| Expected::new(RULE))?;
    Ok(Listen::Tcp(address))
}
