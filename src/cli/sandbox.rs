//! `segment-relay sandbox`.

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use clap::{Args, ValueEnum};
use tokio::{net::TcpListener, sync::broadcast::error::RecvError};
use tokio_util::sync::CancellationToken;

use super::{Failure, signals::cancel_on_signal};
use crate::sandbox::{self, DropConnection, Region, Rule, Sandbox, SandboxOptions};

/// Arguments of `sandbox`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  segment-relay sandbox
  segment-relay sandbox --status 503 --share 0.3
  curl http://127.0.0.1:8765/debugger?format=text
  curl -X PUT http://127.0.0.1:8765/control -d '{\"status\":429,\"retry_after\":\"2\",\"count\":5}'
  curl -X DELETE http://127.0.0.1:8765/control")]
pub(super) struct SandboxArgs {
    /// Loopback address of the non-EU endpoint; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 8765)))]
    listen: SocketAddr,

    /// Loopback address of the EU endpoint; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 8766)))]
    eu_listen: SocketAddr,

    /// Take events of these keys alone, and drop all others after a 200 as
    /// Segment does; repeat for more. Without it every key is taken
    #[arg(long, value_name = "REGION:KEY", value_parser = region_and_key)]
    write_key: Vec<(Region, String)>,

    /// Events to keep for the debugger
    #[arg(long, value_name = "EVENTS", default_value_t = 1_000)]
    keep: usize,

    /// Do not print events as they arrive
    #[arg(long)]
    quiet: bool,

    /// Count events without looking at them, for load tests: none is checked, kept or
    /// known again
    #[arg(long, conflicts_with_all = ["write_key", "reject_containing"])]
    count_only: bool,

    #[command(flatten)]
    fault: FaultArgs,
}

/// Misbehaviour from the start; `PUT /control` changes it.
#[derive(Args, Debug)]
#[command(next_help_heading = "Misbehaviour")]
struct FaultArgs {
    /// Answer with this HTTP status instead of 200
    #[arg(long, value_name = "CODE")]
    status: Option<u16>,

    /// Send this Retry-After header (seconds or a date)
    #[arg(long, value_name = "VALUE")]
    retry_after: Option<String>,

    /// Answer after so many milliseconds
    #[arg(long, value_name = "MS")]
    delay_ms: Option<u64>,

    /// Close the connection instead of answering
    #[arg(long, value_name = "WHEN")]
    drop_connection: Option<DropArg>,

    /// Share of the requests that misbehave, 0 to 1
    #[arg(long, value_name = "SHARE")]
    share: Option<f64>,

    /// Answer 400 to a request with an event that contains this text
    #[arg(long, value_name = "TEXT")]
    reject_containing: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DropArg {
    /// After reading the request
    BeforeAnswer,
    /// After a part of the answer
    MidAnswer,
}

fn region_and_key(text: &str) -> Result<(Region, String), String> {
    let (region, key) = text
        .split_once(':')
        .ok_or("write REGION:KEY, for example non_eu:abc or eu:def")?;
    let region = match region {
        "non_eu" => Region::NonEu,
        "eu" => Region::Eu,
        _ => return Err("the region is non_eu or eu".to_owned()),
    };
    Ok((region, key.to_owned()))
}

impl FaultArgs {
    fn rule(&self) -> Option<Rule> {
        let misbehaves = self.status.is_some()
            || self.retry_after.is_some()
            || self.delay_ms.is_some()
            || self.drop_connection.is_some()
            || self.reject_containing.is_some();
        misbehaves.then(|| Rule {
            status: self.status,
            retry_after: self.retry_after.clone(),
            delay_ms: self.delay_ms,
            drop_connection: self.drop_connection.map(|when| match when {
                DropArg::BeforeAnswer => DropConnection::BeforeAnswer,
                DropArg::MidAnswer => DropConnection::MidAnswer,
            }),
            share: self.share,
            reject_containing: self.reject_containing.clone(),
            ..Rule::default()
        })
    }
}

/// Runs the sandbox until SIGTERM or SIGINT.
pub(super) async fn run(args: SandboxArgs) -> Result<(), Failure> {
    for (flag, address) in [("--listen", args.listen), ("--eu-listen", args.eu_listen)] {
        if !address.ip().is_loopback() {
            let rule = "the sandbox takes events of anybody, so it listens on loopback alone";
            return Err(Failure::Usage(format!("{flag} {address}: {rule}")));
        }
    }
    let sandbox = Arc::new(Sandbox::new(SandboxOptions {
        write_keys: args.write_key.clone(),
        keep_entries: args.keep,
        count_only: args.count_only,
        ..SandboxOptions::default()
    }));
    if let Some(rule) = args.fault.rule() {
        sandbox
            .set_rules(vec![rule])
            .map_err(|error| Failure::Usage(error.to_string()))?;
    }
    let non_eu = bind("--listen", args.listen).await?;
    let eu = bind("--eu-listen", args.eu_listen).await?;
    announce(&non_eu, &eu)?;
    let shutdown = CancellationToken::new();
    tokio::spawn(cancel_on_signal(shutdown.clone())?);
    if !args.quiet {
        tokio::spawn(print_events(Arc::clone(&sandbox)));
    }
    let listeners = vec![(Region::NonEu, non_eu), (Region::Eu, eu)];
    sandbox::run(listeners, sandbox, shutdown).await;
    Ok(())
}

async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address)
        .await
        .map_err(|error| Failure::Other(format!("{flag} {address}: {error}")))
}

/// One line on standard output, for people and for scripts that wait for it.
fn announce(non_eu: &TcpListener, eu: &TcpListener) -> Result<(), Failure> {
    let (non_eu, eu) = (non_eu.local_addr()?, eu.local_addr()?);
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "sandbox of Segment listens on http://{non_eu} (non-EU) and http://{eu} (EU)"
    )?;
    Ok(out.flush()?)
}

/// Prints what arrives. A slow terminal misses some, and is told how many.
async fn print_events(sandbox: Arc<Sandbox>) {
    let mut entries = sandbox.subscribe();
    loop {
        let text = match entries.recv().await {
            Ok(entry) => sandbox::entry_text(&entry),
            Err(RecvError::Lagged(missed)) => format!("… {missed} events are not shown\n"),
            Err(RecvError::Closed) => return,
        };
        if write!(std::io::stdout(), "{text}").is_err() {
            return;
        }
    }
}
