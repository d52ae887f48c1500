//! `segment-relay outbox`: the schema of the shared outbox, and moves into and within it.

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::{Args, Subcommand};
use tokio::time::Instant;

use super::{Failure, spec_violations};
use crate::{
    config::Config,
    integration::IntegrationId,
    outbox::{self, MoveError, Moved, PostgresError, PostgresOutbox, SchemaChange},
    server::RunError,
    telemetry::{self, FLUSH_TIMEOUT},
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
    /// Make or migrate the schema in each database of [postgres]
    Init(ConfigArgs),
    /// Move an integration with all its captures to another database of [postgres]. The relays
    /// keep running; meanwhile the integration takes no captures and its deliveries wait.
    /// Repeat an interrupted run
    MoveIntegration(MoveIntegrationArgs),
    /// Read all of the embedded outbox in [outbox] path and say what is damaged, and how many events
    /// of which integration. Stop its relay first. Exit code 1 where something is damaged
    Check(CheckArgs),
    /// Move the embedded outbox in [outbox] path to the databases of [postgres]. Stop its relay
    /// first, and start those on PostgreSQL afterwards, so that each user's events keep their
    /// order. Repeat an interrupted run. Exit code 1 where something had to stay
    Move(ConfigArgs),
}

#[derive(Args, Debug)]
struct ConfigArgs {
    /// TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct CheckArgs {
    /// Accept the loss of what is damaged, so that the relay starts again: copies of a damaged
    /// journal are kept beside it, and all that can be read is taken over
    #[arg(long)]
    accept_damage: bool,

    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Args, Debug)]
struct MoveIntegrationArgs {
    /// The integration
    #[arg(value_name = "ID")]
    integration_id: String,

    /// The database that it moves to, by its place in [postgres] urls; 0 is the first
    #[arg(long, value_name = "NUMBER")]
    to: usize,

    #[command(flatten)]
    config: ConfigArgs,
}

impl From<PostgresError> for Failure {
    fn from(error: PostgresError) -> Self {
        Self::Run(RunError::Postgres(error))
    }
}

impl From<MoveError> for Failure {
    fn from(error: MoveError) -> Self {
        Self::Other(error.to_string())
    }
}

/// Returns the exit code.
pub(super) async fn run(args: &OutboxArgs) -> Result<u8, Failure> {
    match &args.command {
        OutboxCommand::Init(args) => init(args).await,
        OutboxCommand::MoveIntegration(args) => move_integration(args).await,
        OutboxCommand::Check(args) => check(args).await,
        OutboxCommand::Move(args) => move_embedded(args).await,
    }
}

/// Reads the configuration; the databases have to be named.
fn with_databases(path: Option<&Path>) -> Result<Config, Failure> {
    let config = Config::read(path, &spec_violations)?;
    if config.postgres.urls.is_empty() {
        return Err(Failure::Usage(
            "[postgres] urls is empty: name the databases in the file or in \
             SEGMENT_RELAY__POSTGRES__URLS"
                .to_owned(),
        ));
    }
    Ok(config)
}

async fn init(args: &ConfigArgs) -> Result<u8, Failure> {
    let config = with_databases(args.config.as_deref())?;
    let exists = PostgresOutbox::store_exists(&config.postgres).await?;
    let vault = Arc::new(Vault::load(&config.secrets, exists)?);
    let mut out = std::io::stdout();
    for report in outbox::init(&config.postgres, &vault).await? {
        let change = match report.change {
            SchemaChange::Made => "made".to_owned(),
            SchemaChange::Migrated { from, to } => format!("migrated from {from} to {to}"),
            SchemaChange::UpToDate => "up to date".to_owned(),
        };
        writeln!(out, "{}: {change}", report.database)?;
    }
    Ok(0)
}

async fn move_integration(args: &MoveIntegrationArgs) -> Result<u8, Failure> {
    let name = &args.integration_id;
    let id = IntegrationId::new(name)
        .ok_or_else(|| Failure::Usage(format!("{name:?} is not an integration_id")))?;
    let config = with_databases(args.config.config.as_deref())?;
    let databases = config.postgres.urls.len();
    if args.to >= databases {
        return Err(Failure::Usage(format!(
            "--to {}: [postgres] urls names {databases} database(s), counted from 0",
            args.to
        )));
    }
    let telemetry = telemetry::start(&config)?;
    let vault = Arc::new(Vault::load(&config.secrets, true)?);
    let progress = Progress::new("rows");
    let shown = |done, total| progress.show(done, total);
    let moved = outbox::move_integration(&config.postgres, &vault, &id, args.to, shown).await;
    progress.end();
    telemetry.flush(Instant::now() + FLUSH_TIMEOUT).await;
    writeln!(
        std::io::stdout(),
        "moved {name} with {} captures to database {}",
        moved?,
        args.to
    )?;
    Ok(0)
}

async fn move_embedded(args: &ConfigArgs) -> Result<u8, Failure> {
    let config = with_databases(args.config.as_deref())?;
    let telemetry = telemetry::start(&config)?;
    let vault = Arc::new(Vault::load(&config.secrets, true)?);
    let (path, remember) = (&config.outbox.path, config.outbox.idempotency);
    let progress = Progress::new("captures");
    let shown = |done, total| progress.show(done, total);
    let moved = outbox::move_to_postgres(path, &config.postgres, &vault, remember, shown).await;
    progress.end();
    telemetry.flush(Instant::now() + FLUSH_TIMEOUT).await;
    report(&moved?, path)
}

async fn check(args: &CheckArgs) -> Result<u8, Failure> {
    let config = Config::read(args.config.config.as_deref(), &spec_violations)?;
    let telemetry = telemetry::start(&config)?;
    let path = &config.outbox.path;
    let progress = Progress::new("rows");
    let report = outbox::check(path, |done, total| progress.show(done, total));
    progress.end();
    let report = report.map_err(|error| Failure::Other(error.to_string()))?;
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{}: {} captures, {} events wait, {} dead letters, {} records in the journal alone",
        path.display(),
        report.captures,
        report.waiting,
        report.dead_letters,
        report.journal_records
    )?;
    for damage in &report.damages {
        let events = match damage.events {
            0 => String::new(),
            events => format!(": {events} event(s)"),
        };
        let whose = damage.integration_id.as_deref();
        let whose = whose.map_or_else(String::new, |id| format!(" of {id}"));
        writeln!(out, "damaged: {}{events}{whose}", damage.what)?;
    }
    if report.damages.is_empty() {
        writeln!(out, "nothing is damaged")?;
    } else if args.accept_damage {
        let vault = Arc::new(Vault::load(&config.secrets, true)?);
        outbox::accept_damage(path, &vault).map_err(RunError::Open)?;
        writeln!(out, "accepted: the relay can start")?;
    }
    telemetry.flush(Instant::now() + FLUSH_TIMEOUT).await;
    Ok(u8::from(!report.damages.is_empty() && !args.accept_damage))
}

/// Prints what was moved, and returns the exit code.
fn report(moved: &Moved, path: &Path) -> Result<u8, Failure> {
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

/// A count on standard error, where that is a terminal.
struct Progress {
    unit: &'static str,
    is_shown: bool,
}

impl Progress {
    fn new(unit: &'static str) -> Self {
        let is_shown = std::io::stderr().is_terminal();
        Self { unit, is_shown }
    }

    fn show(&self, done: u64, total: u64) {
        if self.is_shown {
            let _ = write!(std::io::stderr(), "\r{done} of {total} {}", self.unit);
        }
    }

    fn end(&self) {
        if self.is_shown {
            let _ = writeln!(std::io::stderr());
        }
    }
}
