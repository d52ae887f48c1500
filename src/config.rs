//! The configuration, parsed once into types.
//!
//! Three sources, the stronger first: the environment
//! (`SEGMENT_RELAY__SERVER__LISTEN` sets `listen` of `[server]`), a TOML file,
//! and [`DEFAULT_TOML`], which names and explains every setting. The
//! integrations come from the file alone.
//!
//! - All faults are reported together, each with its place. A value that a
//!   stronger source overrides is checked as well.
//! - No fault and no `Debug` shows a write key.
//! - [`Config::load`] is pure; [`Config::read`] alone touches files and the
//!   process's environment.
//!
//! Where the file breaks TOML's syntax, its settings are still checked, but its
//! integrations and unknown keys are not: a broken header moves what follows it
//! to another table, and most of what one would find there is no fault.

use std::{
    cell::RefCell,
    ffi::OsString,
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use crate::{outbox::PostgresConnection, proto, violation::Violation};

mod callers;
mod document;
mod endpoint;
mod entry;
mod exposed;
mod fault;
mod integrations;
mod listen;
mod postgres;
mod reader;
mod removed;
mod sections;
mod security;
mod telemetry;
#[cfg(test)]
mod tests;
mod value;

pub use callers::KnownCaller;
pub use endpoint::{Endpoint, EndpointError};
pub use fault::{Fault, Faults, MAX_FAULTS, Place};
pub use listen::Listen;
pub(crate) use postgres::hosts_in_clear;
pub use sections::{Delivery, Endpoints, Outbox, OutboxKind, Segment, Server};
pub use security::{JwksSource, Jwt, Limits, Notify, Secrets, Tls};
pub use telemetry::{Log, LogFormat, Metrics, Otlp, OtlpProtocol, Traces};
pub use value::OtlpHeaders;

use document::Document;
use reader::{Environment, Reader};

/// The compiled-in defaults: every setting with its unit, bounds and reason.
pub const DEFAULT_TOML: &str = include_str!("config/default.toml");

/// Name of [`DEFAULT_TOML`] in faults.
const DEFAULT_NAME: &str = "config.default.toml";
/// Largest configuration file, in bytes. Integrations live in it, so it is more
/// than settings would need.
const MAX_FILE_BYTES: u64 = 8 * 1024 * 1024;
/// Largest `write_key_file`, in bytes: many times a write key, and far from
/// what a wrong path could load.
const MAX_KEY_FILE_BYTES: u64 = 4 * 1024;

/// All that the relay is told before it starts.
#[derive(Clone)]
pub struct Config {
    /// The gRPC server.
    pub server: Server,
    /// Its TLS; `None` without.
    pub tls: Option<Tls>,
    /// What callers and integrations may use.
    pub limits: Limits,
    /// The callers of the file. Without any, and without `jwt`, nobody is
    /// authenticated and everybody may do everything.
    pub callers: Vec<KnownCaller>,
    /// Callers that an issuer of tokens vouches for.
    pub jwt: Option<Jwt>,
    /// Keys of what is stored.
    pub secrets: Secrets,
    /// Webhooks.
    pub notify: Option<Notify>,
    /// The HTTP client towards Segment.
    pub segment: Segment,
    /// How waiting events are sent and tried again.
    pub delivery: Delivery,
    /// Where and how much is stored.
    pub outbox: Outbox,
    /// The databases of the shared outbox.
    pub postgres: PostgresConnection,
    /// The collector of traces and metrics; `None` without.
    pub otlp: Option<Otlp>,
    /// What is traced.
    pub traces: Traces,
    /// What the relay counts and times.
    pub metrics: Metrics,
    /// The relay's own log.
    pub log: Log,
    /// The integrations of the file, in its order, with their write keys: take
    /// the keys out of these messages before anything prints them.
    pub integrations: Vec<proto::Integration>,
    /// The first files from which [`read`](Config::read) has taken their write keys.
    write_key_files: Vec<PathBuf>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The generated message would print its write keys.
        let ids: Vec<_> = self
            .integrations
            .iter()
            .map(|integration| &integration.integration_id)
            .collect();
        f.debug_struct("Config")
            .field("server", &self.server)
            .field("tls", &self.tls)
            .field("limits", &self.limits)
            .field("callers", &self.callers)
            .field("jwt", &self.jwt)
            .field("secrets", &self.secrets)
            .field("notify", &self.notify)
            .field("segment", &self.segment)
            .field("delivery", &self.delivery)
            .field("outbox", &self.outbox)
            .field("postgres", &self.postgres)
            .field("otlp", &self.otlp)
            .field("traces", &self.traces)
            .field("metrics", &self.metrics)
            .field("log", &self.log)
            .field("integrations", &ids)
            .finish()
    }
}

/// What loading asks of the rest of the program.
pub struct Outside<'a> {
    /// Every rule that an integration breaks, with field paths such as
    /// `integration.mappings[2].segment_key`.
    pub validate: &'a dyn Fn(&proto::Integration) -> Vec<Violation>,
    /// The content of a `write_key_file`.
    pub read_key_file: &'a dyn Fn(&Path) -> io::Result<String>,
}

impl Config {
    /// Whether callers have to prove who they are.
    #[must_use]
    pub fn authenticates(&self) -> bool {
        !self.callers.is_empty() || self.jwt.is_some()
    }

    /// Builds the configuration from the file's name and text, where there is
    /// one, and the variables of the environment.
    ///
    /// # Errors
    /// Everything that is wrong in any of the sources.
    pub fn load<K, V>(
        file: Option<(&str, &str)>,
        environment: impl IntoIterator<Item = (K, V)>,
        outside: &Outside<'_>,
    ) -> Result<Self, Faults>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        Self::load_noting(Faults::default(), file, environment, outside)
    }

    /// [`load`](Self::load) with the file at `path`, where one is named, and the
    /// environment of this process.
    ///
    /// # Errors
    /// Everything that is wrong in any of the sources, also that the file cannot
    /// be read, is larger than 8 MiB or is not UTF-8.
    pub fn read(
        path: Option<&Path>,
        validate: &dyn Fn(&proto::Integration) -> Vec<Violation>,
    ) -> Result<Self, Faults> {
        let mut faults = Faults::default();
        let file = path.and_then(|path| {
            let name = path.display().to_string();
            match read_bounded(path, MAX_FILE_BYTES) {
                Ok(text) => Some((name, text)),
                Err(error) => {
                    faults.add(Place::file(&name), "", format!("cannot be read: {error}"));
                    None
                }
            }
        });
        let write_key_files = RefCell::new(Vec::new());
        let outside = Outside {
            validate,
            read_key_file: &|path| {
                let mut files = write_key_files.borrow_mut();
                if files.len() < exposed::MAX_WRITE_KEY_FILES {
                    files.push(path.to_owned());
                }
                read_bounded(path, MAX_KEY_FILE_BYTES)
            },
        };
        let file = file
            .as_ref()
            .map(|(name, text)| (name.as_str(), text.as_str()));
        let mut config = Self::load_noting(faults, file, std::env::vars_os(), &outside)?;
        config.write_key_files = write_key_files.take();
        Ok(config)
    }

    fn load_noting<K, V>(
        mut faults: Faults,
        file: Option<(&str, &str)>,
        environment: impl IntoIterator<Item = (K, V)>,
        outside: &Outside<'_>,
    ) -> Result<Self, Faults>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let environment = Environment::new(environment, &mut faults);
        let defaults = Document::parse(DEFAULT_NAME, DEFAULT_TOML, &mut faults);
        let file = file.map(|(name, text)| Document::parse(name, text, &mut faults));

        let mut reader = Reader::new(&environment, file.as_ref(), &defaults, faults);
        // Each section on its own, so that all faults are found.
        let server = Server::take(&mut reader);
        let tls = Tls::take(&mut reader);
        let limits = Limits::take(&mut reader);
        if let (Some(server), Some(limits)) = (&server, &limits) {
            reader.at_most(
                ("server.max_message_bytes", server.max_message_bytes as u64),
                (
                    "limits.request_bytes_in_flight",
                    limits.request_bytes_in_flight,
                ),
            );
        }
        let callers = callers::take(&mut reader);
        let jwt = Jwt::take(&mut reader);
        let secrets = Secrets::take(&mut reader);
        let notify = Notify::take(&mut reader);
        let segment = Segment::take(&mut reader);
        let delivery = Delivery::take(&mut reader);
        let outbox = Outbox::take(&mut reader);
        let postgres = postgres::take(&mut reader);
        if let (Some(outbox), Some(postgres)) = (&outbox, &postgres) {
            reader.check(
                outbox.kind != OutboxKind::Postgres || !postgres.urls.is_empty(),
                ["outbox.kind", "postgres.urls"],
                "kind = \"postgres\" needs [postgres] urls",
            );
        }
        let otlp = Otlp::take(&mut reader);
        let traces = Traces::take(&mut reader);
        let metrics = Metrics::take(&mut reader);
        let log = Log::take(&mut reader);
        let integrations = integrations::take(&mut reader, outside);
        let faults = reader.finish();
        let whole = || {
            Some(Self {
                server: server?,
                tls: tls?,
                limits: limits?,
                callers,
                jwt: jwt?,
                secrets: secrets?,
                notify: notify?,
                segment: segment?,
                delivery: delivery?,
                outbox: outbox?,
                postgres: postgres?,
                otlp: otlp?,
                traces: traces?,
                metrics: metrics?,
                log: log?,
                integrations,
                write_key_files: Vec::new(),
            })
        };
        if !faults.is_empty() {
            return Err(faults);
        }
        whole().ok_or(faults)
    }
}

/// The text of a file of at most `max_bytes`.
fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<String> {
    let mut text = String::new();
    let bytes = File::open(path)?
        .take(max_bytes + 1)
        .read_to_string(&mut text)?;
    if bytes as u64 > max_bytes {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("larger than {max_bytes} bytes"),
        ));
    }
    Ok(text)
}
