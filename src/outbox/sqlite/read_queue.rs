//! What the reader is asked, in three ranks: leases before look-ups before scans. So no caller
//! can keep deliveries waiting by lists; and no rank waits for ever.

use std::task::{Context, Poll};

use tokio::sync::mpsc;

use super::{READ_QUEUE, committer::parked::Parked, read_command::ReadCommand};
use crate::outbox::OutboxError;

/// Ranks, the first one first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// Deliveries wait for it.
    Lease,
    /// One capture or integration.
    LookUp,
    /// A piece of a list or a search.
    Scan,
}

const RANKS: usize = 3;
/// Commands of higher ranks that are done before one that waits.
const PATIENCE: u32 = 8;

/// Where commands are sent.
#[derive(Clone, Debug)]
pub(super) struct ReadSender([mpsc::Sender<ReadCommand>; RANKS]);

/// Where the reader takes them.
pub(super) struct ReadReceiver {
    ranks: [mpsc::Receiver<ReadCommand>; RANKS],
    /// Commands of higher ranks since the last one of each rank.
    passed: [u32; RANKS],
}

pub(super) fn channel() -> (ReadSender, ReadReceiver) {
    let (leases, lease) = mpsc::channel(READ_QUEUE);
    let (look_ups, look_up) = mpsc::channel(READ_QUEUE);
    let (scans, scan) = mpsc::channel(READ_QUEUE);
    let receiver = ReadReceiver {
        ranks: [lease, look_up, scan],
        passed: [0; RANKS],
    };
    (ReadSender([leases, look_ups, scans]), receiver)
}

impl ReadSender {
    pub(super) async fn send(&self, command: ReadCommand) -> Result<(), OutboxError> {
        let rank = command.rank() as usize;
        let sent = self.0[rank].send(command).await;
        sent.map_err(|_| OutboxError::Closed)
    }
}

impl ReadReceiver {
    /// Waits for the next command; `None` where all senders are gone.
    pub(super) fn next(&mut self, parked: &Parked) -> Option<ReadCommand> {
        parked.wait(|context| self.poll_next(context))
    }

    /// What has been sent already.
    pub(super) fn rest(&mut self) -> Option<ReadCommand> {
        self.ranks.iter_mut().find_map(|rank| rank.try_recv().ok())
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<ReadCommand>> {
        let overdue = (1..RANKS).rev().find(|rank| self.passed[*rank] >= PATIENCE);
        let mut closed = [false; RANKS];
        for rank in overdue.into_iter().chain(0..RANKS) {
            match self.ranks[rank].poll_recv(context) {
                Poll::Ready(Some(command)) => {
                    self.passed[rank] = 0;
                    for lower in &mut self.passed[rank + 1..] {
                        *lower = lower.saturating_add(1);
                    }
                    return Poll::Ready(Some(command));
                }
                Poll::Ready(None) => closed[rank] = true,
                Poll::Pending => self.passed[rank] = 0,
            }
        }
        match closed {
            [true, true, true] => Poll::Ready(None),
            _ => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::sync::oneshot;

    use super::*;
    use crate::outbox::{
        LeaseBudget, LeaseScope,
        conformance::{id, lane},
    };

    fn lease() -> ReadCommand {
        ReadCommand::Lease {
            lane: lane("acme"),
            budget: LeaseBudget {
                max_events: 1,
                max_bytes: 1,
            },
            scope: LeaseScope::All,
            reply: oneshot::channel().0,
        }
    }

    fn look_up() -> ReadCommand {
        ReadCommand::Backlog {
            integration_id: id("acme"),
            reply: oneshot::channel().0,
        }
    }

    fn scan() -> ReadCommand {
        ReadCommand::Receipts {
            before: None,
            limit: 1,
            reply: oneshot::channel().0,
        }
    }

    #[test]
    fn leases_come_first_and_no_rank_waits_for_ever() {
        let (sender, mut receiver) = channel();
        let send = |command| {
            let sent = sender.send(command).now_or_never().expect("room");
            sent.expect("open");
        };
        for _ in 0..40 {
            send(scan());
            send(look_up());
            send(lease());
        }
        let parked = Parked::here();
        let order: Vec<_> = (0..120)
            .map(|_| receiver.next(&parked).expect("sent").rank())
            .collect();
        assert_eq!(order[..8], [Rank::Lease; 8]);
        let place = |rank| order.iter().position(|one| *one == rank).expect("there");
        assert!(
            place(Rank::LookUp) <= 10 && place(Rank::Scan) <= 10,
            "{order:?}"
        );
        // While leases wait, of ten commands eight are leases.
        let leases = order[..40].iter().filter(|rank| **rank == Rank::Lease);
        assert!(leases.count() >= 30, "{order:?}");
        drop(sender);
        assert!(receiver.next(&parked).is_none());
    }
}
