//! A thread that waits for commands, with a bound. Parking costs a futex; a runtime with
//! a timer would cost several system calls for each wait.

use std::{
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

/// Nothing came in time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Elapsed;

/// Receives in the thread that made it.
pub(in crate::outbox::sqlite) struct Parked {
    waker: Waker,
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

impl Parked {
    /// For this thread alone.
    pub(in crate::outbox::sqlite) fn here() -> Self {
        Self {
            waker: Arc::new(Unpark(thread::current())).into(),
        }
    }

    /// Lets commands gather, however many come.
    #[expect(clippy::disallowed_methods, reason = "the thread is its own")]
    pub(super) fn rest(&self, time: Duration) {
        thread::sleep(time);
    }

    /// Waits as long as it takes.
    pub(in crate::outbox::sqlite) fn wait<T>(
        &self,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> T {
        let mut context = Context::from_waker(&self.waker);
        loop {
            if let Poll::Ready(ready) = poll(&mut context) {
                return ready;
            }
            thread::park();
        }
    }

    /// The next command; `None` where all senders are gone.
    ///
    /// # Errors
    /// [`Elapsed`] after `wait`; without one it takes as long as it takes.
    pub(super) fn receive<T>(
        &self,
        commands: &mut mpsc::Receiver<T>,
        wait: Option<Duration>,
    ) -> Result<Option<T>, Elapsed> {
        let begun = Instant::now();
        loop {
            let mut context = Context::from_waker(&self.waker);
            if let Poll::Ready(command) = commands.poll_recv(&mut context) {
                return Ok(command);
            }
            match wait.map(|wait| wait.saturating_sub(begun.elapsed())) {
                None => thread::park(),
                Some(Duration::ZERO) => return Err(Elapsed),
                Some(left) => thread::park_timeout(left),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_wakes_it_and_nothing_ends_the_wait() {
        let (sender, mut receiver) = mpsc::channel(1);
        let parked = Parked::here();
        assert_eq!(
            parked.receive(&mut receiver, Some(Duration::from_millis(1))),
            Err(Elapsed)
        );
        let other = thread::spawn(move || sender.blocking_send(7));
        assert_eq!(parked.receive(&mut receiver, None), Ok(Some(7)));
        assert!(other.join().is_ok());
        assert_eq!(
            parked.receive(&mut receiver, Some(Duration::ZERO)),
            Ok(None)
        );
    }
}
