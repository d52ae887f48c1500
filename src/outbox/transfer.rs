//! Moves an embedded outbox into the shared one: piece by piece, each of which is removed here
//! once it is stored there. A run that was interrupted is repeated: what is there already is known
//! by its mark.

use std::{path::Path, sync::Arc, time::Duration};

use super::{
    JetStreamError, NatsHandle, OutboxError, PostgresError,
    jetstream::Import,
    sqlite::{ExportError, export::Export},
};
use crate::{time::UnixMillis, vault::Vault};

/// Captures of one piece: with their payloads and dead letters they fit into one batch.
const PIECE: usize = 200;

/// Why an outbox can't be moved. What was moved before stays moved.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The embedded outbox can't be read.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The shared outbox can't be used.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    /// The shared outbox can't be used.
    #[error(transparent)]
    JetStream(#[from] JetStreamError),
    /// The shared outbox can't be written.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
}

/// What was moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Integrations that were stored; those that were there already are left as they are.
    pub integrations: u64,
    /// Captures, with what waits of them.
    pub captures: u64,
    /// Captures that the shared outbox had accepted itself.
    pub known: u64,
    /// Captures whose id it had accepted with other content: they stay in the embedded outbox.
    pub conflicts: Vec<String>,
    /// Receipts of erasures.
    pub receipts: u64,
    /// Notices that were not sent yet.
    pub notices: u64,
}

/// Moves all of the outbox in a directory. `progress` hears how many captures are moved,
/// of how many.
///
/// # Errors
/// [`MoveError`]; to be called again.
pub async fn move_outbox(
    directory: &Path,
    handle: NatsHandle,
    vault: &Arc<Vault>,
    remember: Duration,
    mut progress: impl FnMut(u64, u64),
) -> Result<Moved, MoveError> {
    let mut export = Export::open(directory, vault)?;
    let import = Import::open(handle, vault, export.index_key(), remember).await?;
    let mut moved = Moved::default();
    small_things(&export, &import, &mut moved).await?;
    let (total, _) = export.counts()?;
    let mut after = 0;
    loop {
        let piece = export.captures(after, PIECE)?;
        let Some(last) = piece.last() else { break };
        after = last.sequence;
        let imported = import.take(piece, UnixMillis::now()).await?;
        let gone: Vec<i64> = imported
            .moved
            .iter()
            .chain(&imported.known)
            .copied()
            .collect();
        export.remove(&gone)?;
        moved.captures += imported.moved.len() as u64;
        moved.known += imported.known.len() as u64;
        moved
            .conflicts
            .extend(imported.conflicts.into_iter().map(|(_, name)| name));
        progress(moved.captures + moved.known, total);
    }
    Ok(moved)
}

/// All but the captures. Each is stored under its own name, or looked for first.
async fn small_things(
    export: &Export,
    import: &Import,
    moved: &mut Moved,
) -> Result<(), MoveError> {
    let there = import.state.integrations(&import.sealing).await?;
    for spec in export.integrations()? {
        if there
            .iter()
            .any(|one| one.integration_id == spec.integration_id)
        {
            continue;
        }
        import.state.put_integration(&import.sealing, &spec).await?;
        moved.integrations += 1;
    }
    let there = import
        .state
        .receipts(&import.sealing, None, usize::MAX)
        .await?;
    for mut receipt in export.receipts()? {
        receipt.receipt_id.clear();
        let is_there = there.iter().any(|one| {
            let mut same = one.clone();
            same.receipt_id.clear();
            same == receipt
        });
        if !is_there {
            import
                .state
                .put_receipt(&import.sealing, &mut receipt)
                .await?;
            moved.receipts += 1;
        }
    }
    for notice in export.notices()? {
        import.state.put_notice(&notice).await?;
        moved.notices += 1;
    }
    Ok(())
}
