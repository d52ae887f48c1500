//! The keys under which the store is sealed: which of them it uses, and the change
//! to another.
//!
//! In the table `vault`: `index`, the sealed key of what is blinded, which never
//! changes; `key/<id>`, one for each key that something may still be sealed under;
//! `payloads`, the id of the key under which all payloads are known to be sealed.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use crate::{
    outbox::sealing::{Sealing, integration_place, receipt_place},
    vault::{KeyId, UnsealError, Vault, VaultError, random},
};

const INDEX: &str = "index";
const PAYLOADS: &str = "payloads";
const KEY_PREFIX: &str = "key/";

/// Why the keys don't fit.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Something is sealed under a key that is not known.
    #[error("it uses the key {0}, which is not among those of [secrets]; add it, below the first")]
    Unknown(String),
    /// Something can't be unsealed.
    #[error(transparent)]
    Unseal(#[from] UnsealError),
    /// There are no random bytes.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] rusqlite::Error),
}

/// What a store is sealed with, and whether its payloads are still to be sealed
/// anew.
pub(super) struct Prepared {
    pub(super) sealing: Arc<Sealing>,
    pub(super) rekey: bool,
}

/// Checks that all keys of the store are there, and seals all but the payloads under
/// the current one.
pub(super) fn prepare(
    connection: &mut Connection,
    vault: &Arc<Vault>,
    payloads: bool,
) -> Result<Prepared, KeyError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let known: Vec<String> = {
        let mut names = transaction.prepare("SELECT name FROM vault WHERE name LIKE 'key/%'")?;
        let names = names.query_map([], |row| row.get(0))?;
        names.collect::<rusqlite::Result<_>>()?
    };
    let current = key_name(vault.current());
    for name in &known {
        let id = name.trim_start_matches(KEY_PREFIX);
        if !key_id(id).is_some_and(|id| vault.knows(id)) {
            return Err(KeyError::Unknown(id.to_owned()));
        }
    }
    let index_key = match get(&transaction, INDEX)? {
        Some(sealed) => vault.unseal(INDEX, &sealed)?,
        None => random::<32>()?.to_vec(),
    };
    let index_key: [u8; 32] = index_key.try_into().map_err(|_| UnsealError::Damaged)?;
    if !known.contains(&current) {
        put(&transaction, &current, &[])?;
        put(&transaction, INDEX, &vault.seal(INDEX, &index_key)?)?;
        reseal(
            &transaction,
            vault,
            "integration",
            "spec",
            integration_place,
        )?;
        reseal(&transaction, vault, "erasure", "receipt", receipt_place)?;
    }
    let sealed_payloads = get(&transaction, PAYLOADS)?;
    if !payloads {
        transaction.execute("DELETE FROM vault WHERE name = ?1", params![PAYLOADS])?;
    }
    let others = known.iter().any(|name| *name != current);
    let unsealed = payloads && sealed_payloads.as_deref() != Some(&vault.current().0);
    transaction.commit()?;
    Ok(Prepared {
        sealing: Arc::new(Sealing::new(Arc::clone(vault), &index_key, payloads)),
        rekey: others || unsealed,
    })
}

/// The key of what is blinded, of a store that was prepared.
pub(super) fn index_key(
    connection: &Connection,
    vault: &Vault,
) -> Result<zeroize::Zeroizing<[u8; 32]>, KeyError> {
    let sealed: Vec<u8> =
        connection.query_row("SELECT value FROM vault WHERE name = ?1", [INDEX], |row| {
            row.get(0)
        })?;
    let plain = zeroize::Zeroizing::new(vault.unseal(INDEX, &sealed)?);
    let mut key = zeroize::Zeroizing::new([0; 32]);
    if plain.len() != key.len() {
        return Err(UnsealError::Damaged.into());
    }
    key.copy_from_slice(&plain);
    Ok(key)
}

/// Notes that nothing is sealed under another key any more.
pub(super) fn finish(transaction: &Transaction<'_>, sealing: &Sealing) -> rusqlite::Result<()> {
    let current = sealing.vault.current();
    let gone = transaction.execute(
        "DELETE FROM vault WHERE name LIKE 'key/%' AND name <> ?1",
        params![key_name(current)],
    )?;
    if sealing.payloads {
        put(transaction, PAYLOADS, &current.0)?;
    }
    if gone > 0 {
        tracing::info!(key = %current, "all is sealed under the first key; the others can go");
    }
    Ok(())
}

/// Seals the small tables anew.
fn reseal(
    transaction: &Transaction<'_>,
    vault: &Vault,
    table: &str,
    column: &str,
    place: fn(&str) -> String,
) -> Result<(), KeyError> {
    let mut rows =
        transaction.prepare(&format!("SELECT CAST(id AS TEXT), {column} FROM {table}"))?;
    let rows: Vec<(String, Vec<u8>)> = rows
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    let update = format!("UPDATE {table} SET {column} = ?2 WHERE CAST(id AS TEXT) = ?1");
    for (id, sealed) in rows {
        let plain = zeroize::Zeroizing::new(vault.unseal(&place(&id), &sealed)?);
        let sealed = vault.seal(&place(&id), &plain)?;
        transaction
            .prepare_cached(&update)?
            .execute(params![id, sealed])?;
    }
    Ok(())
}

fn get(transaction: &Transaction<'_>, name: &str) -> rusqlite::Result<Option<Vec<u8>>> {
    transaction
        .prepare_cached("SELECT value FROM vault WHERE name = ?1")?
        .query_row(params![name], |row| row.get(0))
        .optional()
}

fn put(transaction: &Transaction<'_>, name: &str, value: &[u8]) -> rusqlite::Result<()> {
    transaction
        .prepare_cached(
            "INSERT INTO vault (name, value) VALUES (?1, ?2)
             ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        )?
        .execute(params![name, value])?;
    Ok(())
}

fn key_name(id: KeyId) -> String {
    format!("{KEY_PREFIX}{id}")
}

fn key_id(hex_digits: &str) -> Option<KeyId> {
    let mut id = [0; 4];
    hex::decode_to_slice(hex_digits, &mut id).ok()?;
    Some(KeyId(id))
}
