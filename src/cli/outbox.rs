//! `segment-relay outbox move`: from the embedded outbox to the shared one.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    sync::Arc,
};

use clap::{Args, Subcommand};

use super::{Failure, spec_violations};
use crate::{
    config::Config,
    outbox::{NatsHandle, move_outbox},
    server, telemetry,
    vault::Vault,
};

/// Arguments of `outbox`.
#[derive(Args, Debug)]
pub(super) struct OutboxArgs {
    #[command(subcommand)]
    command: OutboxCommand,
}

#[derive(Subcommand, Debug)]
enum OutboxCommand {
    /// Move all that the embedded outbox in [outbox] path holds to the JetStream of [nats].
    /// Stop its relay first, and start those on JetStream afterwards, so that each user's
    /// events keep their order. A run that was interrupted is repeated. Exit code 1 where
    /// something had to stay
    Move(MoveArgs),
}

#[derive(Args, Debug)]
struct MoveArgs {
    /// TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Returns the exit code.
pub(super) async fn run(args: &OutboxArgs) -> Result<u8, Failure> {
    let OutboxCommand::Move(args) = &args.command;
    let config = Config::read(args.config.as_deref(), &spec_violations)?;
    if config.nats.servers.is_empty() {
        return Err(Failure::Usage(
            "[nats] servers is empty: name them in the file or in SEGMENT_RELAY__NATS__SERVERS"
                .to_owned(),
        ));
    }
    let telemetry = telemetry::start(&config)?;
    let vault = Arc::new(Vault::load(&config.secrets, true)?);
    let handle = NatsHandle::connect(
        &server::connection(&config.nats),
        server::layout(&config.nats),
    )
    .await?;
    let shows = std::io::stderr().is_terminal();
    let progress = |done: u64, total: u64| {
        if shows {
            let _ = write!(std::io::stderr(), "\r{done} of {total} captures");
        }
    };
    let (path, remember) = (&config.outbox.path, config.outbox.idempotency);
    let moved = move_outbox(path, handle, &vault, remember, progress).await;
    if shows {
        let _ = writeln!(std::io::stderr());
    }
    telemetry.flush().await;
    let moved = moved.map_err(|error| Failure::Other(error.to_string()))?;
    let mut out = std::io::stdout();
    writeln!(
        out,
        "moved {} captures, {} integrations, {} receipts, {} notices",
        moved.captures, moved.integrations, moved.receipts, moved.notices
    )?;
    if moved.known > 0 {
        writeln!(
            out,
            "{} captures were there already: callers had repeated them",
            moved.known
        )?;
    }
    for name in &moved.conflicts {
        writeln!(out, "stays {name}: its id was used for other content")?;
    }
    if moved.conflicts.is_empty() {
        writeln!(out, "{} is empty now and can be removed", path.display())?;
    }
    Ok(u8::from(!moved.conflicts.is_empty()))
}
