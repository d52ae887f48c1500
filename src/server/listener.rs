//! Where connections come from: TCP, or a Unix socket for programs of this machine.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
};

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::config::Listen;

/// The owner and the group may call: containers of a pod often share a group alone.
const SOCKET_MODE: u32 = 0o660;

/// Takes connections.
#[derive(Debug)]
pub enum Listener {
    /// From an address.
    Tcp(TcpListener),
    /// From a file.
    Unix(UnixSocket),
}

/// A Unix socket, whose file goes with it.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
}

/// A connection as it was taken.
#[derive(Debug)]
pub(super) enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// As the system has them; and `AddrInUse` where another process answers on the socket.
    pub async fn bind(listen: &Listen) -> io::Result<Self> {
        match listen {
            Listen::Tcp(address) => TcpListener::bind(address).await.map(Self::Tcp),
            Listen::Unix(path) => UnixSocket::bind(path).await.map(Self::Unix),
        }
    }

    /// Where clients find it.
    ///
    /// # Errors
    /// The system does not say.
    pub fn address(&self) -> io::Result<Listen> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Listen::Tcp),
            Self::Unix(socket) => Ok(Listen::Unix(socket.path.clone())),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(tcp, _)| Accepted::Tcp(tcp)),
            Self::Unix(socket) => {
                let accepted = socket.listener.accept().await;
                accepted.map(|(unix, _)| Accepted::Unix(unix))
            }
        }
    }
}

impl Accepted {
    pub(super) fn peer(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(tcp) => tcp.peer_addr().ok(),
            Self::Unix(_) => None,
        }
    }
}

impl UnixSocket {
    async fn bind(path: &Path) -> io::Result<Self> {
        remove_abandoned(path).await?;
        let listener = UnixListener::bind(path)?;
        let socket = Self {
            listener,
            path: path.to_owned(),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE))?;
        Ok(socket)
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        // An error says that the file has gone already.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the socket of a relay that was killed: no process answers on it. Other files stay.
async fn remove_abandoned(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_of_a_dead_process_is_taken_over_and_nothing_else() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("relay.sock");
        let listen = Listen::Unix(path.clone());
        // A process that was killed leaves the file.
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
        let first = Listener::bind(&listen).await.expect("taken over");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, SOCKET_MODE);
        let second = Listener::bind(&listen).await.expect_err("in use");
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
        drop(first);
        assert!(!path.exists());
        fs::write(&path, "precious").expect("written");
        Listener::bind(&listen).await.expect_err("not a socket");
        assert_eq!(fs::read(&path).expect("there"), b"precious");
    }
}
