//! `[postgres]`: the databases of the shared outbox.

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::config::{Config as Url, Host, SslMode};

use super::{
    reader::Reader,
    value::{
        Expected, Parsed, Raw, boolean, millis, number, one_of, optional_path, optional_secret,
        optional_text, text,
    },
};
use crate::outbox::{PostgresConnection, SynchronousCommit};

const CERTIFICATE: &str = "postgres.certificate_file";
const KEY: &str = "postgres.key_file";
/// Databases that can be named.
const MAX_DATABASES: usize = 64;

/// Reads the section.
pub(super) fn take(from: &mut Reader<'_>) -> Option<PostgresConnection> {
    const COMMITS: &[(&str, SynchronousCommit)] = &[
        ("on", SynchronousCommit::On),
        ("remote_apply", SynchronousCommit::RemoteApply),
        ("remote_write", SynchronousCommit::RemoteWrite),
        ("local", SynchronousCommit::Local),
    ];
    let urls = from.take("postgres.urls", urls)?;
    let user = from.take("postgres.user", optional_text)?;
    let password = from.take("postgres.password", optional_secret)?;
    let ca_file = from.take("postgres.ca_file", optional_path)?;
    let certificate = from.take(CERTIFICATE, optional_path)?;
    let key = from.take(KEY, optional_path)?;
    from.check(
        certificate.is_some() == key.is_some(),
        [CERTIFICATE, KEY],
        "certificate_file and key_file go together",
    );
    Some(PostgresConnection {
        urls,
        user,
        password,
        ca_file,
        identity: certificate.zip(key),
        pool_size: from.take("postgres.pool_size", number("connections", 4..=64))?,
        connect_timeout: from.take("postgres.connect_timeout_ms", millis(100..=60_000))?,
        statement_timeout: from.take("postgres.statement_timeout_ms", millis(100..=60_000))?,
        synchronous_commit: from.take("postgres.synchronous_commit", one_of(COMMITS))?,
        require_synchronous_standby: from.take("postgres.require_synchronous_standby", boolean)?,
    })
}

/// The hosts, other than this machine's own, to which connections may be in clear.
pub(crate) fn hosts_in_clear(connection: &PostgresConnection) -> Vec<String> {
    let urls = connection.urls.iter();
    let parsed = urls.filter_map(|url| url.expose_secret().parse::<Url>().ok());
    let clear = parsed.filter(|url| url.get_ssl_mode() != SslMode::Require);
    clear.flat_map(|url| remote_hosts(&url)).collect()
}

/// The hosts of a URL that are not this machine. `hostaddr` decides where it is given.
fn remote_hosts(url: &Url) -> Vec<String> {
    let addresses = url.get_hostaddrs();
    if !addresses.is_empty() {
        let remote = addresses.iter().filter(|address| !address.is_loopback());
        return remote.map(ToString::to_string).collect();
    }
    let is_loopback = |name: &str| {
        let address = name.parse::<std::net::IpAddr>();
        name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|it| it.is_loopback())
    };
    let remote = url.get_hosts().iter().filter_map(|host| match host {
        Host::Tcp(name) => (!is_loopback(name)).then(|| name.clone()),
        #[cfg(unix)]
        Host::Unix(_) => None,
    });
    remote.collect()
}

/// URLs with blanks between them, or nothing. They may hold a password.
fn urls(raw: Raw<'_>) -> Parsed<Vec<SecretString>> {
    let expected = || {
        Expected::new(format_args!(
            "at most {MAX_DATABASES} URLs with blanks between them, such as \
             postgresql://relay@10.0.0.1,10.0.0.2/relay?sslmode=require; commas separate the \
             hosts of one database"
        ))
        .hide()
    };
    let given = text(raw).map_err(|_| expected())?;
    let urls: Vec<&str> = given.split_whitespace().collect();
    let is_url = |url: &&str| {
        let has_scheme = url.starts_with("postgresql://") || url.starts_with("postgres://");
        let parsed = url.parse::<Url>();
        has_scheme && parsed.is_ok_and(|url| !url.get_hosts().is_empty())
    };
    if urls.len() <= MAX_DATABASES && urls.iter().all(is_url) {
        return Ok(urls.into_iter().map(SecretString::from).collect());
    }
    Err(expected())
}
