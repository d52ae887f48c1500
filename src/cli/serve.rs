//! `segment-relay serve`: telemetry, config, build, spawn, signal, drain.

use std::{io::Write, path::PathBuf};

use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{Failure, signals::cancel_on_signal, spec_violations};
use crate::{
    config::{Config, OutboxKind},
    server::Relay,
    telemetry,
};

/// Arguments of `serve`.
#[derive(Args, Debug)]
pub(super) struct ServeArgs {
    /// TOML file; what it leaves out has the defaults of `segment-relay config`
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Listen on other than loopback addresses although TLS or authentication is
    /// missing: for networks that nobody else reaches
    #[arg(long)]
    insecure: bool,
}

/// Runs the relay until SIGTERM or SIGINT.
pub(super) async fn run(args: &ServeArgs) -> Result<(), Failure> {
    let config = Config::read(args.config.as_deref(), &spec_violations)?;
    let listen = config.server.listen;
    let exposed = exposure(&config);
    if let Some(exposed) = exposed.filter(|_| !listen.ip().is_loopback() && !args.insecure) {
        return Err(Failure::Usage(format!(
            "[server] listen = \"{listen}\" is not a loopback address, and {exposed}; or listen on \
             127.0.0.1 behind a proxy, or say --insecure"
        )));
    }
    telemetry::start(&config.log);
    let outbox = match config.outbox.kind {
        OutboxKind::Embedded => config.outbox.path.display().to_string(),
        OutboxKind::JetStream => format!("JetStream, {}", config.nats.prefix),
    };
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

/// What keeps the relay from being safe on a network.
fn exposure(config: &Config) -> Option<&'static str> {
    match (config.tls.is_some(), config.authenticates()) {
        (true, true) => None,
        (true, false) => {
            Some("whoever reaches the port could do everything: name [[callers]], or set [jwt]")
        }
        (false, true) => {
            Some("tokens and addresses would cross the network in clear: set [server.tls]")
        }
        (false, false) => Some(
            "there is neither TLS nor authentication: set [server.tls], and name [[callers]] or set [jwt]",
        ),
    }
}

/// One line on standard output, for people and for scripts that wait for it.
fn announce(listener: &TcpListener, outbox: &str) -> Result<(), Failure> {
    let address = listener.local_addr()?;
    tracing::info!(%address, outbox, "serving");
    let mut out = std::io::stdout().lock();
    writeln!(out, "segment-relay serves gRPC on {address}")?;
    Ok(out.flush()?)
}
