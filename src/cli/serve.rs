//! `segment-relay serve`: telemetry, config, build, spawn, signal, drain.

use std::{io::Write, path::PathBuf};

use clap::Args;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Failure, descriptors,
    signals::{Reloads, cancel_on_signal},
    spec_violations,
};
use crate::{
    config::{Config, Listen, OutboxKind},
    panics,
    server::{Listener, Relay},
    telemetry::{self, FLUSH_TIMEOUT, Telemetry},
};

/// Arguments of `serve`.
#[derive(Args, Debug)]
#[command(
    after_help = "SIGTERM and SIGINT drain the relay, a second one ends it at once. SIGHUP makes it read [log] filter \
    again; all other settings are read at the start alone."
)]
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
    let mut config = Config::read(args.config.as_deref(), &spec_violations)?;
    let listen = config.server.listen.clone();
    let exposed = exposure(&config);
    if let Some(exposed) = exposed.filter(|_| !listen.is_local() && !args.insecure) {
        return Err(Failure::Usage(format!(
            "[server] listen = \"{listen}\" is not a loopback address, and {exposed}; or listen on \
             127.0.0.1 behind a proxy, or say --insecure"
        )));
    }
    if matches!(listen, Listen::Unix(_)) && config.tls.is_some() {
        return Err(Failure::Usage(format!(
            "[server] listen = \"{listen}\" is a Unix socket, which has no TLS: leave [server.tls] \
             out, or listen on an address"
        )));
    }
    let telemetry = telemetry::start(&config)?;
    panics::install();
    descriptors::fit(&mut config);
    for warning in config.exposed_files(args.config.as_deref()) {
        tracing::warn!("{warning}");
    }
    let outbox = match config.outbox.kind {
        OutboxKind::Embedded => config.outbox.path.display().to_string(),
        OutboxKind::Postgres => format!("PostgreSQL, databases: {}", config.postgres.urls.len()),
    };
    let filter = config.log.filter.clone();
    let relay = Relay::open(config).await?;
    let listener = Listener::bind(&listen)
        .await
        .map_err(|error| Failure::Other(format!("[server] listen = \"{listen}\": {error}")))?;
    announce(&listener, &outbox)?;
    let shutdown = CancellationToken::new();
    tokio::spawn(cancel_on_signal(shutdown.clone())?);
    let mut reloads = Reloads::new()?;
    let ended = {
        let reload = async {
            let mut current = filter;
            loop {
                reloads.next().await;
                change_filter(args, &telemetry, &mut current);
            }
        };
        let last = async |deadline| telemetry.flush(deadline).await;
        tokio::select! {
            ended = relay.run_beside(listener, shutdown, last) => ended,
            () = telemetry.tell_of_storms() => Ok(()),
            () = reload => Ok(()),
        }
    };
    // Where the relay could not even begin.
    telemetry.flush(Instant::now() + FLUSH_TIMEOUT).await;
    Ok(ended?)
}

/// Takes the log's filter from the configuration as it is now.
fn change_filter(args: &ServeArgs, telemetry: &Telemetry, current: &mut String) {
    match Config::read(args.config.as_deref(), &spec_violations) {
        Ok(config) if config.log.filter == *current => {
            tracing::info!(filter = %current, "SIGHUP: the log's filter has not changed");
        }
        Ok(config) => {
            telemetry.set_filter(&config.log.filter);
            *current = config.log.filter;
            tracing::warn!(filter = %current, "SIGHUP: the log has another filter");
        }
        Err(faults) => {
            tracing::error!(%faults, "SIGHUP: the configuration has faults; nothing was changed");
        }
    }
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
fn announce(listener: &Listener, outbox: &str) -> Result<(), Failure> {
    let address = listener.address()?;
    tracing::info!(%address, outbox, "serving");
    let mut out = std::io::stdout().lock();
    writeln!(out, "segment-relay serves gRPC on {address}")?;
    Ok(out.flush()?)
}
