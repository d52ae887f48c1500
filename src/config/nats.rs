//! `[nats]`: the servers of the shared outbox.

use std::path::PathBuf;

use secrecy::SecretString;

use super::{
    reader::Reader,
    value::{
        Expected, Parsed, Raw, boolean, number, optional_path, optional_secret, optional_text, text,
    },
};

const SERVERS: &str = "nats.servers";
const CREDENTIALS: &str = "nats.credentials_file";
const USER: &str = "nats.user";
const PASSWORD: &str = "nats.password";
const TOKEN: &str = "nats.token";
const TLS: &str = "nats.tls";
const CA: &str = "nats.ca_file";
const CERTIFICATE: &str = "nats.certificate_file";
const REPLICAS: &str = "nats.replicas";
const KEY: &str = "nats.key_file";
/// Servers that can be named.
const MAX_SERVERS: usize = 32;
const MAX_BYTES: u64 = 1 << 50;

/// `[nats]`: the servers of the shared outbox, and how its streams are made.
#[derive(Clone, Debug)]
pub struct Nats {
    /// URLs of servers, at most 32.
    pub servers: Vec<String>,
    /// File with a JWT and its seed.
    pub credentials_file: Option<PathBuf>,
    /// User, with `password`.
    pub user: Option<String>,
    /// Password, with `user`.
    pub password: Option<SecretString>,
    /// Token.
    pub token: Option<SecretString>,
    /// Whether connections have to be encrypted.
    pub tls: bool,
    /// CAs of the servers' certificates, PEM; the machine's by default.
    pub ca_file: Option<PathBuf>,
    /// The relay's certificate and its key, PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// What the names of streams and subjects begin with.
    pub prefix: String,
    /// Copies of each message, 1, 3 or 5.
    pub replicas: usize,
    /// Streams for captures, 1 to 16.
    pub partitions: usize,
    /// Bytes of one stream at the most; the servers' bound where it is `None`.
    pub max_stream_bytes: Option<u64>,
    /// The cluster in which the streams are.
    pub cluster: Option<String>,
    /// Tags of the servers on which the streams are.
    pub tags: Vec<String>,
}

impl Nats {
    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        let servers = from.take(SERVERS, servers)?;
        let credentials_file = from.take(CREDENTIALS, optional_path)?;
        let user = from.take(USER, optional_text)?;
        let password = from.take(PASSWORD, optional_secret)?;
        let token = from.take(TOKEN, optional_secret)?;
        let tls = from.take(TLS, boolean)?;
        let ca_file = from.take(CA, optional_path)?;
        let certificate = from.take(CERTIFICATE, optional_path)?;
        let key = from.take(KEY, optional_path)?;
        from.check(
            user.is_some() == password.is_some(),
            [USER, PASSWORD],
            "user and password go together",
        );
        let ways = [credentials_file.is_some(), user.is_some(), token.is_some()];
        from.check(
            ways.into_iter().filter(|given| *given).count() <= 1,
            [CREDENTIALS, USER, TOKEN],
            "give one of credentials_file, user with password, and token",
        );
        from.check(
            certificate.is_some() == key.is_some(),
            [CERTIFICATE, KEY],
            "certificate_file and key_file go together",
        );
        from.check(
            tls || (ca_file.is_none() && certificate.is_none()),
            [TLS, CA, CERTIFICATE],
            "ca_file and certificate_file need tls = true",
        );
        let replicas: usize = from.take(REPLICAS, number("servers", 1..=5))?;
        from.check(
            replicas % 2 == 1,
            [REPLICAS],
            "replicas must be 1, 3 or 5: an even number bears no more failures than one less",
        );
        Some(Self {
            servers,
            credentials_file,
            user,
            password,
            token,
            tls,
            ca_file,
            identity: certificate.zip(key),
            prefix: from.take("nats.prefix", prefix)?,
            replicas,
            partitions: from.take("nats.partitions", number("streams", 1..=16))?,
            max_stream_bytes: from
                .take("nats.max_stream_bytes", number("bytes", 0..=MAX_BYTES))
                .map(|bytes: u64| (bytes > 0).then_some(bytes))?,
            cluster: from.take("nats.cluster", optional_text)?,
            tags: from.take("nats.tags", words)?,
        })
    }
}

/// URLs with blanks or commas between them, or nothing. They may hold a password.
fn servers(raw: Raw<'_>) -> Parsed<Vec<String>> {
    let expected = || {
        Expected::new(format_args!(
            "at most {MAX_SERVERS} URLs such as nats://10.0.0.1:4222 or tls://nats.internal:4222, with \
             commas between them and without user and password, which have settings of their own"
        ))
        .hide()
    };
    let servers = words(raw).map_err(|_| expected())?;
    let is_fine = |url: &String| {
        let rest = url
            .strip_prefix("nats://")
            .or_else(|| url.strip_prefix("tls://"));
        rest.is_some_and(|rest| !rest.contains('@'))
            && url.parse::<async_nats::ServerAddr>().is_ok()
    };
    if servers.len() <= MAX_SERVERS && servers.iter().all(is_fine) {
        return Ok(servers);
    }
    Err(expected())
}

/// Words with blanks or commas between them.
fn words(raw: Raw<'_>) -> Parsed<Vec<String>> {
    let text = text(raw)?;
    let words = text.split([',', ' ']).filter(|word| !word.is_empty());
    Ok(words.map(str::to_owned).collect())
}

fn prefix(raw: Raw<'_>) -> Parsed<String> {
    let is_fine = |text: &String| {
        (1..=32).contains(&text.len())
            && text
                .bytes()
                .all(|one| one.is_ascii_alphanumeric() || one == b'-' || one == b'_')
    };
    let expected = || Expected::new("1 to 32 of A-Z, a-z, 0-9, - and _");
    text(raw).ok().filter(is_fine).ok_or_else(expected)
}
