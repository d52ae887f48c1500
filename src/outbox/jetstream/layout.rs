//! The streams and the bucket: made where they are missing, never deleted, and compared
//! with what is wanted.

use std::{collections::HashMap, fmt, time::Duration};

use async_nats::jetstream::{
    self,
    context::{CreateStreamErrorKind, GetStreamErrorKind},
    kv,
    stream::{Config, DiscardPolicy, Placement, RetentionPolicy, StorageType},
};

use super::error::JetStreamError;

/// Counts up with every change of what lies in the streams.
const FORMAT: &str = "3";
const FORMAT_KEY: &str = "segment-relay-format";
const PARTITIONS_KEY: &str = "segment-relay-partitions";
/// How long a deleted key of the bucket leaves a mark, for those who watch.
const MARKER_TTL: Duration = Duration::from_secs(24 * 3600);
/// The server's error code for a stream that is not there.
const STREAM_NOT_FOUND: u64 = 10_059;

/// Names, and how the streams have to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// What all names begin with.
    pub prefix: String,
    /// Streams for captures, 1 to 16. Never changed once they hold something.
    pub partitions: usize,
    /// Servers that keep a copy of each message, 1, 3 or 5.
    pub replicas: usize,
    /// Bytes of one stream at the most; `None` for the servers' bound.
    pub max_bytes: Option<u64>,
    /// The cluster where the streams are placed.
    pub cluster: Option<String>,
    /// Tags of the servers where they are placed.
    pub tags: Vec<String>,
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The stream.
    pub stream: String,
    /// The setting.
    pub setting: &'static str,
    /// As it is.
    pub found: String,
    /// As it should be.
    pub wanted: String,
    /// Whether the relay can't work with it.
    pub fatal: bool,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            stream,
            setting,
            found,
            wanted,
            ..
        } = self;
        write!(f, "{stream}: {setting} is {found}, should be {wanted}")
    }
}

/// What is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayoutReport {
    /// Streams that are missing, or were made.
    pub missing: Vec<String>,
    /// Streams that are there.
    pub present: Vec<String>,
    /// What differs.
    pub differences: Vec<Difference>,
}

impl Layout {
    fn wanted_config(&self, partition: usize) -> Config {
        Config {
            name: self.stream(partition),
            description: Some("segment-relay: captures".to_owned()),
            subjects: vec![format!("{}.{partition}.>", self.prefix)],
            retention: RetentionPolicy::Limits,
            // Full streams refuse; they never forget what waits.
            discard: DiscardPolicy::New,
            storage: StorageType::File,
            num_replicas: self.replicas,
            max_bytes: self
                .max_bytes
                .map_or(-1, |bytes| i64::try_from(bytes).unwrap_or(-1)),
            max_messages: -1,
            max_messages_per_subject: -1,
            allow_direct: true,
            allow_message_ttl: true,
            allow_atomic_publish: true,
            placement: self.placement(),
            metadata: HashMap::from([
                (FORMAT_KEY.to_owned(), FORMAT.to_owned()),
                (PARTITIONS_KEY.to_owned(), self.partitions.to_string()),
            ]),
            ..Config::default()
        }
    }

    fn placement(&self) -> Option<Placement> {
        (self.cluster.is_some() || !self.tags.is_empty()).then(|| Placement {
            cluster: self.cluster.clone(),
            tags: self.tags.clone(),
        })
    }

    /// Looks at what is there, and makes what is missing where `make` says so.
    pub(super) async fn check(
        &self,
        context: &jetstream::Context,
        make: bool,
    ) -> Result<LayoutReport, JetStreamError> {
        let mut report = LayoutReport::default();
        for partition in 0..self.partitions {
            let wanted = self.wanted_config(partition);
            match find(context, &wanted.name).await? {
                Some(found) => self.compare(&found, &wanted, &mut report),
                None => {
                    report.missing.push(wanted.name.clone());
                    if make {
                        let made = context.create_stream(wanted.clone()).await;
                        made.map_err(|error| self.not_made(&wanted.name, &error))?;
                    }
                }
            }
        }
        let name = self.bucket_stream();
        match find(context, &name).await? {
            Some(found) => self.compare_replicas(&found, &mut report),
            None => {
                report.missing.push(name.clone());
                if make {
                    let made = context.create_key_value(kv::Config {
                        bucket: self.bucket(),
                        description: "segment-relay: integrations, sessions, receipts".to_owned(),
                        history: 1,
                        storage: StorageType::File,
                        num_replicas: self.replicas,
                        placement: self.placement(),
                        limit_markers: Some(MARKER_TTL),
                        ..kv::Config::default()
                    });
                    made.await
                        .map_err(|error| JetStreamError::Refused(format!("{name}: {error}")))?;
                }
            }
        }
        Ok(report)
    }

    /// Changes what differs and can be changed without losing anything.
    pub(super) async fn apply(&self, context: &jetstream::Context) -> Result<(), JetStreamError> {
        for partition in 0..self.partitions {
            let wanted = self.wanted_config(partition);
            let Some(mut config) = find(context, &wanted.name).await? else {
                continue;
            };
            config.num_replicas = wanted.num_replicas;
            config.max_bytes = wanted.max_bytes;
            config.placement.clone_from(&wanted.placement);
            config.allow_direct = true;
            config.allow_message_ttl = true;
            config.allow_atomic_publish = true;
            config.discard = wanted.discard;
            self.update(context, config).await?;
        }
        if let Some(mut config) = find(context, &self.bucket_stream()).await? {
            config.num_replicas = self.replicas;
            config.placement = self.placement();
            self.update(context, config).await?;
        }
        Ok(())
    }

    async fn update(
        &self,
        context: &jetstream::Context,
        config: Config,
    ) -> Result<(), JetStreamError> {
        let name = config.name.clone();
        let updated = context.update_stream(config).await;
        updated
            .map(drop)
            .map_err(|error| JetStreamError::Refused(format!("{name}: {error}")))
    }

    fn not_made(
        &self,
        name: &str,
        error: &jetstream::context::CreateStreamError,
    ) -> JetStreamError {
        match error.kind() {
            CreateStreamErrorKind::JetStream(_) | CreateStreamErrorKind::JetStreamUnavailable => {
                JetStreamError::Refused(format!(
                    "{name} with {} replicas cannot be made: {error}",
                    self.replicas
                ))
            }
            _ => JetStreamError::Refused(format!("{name}: {error}")),
        }
    }

    fn compare_replicas(&self, found: &Config, report: &mut LayoutReport) {
        report.present.push(found.name.clone());
        if found.num_replicas != self.replicas {
            report.differences.push(Difference {
                stream: found.name.clone(),
                setting: "replicas",
                found: found.num_replicas.to_string(),
                wanted: self.replicas.to_string(),
                fatal: found.num_replicas < self.replicas,
            });
        }
    }

    fn compare(&self, found: &Config, wanted: &Config, report: &mut LayoutReport) {
        self.compare_replicas(found, report);
        let pairs = settings(found).into_iter().zip(settings(wanted));
        for ((setting, found_value, fatal), (_, wanted, _)) in pairs {
            if found_value != wanted {
                report.differences.push(Difference {
                    stream: found.name.clone(),
                    setting,
                    found: found_value,
                    wanted,
                    fatal,
                });
            }
        }
        let bounded = [
            ("max_age", found.max_age.is_zero()),
            ("max_messages", found.max_messages <= 0),
            (
                "max_messages_per_subject",
                found.max_messages_per_subject <= 0,
            ),
        ];
        for (setting, _) in bounded.into_iter().filter(|(_, unbounded)| !unbounded) {
            report.differences.push(Difference {
                stream: found.name.clone(),
                setting,
                found: "set".to_owned(),
                wanted: "unset: it would drop events that wait".to_owned(),
                fatal: true,
            });
        }
    }
}

/// What of a stream has to be as it is wanted: name, value, and whether nothing works otherwise.
fn settings(config: &Config) -> [(&'static str, String, bool); 11] {
    let of = |key: &str| {
        let value = config.metadata.get(key).cloned();
        value.unwrap_or_else(|| "none".to_owned())
    };
    let placed = match &config.placement {
        None => "anywhere".to_owned(),
        Some(place) => {
            let cluster = place.cluster.as_deref().unwrap_or("any cluster");
            format!("{cluster} [{}]", place.tags.join(", "))
        }
    };
    let atomic = config.allow_atomic_publish.to_string();
    let ttl = config.allow_message_ttl.to_string();
    [
        ("format", of(FORMAT_KEY), true),
        ("partitions", of(PARTITIONS_KEY), true),
        ("subjects", config.subjects.join(" "), true),
        ("retention", format!("{:?}", config.retention), true),
        ("storage", format!("{:?}", config.storage), true),
        ("discard", format!("{:?}", config.discard), true),
        ("atomic batches", atomic, true),
        ("time to live of messages", ttl, true),
        ("direct reads", config.allow_direct.to_string(), true),
        ("max_bytes", config.max_bytes.to_string(), false),
        ("placement", placed, false),
    ]
}

async fn find(context: &jetstream::Context, name: &str) -> Result<Option<Config>, JetStreamError> {
    match context.get_stream(name).await {
        Ok(stream) => Ok(Some(stream.cached_info().config.clone())),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(source) if source.error_code().0 == STREAM_NOT_FOUND => {
                Ok(None)
            }
            _ => Err(JetStreamError::Refused(format!("{name}: {error}"))),
        },
    }
}
