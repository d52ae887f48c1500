//! `segment-relay dead-letters`.

use std::io::Write;

use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use prost_types::Timestamp;

use super::{
    connect::{Connection, Wire, request},
    failure::ClientError,
    json::{to_json, write_json},
    render,
    timestamp::timestamp,
};
use crate::proto::{
    DeadLetterFilter, DeliveryReason, DiscardDeadLettersRequest, ListDeadLettersRequest,
    ReplayDeadLettersRequest, dead_letter_service_client::DeadLetterServiceClient,
};

/// Dead letters of one page.
const PAGE: i32 = 1_000;
/// Reasons with which an event can be given up, in the words of the flag.
const PREFIX: &str = "DELIVERY_REASON_";

/// What is done with dead letters.
#[derive(Subcommand, Debug)]
pub enum DeadLettersCommand {
    /// List dead letters, oldest first
    List {
        /// The connection
        #[command(flatten)]
        connection: Connection,
        /// Which ones
        #[command(flatten)]
        filter: FilterArgs,
        /// How many at the most
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
    },
    /// Queue dead letters again, behind live traffic
    #[command(
        after_help = "Says what it would do, and does it with --yes.\n\nExample:\n  \
        segment-relay dead-letters replay --integration acme --reason expired --yes"
    )]
    Replay(ChangeArgs),
    /// Remove dead letters with their payloads for good
    #[command(
        after_help = "Says what it would do, and does it with --yes.\n\nExample:\n  \
        segment-relay dead-letters discard 17 18 --yes"
    )]
    Discard(ChangeArgs),
}

/// Which dead letters are meant.
#[derive(Args, Debug, Default)]
pub struct FilterArgs {
    /// Only of this integration
    // An empty one, perhaps of an unset variable, would mean all.
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    integration: Option<String>,
    /// Only with this reason: payload-rejected, request-rejected, expired,
    /// integration-deleted, damaged
    #[arg(long, value_name = "WORD", value_parser = reason)]
    reason: Option<DeliveryReason>,
    /// Only given up at this time or later
    #[arg(long, value_name = "RFC3339", value_parser = |text: &str| timestamp("--since", text))]
    since: Option<Timestamp>,
    /// Only given up before this time
    #[arg(long, value_name = "RFC3339", value_parser = |text: &str| timestamp("--until", text))]
    until: Option<Timestamp>,
}

/// What is changed.
#[derive(Args, Debug)]
pub struct ChangeArgs {
    /// The connection
    #[command(flatten)]
    connection: Connection,
    /// Which ones
    #[command(flatten)]
    filter: FilterArgs,
    /// Dead letters by id, as `list` shows them, instead of a filter
    #[arg(value_name = "ID", conflicts_with_all = ["integration", "reason", "since", "until", "all"])]
    ids: Vec<String>,
    /// All dead letters
    #[arg(long, conflicts_with_all = ["integration", "reason", "since", "until"])]
    all: bool,
    /// Do it, instead of only saying what would be done
    #[arg(long)]
    yes: bool,
}

fn reason(word: &str) -> Result<DeliveryReason, String> {
    let name = format!("{PREFIX}{}", word.to_uppercase().replace('-', "_"));
    DeliveryReason::from_str_name(&name)
        .filter(|reason| *reason != DeliveryReason::Unspecified)
        .ok_or_else(|| "not a reason; see --help".to_owned())
}

impl ChangeArgs {
    /// The filter, or nothing where ids are given.
    fn filter(&self) -> Result<Option<DeadLetterFilter>, ClientError> {
        if !self.ids.is_empty() {
            return Ok(None);
        }
        let filter = self.filter.to_proto();
        if filter == DeadLetterFilter::default() && !self.all {
            let rule = "name dead letters by id or by a filter, or say --all";
            return Err(ClientError::Input(rule.to_owned()));
        }
        Ok(Some(filter))
    }
}

impl FilterArgs {
    fn to_proto(&self) -> DeadLetterFilter {
        DeadLetterFilter {
            integration_id: self.integration.clone().unwrap_or_default(),
            reason: self.reason.unwrap_or_default().into(),
            start_time: self.since,
            end_time: self.until,
        }
    }
}

/// Runs a command; prints to `out`. The number is the process's exit code.
///
/// # Errors
/// [`ClientError`], for standard error.
pub(super) async fn run(
    command: DeadLettersCommand,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    match command {
        DeadLettersCommand::List {
            connection,
            filter,
            limit,
        } => list(&connection, &filter, limit, out).await,
        DeadLettersCommand::Replay(args) => replay(&args, out).await,
        DeadLettersCommand::Discard(args) => discard(&args, out).await,
    }
}

async fn service(connection: &Connection) -> Result<DeadLetterServiceClient<Wire>, ClientError> {
    Ok(DeadLetterServiceClient::new(connection.connect().await?))
}

async fn list(
    connection: &Connection,
    filter: &FilterArgs,
    limit: usize,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    let mut service = service(connection).await?;
    let filter = filter.to_proto();
    let mut listed = Vec::new();
    let mut page_token = String::new();
    loop {
        let left = i32::try_from(limit - listed.len()).unwrap_or(PAGE);
        let message = ListDeadLettersRequest {
            integration_id: filter.integration_id.clone(),
            reason: filter.reason,
            start_time: filter.start_time,
            end_time: filter.end_time,
            page_size: left.clamp(1, PAGE),
            page_token,
        };
        let page = service
            .list_dead_letters(request(connection, message))
            .await?
            .into_inner();
        listed.extend(page.dead_letters);
        page_token = page.next_page_token;
        if page_token.is_empty() || listed.len() >= limit {
            break;
        }
    }
    listed.truncate(limit);
    if connection.json {
        for letter in &listed {
            write_json(out, to_json(letter, "DeadLetter", false))?;
        }
        return Ok(0);
    }
    write!(out, "{}", render::dead_letter_table(&listed))?;
    if !page_token.is_empty() {
        writeln!(out, "There are more; raise --limit or narrow the filter.")?;
    }
    Ok(0)
}

async fn replay(args: &ChangeArgs, out: &mut impl Write) -> Result<u8, ClientError> {
    let mut service = service(&args.connection).await?;
    let message = |dry_run| -> Result<_, ClientError> {
        let (filter, dead_letter_ids) = (args.filter()?, args.ids.clone());
        let message = ReplayDeadLettersRequest {
            filter,
            dead_letter_ids,
            dry_run,
        };
        Ok(request(&args.connection, message))
    };
    let dry = service
        .replay_dead_letters(message(true)?)
        .await?
        .into_inner();
    let answer = if args.yes {
        service
            .replay_dead_letters(message(false)?)
            .await?
            .into_inner()
    } else {
        dry
    };
    if args.connection.json {
        write_json(out, to_json(&answer, "ReplayDeadLettersResponse", true))?;
        return Ok(0);
    }
    let (count, older) = (dry.event_count, dry.older_than_deduplication_count);
    if args.yes {
        writeln!(out, "{} events are queued again.", answer.event_count)?;
    } else {
        writeln!(out, "{count} events would be queued again.")?;
    }
    if older > 0 {
        writeln!(
            out,
            "{older} of them are older than 24 hours, in which Segment removes repeats by \
             messageId: one that had reached Segment unnoticed would show twice."
        )?;
    }
    if dry.former_count > 0 {
        writeln!(
            out,
            "{} dead letters are passed over: their integration was deleted, and they are never \
             sent. They can be discarded.",
            dry.former_count
        )?;
    }
    ask_for_yes(args, count, out)
}

async fn discard(args: &ChangeArgs, out: &mut impl Write) -> Result<u8, ClientError> {
    let mut service = service(&args.connection).await?;
    let (filter, dead_letter_ids) = (args.filter()?, args.ids.clone());
    let message = DiscardDeadLettersRequest {
        filter,
        dead_letter_ids,
        dry_run: !args.yes,
    };
    let answer = service
        .discard_dead_letters(request(&args.connection, message))
        .await?;
    let answer = answer.into_inner();
    if args.connection.json {
        write_json(out, to_json(&answer, "DiscardDeadLettersResponse", true))?;
        return Ok(0);
    }
    let count = answer.event_count;
    if args.yes {
        writeln!(out, "{count} events are removed for good.")?;
    } else {
        writeln!(out, "{count} events would be removed for good.")?;
    }
    ask_for_yes(args, count, out)
}

fn ask_for_yes(args: &ChangeArgs, count: u64, out: &mut impl Write) -> Result<u8, ClientError> {
    if !args.yes && count > 0 {
        writeln!(out, "Nothing was changed; say --yes to do it.")?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_the_words_of_the_schema() {
        assert_eq!(
            reason("payload-rejected"),
            Ok(DeliveryReason::PayloadRejected)
        );
        assert_eq!(reason("Expired"), Ok(DeliveryReason::Expired));
        for bad in ["unspecified", "", "tired"] {
            assert!(reason(bad).is_err(), "{bad}");
        }
    }
}
