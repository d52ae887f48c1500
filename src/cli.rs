//! The `segment-relay` command: arguments in, exit code out.

mod check;
mod descriptors;
mod generate;
mod outbox;
mod sandbox;
mod serve;
mod signals;

use std::{io::Write, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{
    client::{self, ClientCommand, ClientError},
    config::{DEFAULT_TOML, Faults},
    demo::{self, DemoError},
    integration::{Integration, Revision},
    proto,
    server::RunError,
    telemetry::OtlpError,
    time::UnixMillis,
    vault::VaultError,
    violation::Violation,
};

/// Relays Jebbit captures to Twilio Segment: durably, in batches, over gRPC.
#[derive(Parser, Debug)]
#[command(name = "segment-relay", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the relay
    Serve(serve::ServeArgs),
    /// Show the main job in one process, with a sandbox in Segment's place
    Demo,
    /// Run an imitation of Segment's tracking API on loopback
    Sandbox(sandbox::SandboxArgs),
    /// Check a configuration file: all its faults at once, each with its line; warn of files of
    /// secrets that other users may read or write
    Check(check::CheckArgs),
    /// Prepare the shared outbox on PostgreSQL, and move what is stored
    Outbox(outbox::OutboxArgs),
    /// Print the commented default configuration
    Config,
    /// Make a bearer token, and the hash of it that [[callers]] takes
    Token,
    /// Make a secret that signs webhooks, for [notify]
    Secret,
    /// Make a key for what is stored, for [secrets]
    #[command(
        after_help = "To change the key, put the new one on a line before the others and \
        restart the relay. It says in its log when the others are not needed any more."
    )]
    Key,
    #[command(flatten)]
    Client(Box<ClientCommand>),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The arguments or the configuration are wrong: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The configuration is wrong: exit code 2.
    #[error(transparent)]
    Config(#[from] Faults),
    /// The relay could not run: exit code 1.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The way to the collector can't be set up: exit code 1.
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    /// A call failed: exit code 1, or 2 where the arguments are wrong.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The demo failed: exit code 1.
    #[error("demo: {0}")]
    Demo(#[from] DemoError),
    /// The system gives no random bytes: exit code 1.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// A file or a socket failed: exit code 1.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Anything else: exit code 1.
    #[error("{0}")]
    Other(String),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Config(_) => 2,
            Self::Client(error) => error.exit_code(),
            Self::Run(_)
            | Self::Otlp(_)
            | Self::Demo(_)
            | Self::Vault(_)
            | Self::Io(_)
            | Self::Other(_) => 1,
        }
    }
}

/// Runs the command that the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::Io(error)),
    };
    match runtime.block_on(run(cli.command)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => report(&failure),
    }
}

async fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Serve(args) => serve::run(&args).await.map(|()| 0),
        Command::Demo => {
            demo::run(&mut std::io::stdout()).await?;
            Ok(0)
        }
        Command::Sandbox(args) => sandbox::run(args).await.map(|()| 0),
        Command::Check(args) => check::run(&args).map(|()| 0),
        Command::Outbox(args) => outbox::run(&args).await,
        Command::Client(command) => Ok(client::run(*command, &mut std::io::stdout()).await?),
        Command::Token => generate::token().map(|()| 0),
        Command::Secret => generate::webhook_secret().map(|()| 0),
        Command::Key => generate::key().map(|()| 0),
        Command::Config => {
            std::io::stdout()
                .lock()
                .write_all(DEFAULT_TOML.as_bytes())?;
            Ok(0)
        }
    }
}

fn report(failure: &Failure) -> ExitCode {
    // A reader of standard output that has gone is not worth a word.
    let io = match failure {
        Failure::Io(error)
        | Failure::Client(ClientError::Io(error))
        | Failure::Demo(DemoError::Io(error)) => Some(error.kind()),
        _ => None,
    };
    if io == Some(std::io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    let _ = writeln!(std::io::stderr(), "segment-relay: {failure}");
    ExitCode::from(failure.exit_code())
}

/// What an integration of the configuration file breaks.
fn spec_violations(spec: &proto::Integration) -> Vec<Violation> {
    let revision = Revision {
        etag: String::new(),
        mapping_version: 1,
        create_time: UnixMillis(0),
        update_time: UnixMillis(0),
        read_only: true,
        ..Revision::default()
    };
    Integration::new(spec, revision).err().unwrap_or_default()
}
