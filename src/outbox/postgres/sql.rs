//! Statements: each within its time limit, and with what its failure may mean.

use std::{
    future::Future,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool_postgres::Object;
use futures_util::future::{join_all, join3};
use tokio_postgres::{Row, types::ToSql};

use super::error::{Effect, damaged};
use crate::outbox::OutboxError;

pub(super) type Arguments<'a> = &'a [&'a (dyn ToSql + Sync)];
pub(super) type Columns<'a> = Vec<Box<dyn ToSql + Sync + Send + 'a>>;

/// The columns of rows, each as an array for `unnest`.
macro_rules! columns {
    ($rows:expr, $row:ident => $($value:expr),+ $(,)?) => {
        vec![$(
            Box::new($rows.iter().map(|$row| $value).collect::<Vec<_>>())
                as Box<dyn tokio_postgres::types::ToSql + Sync + Send + '_>
        ),+]
    };
}
pub(super) use columns;

pub(super) fn arguments<'a>(columns: &'a Columns<'_>) -> Vec<&'a (dyn ToSql + Sync)> {
    columns.iter().map(|one| &**one as _).collect()
}

/// The part of a transaction that some statements are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    First,
    Last,
    Whole,
}

/// A connection of the pool. One that was left in the middle of its work is closed.
pub(super) struct Connection {
    object: Option<Object>,
    is_clean: AtomicBool,
    in_transaction: AtomicBool,
    limit: Duration,
    /// Commits whose wait for a standby was cancelled on the server: they are not confirmed.
    unconfirmed: Arc<AtomicU64>,
}

impl Connection {
    pub(super) fn new(object: Object, limit: Duration, unconfirmed: Arc<AtomicU64>) -> Self {
        Self {
            object: Some(object),
            is_clean: AtomicBool::new(true),
            in_transaction: AtomicBool::new(false),
            limit,
            unconfirmed,
        }
    }

    /// The rows of a statement that reads, or belongs to a transaction.
    pub(super) async fn rows(
        &self,
        sql: &str,
        arguments: Arguments<'_>,
    ) -> Result<Vec<Row>, OutboxError> {
        let work = async {
            let statement = self.prepare_cached(sql).await?;
            self.query(&statement, arguments).await
        };
        self.run(Effect::None, work).await
    }

    /// Its only row.
    pub(super) async fn row(
        &self,
        sql: &str,
        arguments: Arguments<'_>,
    ) -> Result<Row, OutboxError> {
        let first = self.optional(sql, arguments).await?;
        first.ok_or_else(|| damaged("answer"))
    }

    /// Its first row, if there is one.
    pub(super) async fn optional(
        &self,
        sql: &str,
        arguments: Arguments<'_>,
    ) -> Result<Option<Row>, OutboxError> {
        Ok(self.rows(sql, arguments).await?.into_iter().next())
    }

    /// Runs a statement as its own transaction; returns the number of changed rows.
    pub(super) async fn apply(
        &self,
        sql: &str,
        arguments: Arguments<'_>,
    ) -> Result<u64, OutboxError> {
        let work = async {
            let statement = self.prepare_cached(sql).await?;
            self.execute(&statement, arguments).await
        };
        self.run(Effect::Commit, work).await
    }

    /// Runs statements in one round trip; the rows of each.
    pub(super) async fn transact(
        &self,
        part: Part,
        statements: &[(&str, Arguments<'_>)],
    ) -> Result<Vec<Vec<Row>>, OutboxError> {
        let ends = part != Part::First;
        let effect = if ends { Effect::Commit } else { Effect::None };
        self.transact_with(effect, part, statements).await
    }

    /// The same, where it does not matter whether the commit is confirmed.
    pub(super) async fn transact_with(
        &self,
        effect: Effect,
        part: Part,
        statements: &[(&str, Arguments<'_>)],
    ) -> Result<Vec<Vec<Row>>, OutboxError> {
        let (begins, ends) = (part != Part::Last, part != Part::First);
        let unless = async |skipped: bool, sql| match skipped {
            true => Ok(()),
            false => self.batch_execute(sql).await,
        };
        let work = async {
            let mut prepared = Vec::with_capacity(statements.len());
            for (sql, _) in statements {
                prepared.push(self.prepare_cached(sql).await?);
            }
            let queries = prepared.iter().zip(statements);
            let queries = queries.map(|(prepared, (_, arguments))| self.query(prepared, arguments));
            // Sent in this order, before any of the answers is read.
            let (begun, answers, committed) = join3(
                unless(!begins, "BEGIN"),
                join_all(queries),
                unless(!ends, "COMMIT"),
            )
            .await;
            begun?;
            let answers = answers.into_iter().collect::<Result<_, _>>()?;
            committed.map(|()| answers)
        };
        if begins {
            self.in_transaction.store(true, Ordering::Relaxed);
        }
        let answers = self.run(effect, work).await?;
        if ends {
            self.in_transaction.store(false, Ordering::Relaxed);
        }
        Ok(answers)
    }

    /// Begins a transaction. Unless it is ended, the connection is closed.
    pub(super) async fn begin(&self) -> Result<(), OutboxError> {
        self.transact(Part::First, &[]).await.map(drop)
    }

    pub(super) async fn commit(&self) -> Result<(), OutboxError> {
        self.transact(Part::Last, &[]).await.map(drop)
    }

    pub(super) async fn rollback(&self) -> Result<(), OutboxError> {
        let work = self.batch_execute("ROLLBACK");
        self.run(Effect::None, work).await?;
        self.in_transaction.store(false, Ordering::Relaxed);
        Ok(())
    }

    async fn run<T>(
        &self,
        effect: Effect,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, OutboxError> {
        self.run_for(self.limit, effect, work).await
    }

    /// Runs statements within another time limit.
    pub(super) async fn run_for<T>(
        &self,
        limit: Duration,
        effect: Effect,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, OutboxError> {
        self.is_clean.store(false, Ordering::Relaxed);
        let unconfirmed = self.unconfirmed.load(Ordering::Acquire);
        let done = tokio::time::timeout(limit, work).await;
        let done = done.map_err(|_| effect.timed_out())?;
        let value = done.map_err(|error| effect.failed(&error))?;
        self.is_clean.store(true, Ordering::Relaxed);
        // Of this connection or another one: it may concern this commit.
        if effect == Effect::Commit && unconfirmed != self.unconfirmed.load(Ordering::Acquire) {
            let text = "the wait for the synchronous standby was cancelled".to_owned();
            return Err(OutboxError::OutcomeUnknown(text));
        }
        Ok(value)
    }
}

impl Deref for Connection {
    type Target = Object;

    #[expect(clippy::expect_used, reason = "taken in Drop alone")]
    fn deref(&self) -> &Object {
        self.object.as_ref().expect("present until it is dropped")
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let is_idle = !self.in_transaction.load(Ordering::Relaxed);
        if !(self.is_clean.load(Ordering::Relaxed) && is_idle)
            && let Some(object) = self.object.take()
        {
            drop(Object::take(object));
        }
    }
}
