//! The arguments of the client commands.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use super::{
    connect::{Connection, Reach, time},
    dead_letters::DeadLettersCommand,
};
use crate::proto::{DataRegion, DeliveryState, EventType, WaitFor};

/// Commands that call a running relay.
#[derive(Subcommand, Debug)]
pub enum ClientCommand {
    /// Send one capture
    #[command(
        after_help = "Exit codes with --wait delivered: 0 delivered or skipped, 3 still \
        waiting, 4 a dead letter.\n\nExample:\n  segment-relay capture --integration acme \
        --email test@aol.com --campaign-id n3zrik6g \\\n    --session-id y2P5ks05mqzGsdkIGjbQ \
        --attribute age_group=25-34 --wait delivered"
    )]
    Capture {
        /// The connection
        #[command(flatten)]
        connection: Connection,
        /// The capture
        #[command(flatten)]
        capture: CaptureArgs,
        /// When to answer
        #[arg(long, value_enum, default_value_t = Wait::Accepted)]
        wait: Wait,
    },
    /// Show the events that a capture would become, and every rule that it breaks
    #[command(
        after_help = "Exit code 1 where the capture breaks rules. Takes the same input as \
        `capture`.\n\nExample:\n  segment-relay preview --integration acme --file capture.json"
    )]
    Preview {
        /// The connection
        #[command(flatten)]
        connection: Connection,
        /// The capture
        #[command(flatten)]
        capture: CaptureArgs,
    },
    /// Show what became of a capture, with every attempt
    #[command(after_help = "Example:\n  segment-relay status --integration acme \
        5e2e1b0c9d7b4f21a8d6b3c2f1e0d9c8")]
    Status {
        /// The connection
        #[command(flatten)]
        connection: Connection,
        /// Integration of the capture
        #[arg(long, value_name = "ID")]
        integration: String,
        /// The capture's id, given or derived
        capture_id: String,
    },
    /// Follow the deliveries live, until Ctrl-C
    #[command(
        after_help = "Example:\n  segment-relay watch --integration acme --state retrying \
        --state dead-lettered"
    )]
    Watch {
        /// The connection
        #[command(flatten)]
        connection: Connection,
        /// Only this integration
        #[arg(long, value_name = "ID")]
        integration: Option<String>,
        /// Only changes into this state; repeat for more
        #[arg(long, value_enum)]
        state: Vec<StateArg>,
        /// Only this type of event
        #[arg(long, value_enum)]
        r#type: Vec<TypeArg>,
    },
    /// Hold an integration's deliveries: captures are accepted and wait, nothing is sent
    #[command(
        after_help = "No event is given up for its age meanwhile.\n\nExample:\n  \
        segment-relay pause acme"
    )]
    Pause {
        /// The connection
        #[command(flatten)]
        connection: Connection,
        /// Which integration
        integration: String,
    },
    /// Let a paused integration's deliveries go on
    #[command(after_help = "Example:\n  segment-relay resume acme")]
    Resume {
        /// The connection
        #[command(flatten)]
        connection: Connection,
        /// Which integration
        integration: String,
    },
    /// List, replay or discard events that were refused for good or given up
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Erase a person's data: waiting events, dead letters, history
    #[command(
        after_help = "Events that Segment has taken are Segment's to delete.\n\nExample:\n  \
        segment-relay erase --email test@aol.com",
        group(clap::ArgGroup::new("subject").required(true).args(["email", "email_sha256"]))
    )]
    Erase {
        /// The connection
        #[command(flatten)]
        connection: Connection,
        /// The person's address
        #[arg(long, value_name = "ADDRESS")]
        email: Option<String>,
        /// Or its SHA-256 in hex, as in userId
        #[arg(long, value_name = "HASH")]
        email_sha256: Option<String>,
        /// Only in this integration
        #[arg(long, value_name = "ID", default_value = "")]
        integration: String,
    },
    /// List the receipts of erasures, newest first
    Receipts {
        /// The connection
        #[command(flatten)]
        connection: Connection,
        /// Only those of this person
        #[arg(long, value_name = "HASH")]
        email_sha256: Option<String>,
        /// How many at the most
        #[arg(long, value_name = "RECEIPTS", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1_000))]
        limit: u16,
    },
    /// Exit with 0 if the relay serves, else with 1: a probe for containers
    #[command(
        after_help = "Examples:\n  segment-relay health --address 127.0.0.1:50051\n  \
        segment-relay health --address unix:/run/segment-relay.sock\n\nWhere client \
        certificates are required, a probe needs one too: --certificate-file and --key-file, or \
        SEGMENT_RELAY_CERTIFICATE_FILE and SEGMENT_RELAY_KEY_FILE. docs/kubernetes.md has more."
    )]
    Health {
        /// Where it is
        #[command(flatten)]
        reach: Reach,
        /// Time to wait for an answer, such as 500ms or 2s (or 2)
        #[arg(long, value_name = "TIME", default_value = "2s", value_parser = time)]
        timeout: Duration,
        /// The service to ask for; all of the relay by default
        #[arg(long, value_name = "NAME", default_value = "")]
        service: String,
    },
}

/// A capture, from flags or a file.
#[derive(Args, Debug, Default)]
pub struct CaptureArgs {
    /// Integration whose mappings and write key are used
    #[arg(long, value_name = "ID")]
    pub integration: String,
    /// Capture as proto JSON, - for standard input; the other flags win over it
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Idempotency key; derived from campaign and session where it is left out
    #[arg(long, value_name = "ID")]
    pub capture_id: Option<String>,
    /// E-mail address as collected
    #[arg(long)]
    pub email: Option<String>,
    /// Campaign id, sent as surveyId
    #[arg(long, value_name = "ID")]
    pub campaign_id: Option<String>,
    /// Campaign name, sent as surveyTitle
    #[arg(long, value_name = "NAME")]
    pub campaign_name: Option<String>,
    /// Session id, sent as surveySessionId
    #[arg(long, value_name = "ID")]
    pub session_id: Option<String>,
    /// Sent as trafficSource
    #[arg(long, value_name = "SOURCE")]
    pub traffic_source: Option<String>,
    /// When the person answered; the time of receipt where it is left out
    #[arg(long, value_name = "RFC3339")]
    pub occur_time: Option<String>,
    /// Region of the data
    #[arg(long, value_enum)]
    pub region: Option<RegionArg>,
    /// Attribute with a text; repeat for more
    #[arg(long, value_name = "KEY=TEXT")]
    pub attribute: Vec<String>,
    /// Attribute with a JSON string, number, boolean or array of strings
    #[arg(long, value_name = "KEY=JSON")]
    pub attribute_json: Vec<String>,
    /// Attribute with a moment
    #[arg(long, value_name = "KEY=RFC3339")]
    pub timestamp: Vec<String>,
    /// Consent for a category
    #[arg(long, value_name = "CATEGORY=BOOL")]
    pub consent: Vec<String>,
}

/// When a capture is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Wait {
    /// Stored by the relay
    Accepted,
    /// Both events in a final state, or the time-out is near
    Delivered,
}

impl Wait {
    pub(super) fn to_proto(self) -> WaitFor {
        match self {
            Self::Accepted => WaitFor::Accepted,
            Self::Delivered => WaitFor::Delivered,
        }
    }
}

/// A region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RegionArg {
    /// Outside the EU
    #[value(name = "non_eu", alias = "non-eu")]
    NonEu,
    /// In the EU
    Eu,
}

impl RegionArg {
    pub(super) fn to_proto(self) -> DataRegion {
        match self {
            Self::NonEu => DataRegion::NonEu,
            Self::Eu => DataRegion::Eu,
        }
    }
}

/// A state of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StateArg {
    /// Stored, not tried yet
    Queued,
    /// Tried, will be tried again
    Retrying,
    /// Segment answered 2xx
    Delivered,
    /// Nothing to send
    Skipped,
    /// Given up or refused for good
    DeadLettered,
}

impl StateArg {
    pub(super) fn to_proto(self) -> DeliveryState {
        match self {
            Self::Queued => DeliveryState::Queued,
            Self::Retrying => DeliveryState::Retrying,
            Self::Delivered => DeliveryState::Delivered,
            Self::Skipped => DeliveryState::Skipped,
            Self::DeadLettered => DeliveryState::DeadLettered,
        }
    }
}

/// A type of event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TypeArg {
    /// Identify
    Identify,
    /// Track
    Track,
}

impl TypeArg {
    pub(super) fn to_proto(self) -> EventType {
        match self {
            Self::Identify => EventType::Identify,
            Self::Track => EventType::Track,
        }
    }
}
