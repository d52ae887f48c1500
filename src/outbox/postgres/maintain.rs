//! What one relay does for all: forgets what is old, folds the counters of relays that are
//! gone, vacuums the queue, and its payloads after an erasure. In bounded pieces.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use super::{database::Database, error::Effect};
use crate::outbox::OutboxError;

/// How often it is looked for something to do.
const INTERVAL: Duration = Duration::from_secs(5);
/// Captures of one piece.
const PIECE: i64 = 2_000;
/// Pieces of one round at the most.
const PIECES: usize = 200;
/// Longest vacuum of one table.
const VACUUM_LIMIT: Duration = Duration::from_secs(600);
/// Dead rows of the queue for which it is vacuumed. Leases and settlements pass over them, and
/// autovacuum comes once a minute and takes its time: at 10,000 captures a second there are
/// a million by then.
const DEAD_ROWS: i64 = 50_000;
/// Rounds after which what was passed over is looked at again.
const ROUNDS: u32 = 720;

impl Database {
    /// Maintains the database until the outbox closes, if this relay is the one to do it.
    pub(super) async fn maintain(self: Arc<Self>) {
        let (mut after, mut rounds, mut kept_dead) = (0, 0_u32, 0);
        loop {
            let round = async {
                tokio::time::sleep(INTERVAL).await;
                rounds = rounds.wrapping_add(1);
                if rounds.is_multiple_of(ROUNDS) {
                    after = 0;
                }
                self.round(&mut after).await?;
                self.vacuum_queue(&mut kept_dead).await
            };
            match self.context.closing.run_until_cancelled(round).await {
                None => return,
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    tracing::warn!(database = self.place, %error, "maintenance failed");
                }
            }
        }
    }

    async fn round(&self, after: &mut i64) -> Result<(), OutboxError> {
        if !self.is_available() {
            return Ok(());
        }
        if self.vacuum.swap(false, Ordering::AcqRel)
            && let Err(error) = self.vacuum_payloads().await
        {
            self.vacuum.store(true, Ordering::Release);
            return Err(error);
        }
        if !self.session()?.prefers("maintenance") {
            return Ok(());
        }
        self.fold().await?;
        for _ in 0..PIECES {
            if !self.forget_piece(after).await? {
                break;
            }
        }
        Ok(())
    }

    /// Removes captures that are older than ids are remembered; returns whether there may be
    /// more. Those that wait or are dead letters stay, and are passed over.
    pub(super) async fn forget_piece(&self, after: &mut i64) -> Result<bool, OutboxError> {
        const SQL: &str = "
            WITH piece AS MATERIALIZED (
                SELECT seq, lane, stored_at < now() - $3 * interval '1 millisecond' AS is_old
                FROM captures WHERE seq > $1 ORDER BY seq LIMIT $2
            ), gone AS (
                DELETE FROM captures c USING piece p
                WHERE c.seq = p.seq AND p.is_old
                    AND EXISTS (SELECT 1 FROM integrations i
                        WHERE i.key = c.integration AND i.state = 'active')
                    AND NOT EXISTS (SELECT 1 FROM queue q WHERE q.lane = p.lane
                        AND q.replayed IN (false, true) AND q.seq = p.seq)
                    AND NOT EXISTS (SELECT 1 FROM dead_letters d WHERE d.seq = p.seq)
            )
            SELECT max(seq) FILTER (WHERE is_old), count(*) FILTER (WHERE is_old) FROM piece";
        let remember = self.context.options.remember.as_millis();
        // Longer than PostgreSQL's times reach is for ever.
        let remember = remember.min(1_000 * 365 * 86_400_000) as f64;
        let connection = self.control.get().await?;
        let row = connection.row(SQL, &[after, &PIECE, &remember]).await?;
        if let Some(last) = row.get(0) {
            *after = last;
        }
        Ok(row.get::<_, i64>(1) == PIECE)
    }

    /// Adds the counters of relays that are gone to those of relay 0.
    async fn fold(&self) -> Result<(), OutboxError> {
        const RELAYS: &str =
            "DELETE FROM relays WHERE expires < clock_timestamp() - interval '1 minute'";
        const FOLD: &str = "
            WITH gone AS (
                DELETE FROM backlog b
                WHERE b.relay <> 0
                    AND NOT EXISTS (SELECT 1 FROM relays r WHERE r.relay = b.relay)
                RETURNING integration, events, bytes
            )
            INSERT INTO backlog (integration, relay, slot, events, bytes)
            SELECT integration, 0, 0, sum(events), sum(bytes) FROM gone GROUP BY integration
            ORDER BY integration
            ON CONFLICT (integration, relay, slot) DO UPDATE
            SET events = backlog.events + excluded.events, bytes = backlog.bytes + excluded.bytes";
        let connection = self.control.get().await?;
        connection.apply(RELAYS, &[]).await?;
        connection.apply(FOLD, &[]).await.map(drop)
    }

    /// Gives the pages of erased payloads back, and what stood in them.
    async fn vacuum_payloads(&self) -> Result<(), OutboxError> {
        self.run_vacuum("VACUUM queue").await?;
        self.run_vacuum("VACUUM dead_letters").await
    }

    /// Vacuums the queue once it has many dead rows: twice as many as an older transaction
    /// has kept the last time.
    pub(super) async fn vacuum_queue(&self, kept: &mut i64) -> Result<(), OutboxError> {
        const DEAD: &str = "SELECT pg_stat_get_dead_tuples('queue'::regclass)";
        if !self.is_available() || !self.session()?.prefers("maintenance") {
            return Ok(());
        }
        let connection = self.control.get().await?;
        let dead: i64 = connection.row(DEAD, &[]).await?.get(0);
        if dead < DEAD_ROWS.max(2 * *kept) {
            return Ok(());
        }
        drop(connection);
        // Without truncation, for which callers would wait.
        self.run_vacuum("VACUUM (TRUNCATE off) queue").await?;
        *kept = self.control.get().await?.row(DEAD, &[]).await?.get(0);
        Ok(())
    }

    async fn run_vacuum(&self, sql: &str) -> Result<(), OutboxError> {
        let connection = self.control.get().await?;
        let vacuumed = async {
            connection
                .batch_execute("SET statement_timeout = 0")
                .await?;
            connection.batch_execute(sql).await?;
            connection.batch_execute("RESET statement_timeout").await
        };
        connection
            .run_for(VACUUM_LIMIT, Effect::None, vacuumed)
            .await
    }
}
