//! `segment-relay nats init`: the streams of the shared outbox.

use std::{io::Write, path::PathBuf};

use clap::{Args, Subcommand};

use super::{Failure, spec_violations};
use crate::{
    config::Config,
    outbox::{JetStreamError, NatsHandle},
    server::{self, RunError},
};

/// Arguments of `nats`.
#[derive(Args, Debug)]
pub(super) struct NatsArgs {
    #[command(subcommand)]
    command: NatsCommand,
}

#[derive(Subcommand, Debug)]
enum NatsCommand {
    /// Make the streams and the bucket that are missing, and say what differs from [nats].
    /// Nothing is ever deleted. Exit code 1 where something differs
    Init(InitArgs),
}

#[derive(Args, Debug)]
struct InitArgs {
    /// TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Change replicas, bounds and placement of what is there, too
    #[arg(long)]
    apply: bool,
}

impl From<JetStreamError> for Failure {
    fn from(error: JetStreamError) -> Self {
        Self::Run(RunError::JetStream(error))
    }
}

/// Returns the exit code.
pub(super) async fn run(args: &NatsArgs) -> Result<u8, Failure> {
    let NatsCommand::Init(args) = &args.command;
    let config = Config::read(args.config.as_deref(), &spec_violations)?;
    if config.nats.servers.is_empty() {
        return Err(Failure::Usage(
            "[nats] servers is empty: name them in the file or in SEGMENT_RELAY__NATS__SERVERS"
                .to_owned(),
        ));
    }
    let (connection, layout) = (
        server::connection(&config.nats),
        server::layout(&config.nats),
    );
    let handle = NatsHandle::connect(&connection, layout).await?;
    let mut out = std::io::stdout();
    let made = handle.init().await?;
    for stream in &made.missing {
        writeln!(out, "made     {stream}")?;
    }
    if args.apply && !made.differences.is_empty() {
        handle.apply().await?;
        for difference in &made.differences {
            writeln!(out, "changed  {difference}")?;
        }
    }
    let report = handle.check().await?;
    for stream in report
        .present
        .iter()
        .filter(|stream| !made.missing.contains(stream))
    {
        writeln!(out, "present  {stream}")?;
    }
    for difference in &report.differences {
        writeln!(out, "differs  {difference}")?;
    }
    if report.differences.is_empty() {
        return Ok(0);
    }
    let hint =
        "`--apply` changes replicas, bounds and placement; the rest has to be changed by hand";
    writeln!(out, "{hint}")?;
    Ok(1)
}
