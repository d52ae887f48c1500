//! SIGTERM and SIGINT, and SIGHUP.

use tokio::signal;
use tokio_util::sync::CancellationToken;

/// Cancels at the first SIGTERM or SIGINT; a second one ends the process at once.
pub(super) fn cancel_on_signal(
    shutdown: CancellationToken,
) -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut signals = Signals::new()?;
    Ok(async move {
        signals.next().await;
        shutdown.cancel();
        signals.next().await;
        tracing::warn!("second signal: ending at once; what was acknowledged is on disk");
        std::process::exit(130);
    })
}

#[cfg(unix)]
struct Signals {
    interrupt: signal::unix::Signal,
    terminate: signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Self> {
        use signal::unix::{SignalKind, signal};
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        // Without signals the relay runs until it is killed, which loses nothing.
        if signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// SIGHUPs.
#[cfg(unix)]
pub(super) struct Reloads(signal::unix::Signal);

#[cfg(unix)]
impl Reloads {
    pub(super) fn new() -> std::io::Result<Self> {
        signal::unix::signal(signal::unix::SignalKind::hangup()).map(Self)
    }

    pub(super) async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// There are none.
#[cfg(not(unix))]
pub(super) struct Reloads;

#[cfg(not(unix))]
impl Reloads {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    pub(super) async fn next(&mut self) {
        std::future::pending::<()>().await;
    }
}
