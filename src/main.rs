//! The `segment-relay` command.

use std::process::ExitCode;

/// Much is made by one thread and freed by another, which it does cheapest
/// (docs/decisions.md, 58).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    segment_relay::cli::main()
}
