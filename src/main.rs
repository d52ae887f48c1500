//! The `segment-relay` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    segment_relay::cli::main()
}
