//! What the served benchmarks need beside the relay, as processes of their own: load, a bare tonic server,
//! and the raw limits of the disk and of the store. `benches/run` puts them together.
//!
//! Each command prints one line of JSON. All of them are bounded in time and talk to loopback alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod bare;
mod call;
mod collector;
mod disk;
mod plan;
mod record;
mod run;
mod setup;
mod store;
mod stream;
mod template;
#[path = "../workload/mod.rs"]
mod workload;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Parts of the benchmarks; benches/run puts them together")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Given by `cargo bench`
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Command {
    /// A tonic server that decodes the relay's requests and does nothing
    Bare,
    /// A collector of traces and metrics that drops what it gets
    Collector,
    /// Send captures
    Run(plan::RunArgs),
    /// Create the integrations that the captures are for
    Setup(setup::SetupArgs),
    /// Wait until a capture is accepted
    Ready(setup::ReadyArgs),
    /// Group-committed appends to a file
    Disk(disk::DiskArgs),
    /// Group-committed inserts into, and deletes from, a bare SQLite database
    Store(store::StoreArgs),
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let result = match Cli::parse().command {
        Command::Bare => runtime.block_on(bare::serve()),
        Command::Collector => runtime.block_on(collector::serve()),
        Command::Run(args) => runtime.block_on(run::run(args)),
        Command::Setup(args) => runtime.block_on(setup::setup(args)),
        Command::Ready(args) => runtime.block_on(setup::ready(args)),
        Command::Disk(args) => disk::run(&args),
        Command::Store(args) => store::run(&args),
    };
    println!("{result}");
}
