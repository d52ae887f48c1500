//! `segment-relay check`.

use std::{io::Write, path::PathBuf};

use clap::Args;

use super::{Failure, spec_violations};
use crate::config::Config;

/// Arguments of `check`.
#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    /// TOML file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Reads the file together with the environment, as `serve` would, and reports
/// every fault. Exit code 2 where there is one. Files of secrets that others may read or
/// write are warned of.
pub(super) fn run(args: &CheckArgs) -> Result<(), Failure> {
    let config = Config::read(Some(&args.config), &spec_violations)?;
    for warning in config.exposed_files(Some(&args.config)) {
        writeln!(std::io::stderr(), "warning: {warning}")?;
    }
    let integrations = config.integrations.len();
    let file = args.config.display();
    writeln!(
        std::io::stdout(),
        "{file}: no faults; {integrations} integrations"
    )?;
    Ok(())
}
