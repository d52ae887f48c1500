//! The schema: numbered migrations, each in its own transaction, one process at a time.

use std::{sync::Arc, time::Duration};

use tokio_postgres::error::SqlState;
use zeroize::Zeroizing;

use super::{
    PostgresConnection, PostgresError,
    connect::Connector,
    error::{Effect, in_database},
    sql::Connection,
};
use crate::{
    outbox::OutboxError,
    vault::{Vault, random},
};

/// The text of each migration, from version 1 on.
const MIGRATIONS: [&str; VERSION as usize] = [
    include_str!("schema/0001_outbox.sql"),
    include_str!("schema/0002_incarnations.sql"),
];
/// The schema version that this relay reads and writes.
pub(super) const VERSION: i32 = 2;
/// Databases of one outbox: sequences advance by as many.
const MAX_DATABASES: i16 = 64;
/// Oldest server, as `server_version_num` has it.
const MIN_SERVER: i32 = 140_000;
/// What the index key is sealed for.
pub(super) const INDEX_KEY_PLACE: &str = "postgres/index-key";
/// Longest migration of one version.
const MIGRATION_LIMIT: Duration = Duration::from_secs(3_600);

/// What [`init`] changed of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchemaChange {
    /// The schema was made.
    Made,
    /// It was migrated.
    Migrated {
        /// From this version.
        from: i32,
        /// To this one.
        to: i32,
    },
    /// It was up to date.
    UpToDate,
}

/// What [`init`] did in a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitReport {
    /// `database 0`, by its place in `[postgres] urls`, and its number.
    pub database: String,
    /// What changed.
    pub change: SchemaChange,
}

/// What a database says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Differs between clusters, also after a restore by `pg_restore`.
    pub(super) system: i64,
    /// Made anew with the schema.
    pub(super) store: Vec<u8>,
    /// The number among the databases of the outbox.
    pub(super) number: i16,
    /// The sealed key of blinded values.
    index_key: Vec<u8>,
}

/// Makes or migrates the schema in each database.
///
/// # Errors
/// [`PostgresError`]; databases before the failing one are done.
pub async fn init(
    connection: &PostgresConnection,
    vault: &Arc<Vault>,
) -> Result<Vec<InitReport>, PostgresError> {
    let (mut taken, mut index_key, mut databases) = (Vec::new(), None, Vec::new());
    for place in 0..connection.urls.len() {
        let connector = Connector::new(connection, place)?;
        let found = in_database(place, connector.get().await)?;
        if in_database(place, version(&found).await)? > 0 {
            let identity = in_database(place, identity(&found).await)?;
            taken.push(identity.number);
            index_key = index_key.or(Some(open_index_key(place, vault, &identity)?));
        }
        databases.push(found);
    }
    let index_key = match index_key {
        Some(key) => key,
        None => Zeroizing::new(random::<32>()?),
    };
    let mut reports = Vec::with_capacity(databases.len());
    for (place, database) in databases.iter().enumerate() {
        // Of a database that has its schema it is not asked for.
        let number = (0..MAX_DATABASES).find(|number| !taken.contains(number));
        let number = number.unwrap_or_default();
        let sealed = vault.seal(INDEX_KEY_PLACE, index_key.as_slice())?;
        let before = in_database(place, version(database).await)?;
        let after = migrate_to(database, VERSION, number, &sealed).await;
        let change = match (before, in_database(place, after)?) {
            (_, newer) if newer > VERSION => {
                return Err(PostgresError::SchemaNewer(place, newer, VERSION));
            }
            (0, _) => SchemaChange::Made,
            (from, to) if from < to => SchemaChange::Migrated { from, to },
            _ => SchemaChange::UpToDate,
        };
        if change == SchemaChange::Made {
            taken.push(number);
        }
        let database = format!("database {place}");
        reports.push(InitReport { database, change });
    }
    Ok(reports)
}

/// Brings the schema to a version, if it is older; returns the version that is there then.
pub(super) async fn migrate_to(
    connection: &Connection,
    to: i32,
    number: i16,
    sealed_key: &[u8],
) -> Result<i32, OutboxError> {
    const SETTINGS: &str = "
        INSERT INTO settings (name, value)
        VALUES ('number', $1), ('store', $2), ('index_key', $3)";
    let first = if number == 0 { MAX_DATABASES } else { number };
    let (number, store) = (number.to_be_bytes(), fastrand::u128(..).to_be_bytes());
    let mut at = version(connection).await?;
    let known = &MIGRATIONS[..usize::try_from(to).unwrap_or(0).min(MIGRATIONS.len())];
    while let Some(sql) = usize::try_from(at).ok().and_then(|at| known.get(at)) {
        let next = at + 1;
        // Another process may have been faster: it holds the lock until it is done.
        let sql = format!(
            "BEGIN;
             SET LOCAL statement_timeout = 0;
             SET LOCAL lock_timeout = 0;
             CREATE TABLE IF NOT EXISTS schema_migrations (
                 version int4 PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now());
             LOCK TABLE schema_migrations IN ACCESS EXCLUSIVE MODE;
             INSERT INTO schema_migrations (version) VALUES ({next});
             {}",
            sql.replace("{first}", &first.to_string())
        );
        let applied = async {
            connection.batch_execute(&sql).await?;
            if next == 1 {
                let values: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
                    [&number.as_slice(), &store.as_slice(), &sealed_key];
                connection.execute(SETTINGS, &values).await?;
            }
            connection.batch_execute("COMMIT").await
        };
        let applied = async {
            let done = applied.await;
            if done.is_err() {
                let _ = connection.batch_execute("ROLLBACK").await;
            }
            match done {
                Err(error) if is_concurrent(&error) => Ok(()),
                done => done,
            }
        };
        connection
            .run_for(MIGRATION_LIMIT, Effect::Commit, applied)
            .await?;
        at = version(connection).await?;
        if at < next {
            let text = "a migration was undone".to_owned();
            return Err(OutboxError::Unavailable(text));
        }
    }
    Ok(at)
}

/// Whether another process applied the same migration at the same time.
fn is_concurrent(error: &tokio_postgres::Error) -> bool {
    let concurrent = [SqlState::UNIQUE_VIOLATION, SqlState::DUPLICATE_TABLE];
    error.code().is_some_and(|code| concurrent.contains(code))
}

/// The schema's version; 0 where there is none.
pub(super) async fn version(connection: &Connection) -> Result<i32, OutboxError> {
    const EXISTS: &str = "SELECT to_regclass('schema_migrations') IS NOT NULL";
    const VERSION: &str = "SELECT coalesce(max(version), 0) FROM schema_migrations";
    if !connection.row(EXISTS, &[]).await?.get::<_, bool>(0) {
        return Ok(0);
    }
    Ok(connection.row(VERSION, &[]).await?.get(0))
}

/// Takes the key of an embedded outbox whose captures are to be moved here, unless the
/// databases hold captures already.
pub(super) async fn adopt_index_key(
    connection: &PostgresConnection,
    vault: &Arc<Vault>,
    key: &[u8; 32],
) -> Result<(), PostgresError> {
    const ADOPT: &str = "
        UPDATE settings s SET value = i.value
        FROM (VALUES ('index_key', $1::bytea), ('store', $2::bytea)) AS i (name, value)
        WHERE s.name = i.name AND NOT EXISTS (SELECT 1 FROM captures)";
    for place in 0..connection.urls.len() {
        let connector = Connector::new(connection, place)?;
        let found = in_database(place, connector.get().await)?;
        let identity = check(&found, place, connection).await?;
        if *open_index_key(place, vault, &identity)? == *key {
            continue;
        }
        let sealed = vault.seal(INDEX_KEY_PLACE, key)?;
        // With another identity, relays that run notice it.
        let store = fastrand::u128(..).to_be_bytes().to_vec();
        let adopted = found.apply(ADOPT, &[&sealed, &store]).await;
        if in_database(place, adopted)? == 0 {
            let text = "it holds captures of another origin, whose ids and people are blinded \
                        with another key; let the embedded outbox be drained by its own relay \
                        instead";
            return Err(PostgresError::Misfit(place, text.to_owned()));
        }
    }
    Ok(())
}

/// What a database with a schema says of itself.
async fn identity(connection: &Connection) -> Result<Identity, OutboxError> {
    const SQL: &str = "
        SELECT (SELECT system_identifier FROM pg_control_system()),
            (SELECT value FROM settings WHERE name = 'store'),
            (SELECT value FROM settings WHERE name = 'number'),
            (SELECT value FROM settings WHERE name = 'index_key')";
    let row = connection.row(SQL, &[]).await?;
    let number: &[u8] = row.get(2);
    Ok(Identity {
        system: row.get(0),
        store: row.get(1),
        number: number.try_into().map_or(0, i16::from_be_bytes),
        index_key: row.get(3),
    })
}

/// The key of blinded values.
pub(super) fn open_index_key(
    place: usize,
    vault: &Vault,
    identity: &Identity,
) -> Result<Zeroizing<[u8; 32]>, PostgresError> {
    let opened = vault.unseal(INDEX_KEY_PLACE, &identity.index_key);
    let opened = Zeroizing::new(opened.map_err(|error| PostgresError::Unseal(place, error))?);
    let key = opened.as_slice().try_into();
    let damaged = || PostgresError::Misfit(place, "the index key is damaged".to_owned());
    Ok(Zeroizing::new(key.map_err(|_| damaged())?))
}

/// Refuses a server or a schema that does not fit; says how durable a commit is.
pub(super) async fn check(
    connection: &Connection,
    place: usize,
    options: &PostgresConnection,
) -> Result<Identity, PostgresError> {
    const SQL: &str = "
        SELECT current_setting('server_version_num')::int4, pg_is_in_recovery(),
            current_setting('synchronous_standby_names'), current_setting('fsync')";
    let row = in_database(place, connection.row(SQL, &[]).await)?;
    let (server, standby): (i32, &str) = (row.get(0), row.get(2));
    let misfit = |text: &str| Err(PostgresError::Misfit(place, text.to_owned()));
    if server < MIN_SERVER {
        return misfit("PostgreSQL 14 or newer is needed");
    }
    if row.get(1) {
        return misfit("a standby; name all hosts in the URL, or its primary");
    }
    if options.require_synchronous_standby && standby.is_empty() {
        return misfit(
            "synchronous_standby_names is empty, and [postgres] require_synchronous_standby is set",
        );
    }
    match in_database(place, version(connection).await)? {
        VERSION => {}
        older if older < VERSION => return Err(PostgresError::Schema(place, older, VERSION)),
        newer => return Err(PostgresError::SchemaNewer(place, newer, VERSION)),
    }
    let identity = in_database(place, identity(connection).await)?;
    tracing::info!(
        database = place,
        server,
        synchronous_commit = options.synchronous_commit.as_str(),
        synchronous_standby_names = standby,
        fsync = row.get::<_, &str>(3),
        "a capture is accepted once PostgreSQL has committed it"
    );
    Ok(identity)
}
