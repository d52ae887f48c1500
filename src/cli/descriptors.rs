//! File descriptors: as many as the system lets the process have, with a reserve for Segment and
//! the disk that connections of callers cannot take.

use crate::config::Config;

/// For the outbox, logs, listeners, collectors, scrapes, webhooks and key sets, with room to spare.
const RESERVE: u64 = 128;

/// Connections to each database beside those of the pool.
const DATABASE_CONNECTIONS: usize = 3;

/// Raises the soft limit to the hard one, and lowers `[server] max_connections` where they would
/// leave no descriptors for the rest.
pub(super) fn fit(config: &mut Config) {
    let Some(limit) = raise() else { return };
    let postgres = &config.postgres;
    let databases = postgres.urls.len() * (postgres.pool_size + DATABASE_CONNECTIONS);
    let own = config.delivery.max_requests_in_flight + databases;
    let fitting = connections(limit, own as u64);
    if config.server.max_connections as u64 > fitting {
        tracing::warn!(
            limit,
            max_connections = config.server.max_connections,
            fitting,
            "[server] max_connections is lowered: the limit of open files leaves room for no more; \
             raise it (ulimit -Hn, or LimitNOFILE= in a unit)"
        );
        config.server.max_connections = usize::try_from(fitting).unwrap_or(usize::MAX);
    }
}

/// Connections of callers that leave descriptors for the relay's own connections, and the reserve.
fn connections(limit: u64, own: u64) -> u64 {
    limit.saturating_sub(RESERVE + own).max(1)
}

/// The limit of open files; `None` where there is none.
#[cfg(unix)]
fn raise() -> Option<u64> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limits = getrlimit(Resource::Nofile);
    let before = limits.current;
    limits.current = limits.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limits) {
        tracing::debug!(%error, "the limit of open files cannot be raised");
        return before;
    }
    limits.current
}

#[cfg(not(unix))]
fn raise() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::connections;

    #[test]
    fn requests_to_segment_and_the_reserve_come_first() {
        assert_eq!(connections(1_024, 64), 832);
        assert_eq!(connections(524_288, 64), 524_096);
        assert_eq!(connections(100, 64), 1);
    }
}
