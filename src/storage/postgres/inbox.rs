//! Requests that wait for the task that does them together: bounded in count and in bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::fail::unavailable;
use crate::storage::{Result, StoreError};

/// Requests that may wait.
const MAX_WAITING: usize = 8_192;
/// Requests that are taken at a time.
const GROUP_MAX: usize = 256;

pub(super) struct Waiting<R, A> {
    pub request: R,
    bytes: usize,
    reply: oneshot::Sender<Result<A>>,
}

impl<R, A> Waiting<R, A> {
    /// The caller may have gone; it is done all the same.
    pub fn answer(self, answer: Result<A>) {
        drop(self.reply.send(answer));
    }

    /// The same with an answer that is made of the request.
    pub fn answer_by(self, answer: impl FnOnce(R) -> Result<A>) {
        drop(self.reply.send(answer(self.request)));
    }
}

/// The callers' end.
pub(super) struct Inbox<R, A> {
    queue: mpsc::Sender<Waiting<R, A>>,
    bytes: Arc<AtomicUsize>,
    max_bytes: usize,
}

/// The task's end.
pub(super) struct Groups<R, A> {
    waiting: mpsc::Receiver<Waiting<R, A>>,
    bytes: Arc<AtomicUsize>,
    /// Of the group that was taken last.
    taken: usize,
}

pub(super) fn inbox<R, A>(max_bytes: usize) -> (Inbox<R, A>, Groups<R, A>) {
    let (queue, waiting) = mpsc::channel(MAX_WAITING);
    let bytes = Arc::<AtomicUsize>::default();
    (Inbox { queue, bytes: Arc::clone(&bytes), max_bytes }, Groups { waiting, bytes, taken: 0 })
}

impl<R, A> Inbox<R, A> {
    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }

    /// Once queued it happens, whether or not anybody waits for the answer.
    pub async fn ask(&self, request: R, bytes: usize, doing: &'static str) -> Result<A> {
        let full = || StoreError::Overloaded { what: "the queue to the database is full" };
        if self.bytes.load(Ordering::Relaxed) + bytes > self.max_bytes {
            return Err(full());
        }
        let (reply, answer) = oneshot::channel();
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Err(refused) = self.queue.try_send(Waiting { request, bytes, reply }) {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(match refused {
                mpsc::error::TrySendError::Full(_) => full(),
                mpsc::error::TrySendError::Closed(_) => unavailable(doing),
            });
        }
        answer.await.unwrap_or_else(|_| Err(unavailable(doing)))
    }
}

impl<R, A> Groups<R, A> {
    /// All that wait, up to a limit; the group before has been answered. `None` once nothing comes any more: the callers
    /// are gone, or it is stopping and the queue is empty.
    pub async fn next(&mut self, stopping: &CancellationToken) -> Option<Vec<Waiting<R, A>>> {
        self.bytes.fetch_sub(std::mem::take(&mut self.taken), Ordering::Relaxed);
        let mut group = Vec::new();
        loop {
            tokio::select! {
                biased;
                count = self.waiting.recv_many(&mut group, GROUP_MAX) => {
                    self.taken = group.iter().map(|waiting| waiting.bytes).sum();
                    return (count > 0).then_some(group);
                }
                () = stopping.cancelled() => {
                    self.waiting.close();
                    if self.waiting.is_empty() {
                        return None;
                    }
                }
            }
        }
    }
}
