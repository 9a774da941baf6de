//! A driver from outside, and what happens when it panics.
//!
//! A panic in a turn is that turn's failure: what was handed over is answered as maybe sent, what was not as not
//! attempted, the connections are dropped, and a new driver goes on with the same queue after a pause.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::driver::{Command, Core, Parts, Shared};
use super::thread::SendingThreads;
use super::wire::Wire;
use crate::senders::{Batch, SenderStatus};

/// So that a panic that comes back at once does not burn a core.
const PAUSE_AFTER_PANIC: Duration = Duration::from_secs(1);

/// One credential on one endpoint, running on a sending thread.
pub(in crate::senders) struct Driver {
    commands: mpsc::UnboundedSender<Command>,
    shared: Arc<Shared>,
    max_queued: usize,
    is_draining: AtomicBool,
}

impl Driver {
    /// `make_wire` is called again after a panic.
    pub(in crate::senders) fn start<W: Wire>(
        threads: &SendingThreads,
        mut parts: Parts,
        make_wire: impl Fn() -> W + Send + 'static,
    ) -> Self {
        parts.settings = parts.settings.clamped();
        // The channel is as long as `max_queued_targets` lets it be.
        let (commands, inbox) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::default());
        let max_queued = parts.settings.max_queued_targets;
        let core = Core::new(parts.clone(), Arc::clone(&shared), inbox, make_wire());
        threads.run(Box::pin(Supervised {
            parts,
            shared: Arc::clone(&shared),
            make_wire: Box::new(make_wire),
            core: Some(core),
            pause: None,
        }));
        Self { commands, shared, max_queued, is_draining: AtomicBool::new(false) }
    }

    pub(in crate::senders) fn submit(&self, batch: Batch) -> Result<(), Batch> {
        self.submit_all(vec![batch]).pop().map_or(Ok(()), Err)
    }

    /// With one wake-up for all. Those that it cannot take come back.
    pub(in crate::senders) fn submit_all(&self, batches: Vec<Batch>) -> Vec<Batch> {
        if self.is_draining.load(Ordering::Acquire) {
            return batches;
        }
        let (mut taken, mut left) = (Vec::with_capacity(batches.len()), Vec::new());
        for batch in batches {
            let targets = batch.targets.len();
            let before = self.shared.queued.fetch_add(targets, Ordering::Relaxed);
            if before.saturating_add(targets) > self.max_queued {
                self.shared.queued.fetch_sub(targets, Ordering::Relaxed);
                left.push(batch);
            } else if targets > 0 {
                taken.push(batch);
            }
        }
        if !taken.is_empty()
            && let Err(mpsc::error::SendError(Command::Batches(batches))) = self.commands.send(Command::Batches(taken))
        {
            for batch in batches {
                self.shared.queued.fetch_sub(batch.targets.len(), Ordering::Relaxed);
                left.push(batch);
            }
        }
        left
    }

    /// Cancelling the wait does not cancel the drain.
    pub(in crate::senders) async fn drain(&self, deadline: Duration) {
        self.is_draining.store(true, Ordering::Release);
        let (done, is_done) = oneshot::channel();
        if self.commands.send(Command::Drain { deadline, done }).is_ok() {
            let _ = is_done.await;
        }
    }

    pub(in crate::senders) fn status(&self) -> SenderStatus {
        let queued = self.shared.queued.load(Ordering::Relaxed);
        SenderStatus {
            connections: self.shared.connections.load(Ordering::Relaxed),
            in_flight: self.shared.in_flight.load(Ordering::Relaxed),
            queued: u32::try_from(queued).unwrap_or(u32::MAX),
        }
    }
}

struct Supervised<W: Wire> {
    parts: Parts,
    shared: Arc<Shared>,
    make_wire: Box<dyn Fn() -> W + Send>,
    /// `None` only within a poll, and for good once a restart panicked as well.
    core: Option<Core<W>>,
    pause: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

// Nothing in it is pinned but what is boxed.
impl<W: Wire> Unpin for Supervised<W> {}

impl<W: Wire> Future for Supervised<W> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.pause {
            match pause.as_mut().poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) => self.pause = None,
            }
        }
        let Some(core) = &mut self.core else { return Poll::Ready(()) };
        // The core is not looked at again after a panic, but for answering its targets.
        if let Ok(poll) = catch_unwind(AssertUnwindSafe(|| core.poll(cx))) {
            return poll;
        }
        tracing::error!(driver = %self.parts.name, "a driver panicked; it is restarted");
        self.restart();
        let runtime = self.parts.runtime.clone();
        self.pause = Some(Box::pin(async move { runtime.sleep(PAUSE_AFTER_PANIC).await }));
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<W: Wire> Supervised<W> {
    fn restart(&mut self) {
        let Some(mut core) = self.core.take() else { return };
        let (_, nothing) = mpsc::unbounded_channel();
        let inbox = std::mem::replace(&mut core.inbox, nothing);
        let _ = catch_unwind(AssertUnwindSafe(|| core.abandon("the sender panicked before the answer")));
        // h2 panics again when one of its locks was poisoned.
        let _ = catch_unwind(AssertUnwindSafe(move || drop(core)));
        self.core = Some(Core::new(self.parts.clone(), Arc::clone(&self.shared), inbox, (self.make_wire)()));
    }
}
