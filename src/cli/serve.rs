//! `segment-relay serve`: telemetry, config, build, spawn, signal, drain.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;
use tokio::{net::TcpListener, signal};
use tokio_util::sync::CancellationToken;

use super::{Failure, spec_violations};
use crate::{config::Config, server::Relay, telemetry};

/// Arguments of `serve`.
#[derive(Args, Debug)]
pub(super) struct ServeArgs {
    /// TOML file; what it leaves out has the defaults of `segment-relay config`
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Listen on other than loopback addresses although there is neither TLS nor
    /// authentication: whoever reaches the port can do everything
    #[arg(long)]
    insecure: bool,
}

/// Runs the relay until SIGTERM or SIGINT.
pub(super) async fn run(args: &ServeArgs) -> Result<(), Failure> {
    let config = Config::read(args.config.as_deref(), &spec_violations)?;
    let listen = config.server.listen;
    if !listen.ip().is_loopback() && !args.insecure {
        return Err(Failure::Usage(format!(
            "[server] listen = \"{listen}\" is not a loopback address, and this version has neither \
             TLS nor authentication; listen on 127.0.0.1 behind a proxy that has them, or say \
             --insecure"
        )));
    }
    telemetry::start(&config.log);
    let outbox = config.outbox.path.clone();
    let relay = Relay::open(config).await?;
    let listener = TcpListener::bind(listen)
        .await
        .map_err(|error| Failure::Other(format!("[server] listen = \"{listen}\": {error}")))?;
    announce(&listener, &outbox)?;
    let shutdown = CancellationToken::new();
    tokio::spawn(cancel_on_signal(shutdown.clone())?);
    relay.run(listener, shutdown).await?;
    Ok(())
}

/// One line on standard output, for people and for scripts that wait for it.
fn announce(listener: &TcpListener, outbox: &Path) -> Result<(), Failure> {
    let address = listener.local_addr()?;
    tracing::info!(%address, outbox = %outbox.display(), "serving");
    let mut out = std::io::stdout().lock();
    writeln!(out, "segment-relay serves gRPC on {address}")?;
    Ok(out.flush()?)
}

/// The first signal starts the drain, a second one ends the process at once.
fn cancel_on_signal(
    shutdown: CancellationToken,
) -> Result<impl Future<Output = ()> + Send + 'static, Failure> {
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
