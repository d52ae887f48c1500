//! Removes messages that nobody reads any more, beside the calls. What is lost here is only room: the
//! next holder of a lane, or the time to live, removes it.

use futures_util::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::wire::Wire;

/// Messages that wait to be removed.
const QUEUE: usize = 8_192;
/// Removed at once.
const AT_ONCE: usize = 16;

pub(super) struct Deleter(mpsc::Sender<(String, u64)>);

impl Deleter {
    pub(super) fn start(wire: Wire, tasks: &TaskTracker, closing: CancellationToken) -> Self {
        let (sender, receiver) = mpsc::channel::<(String, u64)>(QUEUE);
        tasks.spawn(async move {
            let done = ReceiverStream::new(receiver)
                .map(|(stream, sequence)| {
                    let wire = wire.clone();
                    async move {
                        if let Err(error) = wire.delete(&stream, sequence, false).await {
                            tracing::debug!(%error, stream, sequence, "not removed");
                        }
                    }
                })
                .buffer_unordered(AT_ONCE)
                .take_until(closing.cancelled_owned());
            let mut done = std::pin::pin!(done);
            while done.next().await.is_some() {}
        });
        Self(sender)
    }

    /// Removes a message some time, or never where too many wait.
    pub(super) fn remove(&self, stream: &str, sequence: u64) {
        let _ = self.0.try_send((stream.to_owned(), sequence));
    }

    /// The same for several.
    pub(super) fn remove_all(&self, stream: &str, sequences: impl IntoIterator<Item = u64>) {
        for sequence in sequences {
            self.remove(stream, sequence);
        }
    }
}

/// Runs calls on the servers for each of many items, some at once; the first failure ends it.
pub(super) async fn for_each<T, E>(
    items: impl IntoIterator<Item = impl Future<Output = Result<T, E>>>,
) -> Result<Vec<T>, E> {
    let mut running = stream::iter(items).buffered(AT_ONCE);
    let mut all = Vec::new();
    while let Some(one) = running.next().await {
        all.push(one?);
    }
    Ok(all)
}
