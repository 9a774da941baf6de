//! WatchDeliveries: one task a watcher reads pages and puts messages into a bounded pipe; the connection takes them out.
//!
//! The task is apart from the connection because a connection whose client does not read is not polled: nobody could tell
//! that client, nor give its place to another. A client that takes nothing for the patience of the limits finds what waits
//! for it replaced by WATCHER_TOO_SLOW. Nothing wakes a watcher: it looks again at an interval, so that results cost nothing
//! when nobody watches, and results of other replicas are found like our own.
//!
//! Ends: the client goes; the server shuts down (a last `progress`, then UNAVAILABLE, so that nobody takes it for the end);
//! the caller's deadline, a key that is no longer good, a cursor that retention has overtaken, or a failing database. The
//! last cursor read is always good to go on.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::stream::Stream;
use metrics::{counter, gauge};
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::runtime::{Instant, Runtime};
use crate::service::Service;
use crate::service::watch::{Watch, WatchedView};
use crate::telemetry::names;

use super::auth::{AuthError, Caller, KeyRing};
use super::limits::{Deadline, ServerLimits};
use super::scopes::Scope;
use super::status::{self, ApiError};
use super::{convert, proto};

/// The limits of one watcher.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WatchLimits {
    pub poll: Duration,
    pub heartbeat: Duration,
    pub buffer: usize,
    pub patience: Duration,
}

impl From<&ServerLimits> for WatchLimits {
    fn from(limits: &ServerLimits) -> Self {
        Self {
            poll: limits.watch_poll,
            heartbeat: limits.watch_heartbeat,
            buffer: limits.watch_buffer,
            patience: limits.watch_patience,
        }
    }
}

/// What a watcher needs of the server.
pub struct Parts {
    pub service: Arc<Service>,
    pub keys: Arc<KeyRing>,
    pub caller: Caller,
    pub limits: WatchLimits,
    pub deadline: Option<Deadline>,
    pub shutdown: CancellationToken,
    /// Among the open watchers; given back when the task ends.
    pub place: OwnedSemaphorePermit,
}

/// The messages of one watcher.
pub struct WatchStream {
    pipe: Arc<Pipe>,
    task: JoinHandle<()>,
}

impl WatchStream {
    pub fn open(parts: Parts, watch: Watch) -> Self {
        let pipe = Arc::new(Pipe::new(parts.limits.buffer));
        let runtime = parts.service.runtime().clone();
        let task = Task { parts, watch, pipe: Arc::clone(&pipe), told_at: runtime.instant() };
        Self { pipe, task: runtime.spawn(task.run()) }
    }
}

impl Stream for WatchStream {
    type Item = Result<proto::WatchDeliveriesResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.pipe.poll_next(cx)
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        // It holds nothing that has to be put in order.
        self.task.abort();
    }
}

/// Messages on their way, at most so many.
struct Pipe {
    most: usize,
    state: Mutex<PipeState>,
    room: Notify,
}

#[derive(Default)]
struct PipeState {
    waiting: VecDeque<proto::WatchDeliveriesResponse>,
    /// After what waits.
    end: Option<Status>,
    reader: Option<Waker>,
}

impl Pipe {
    fn new(most: usize) -> Self {
        Self { most: most.max(1), state: Mutex::default(), room: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, PipeState> {
        self.state.lock().expect("no panic while held")
    }

    /// As soon as there is room. Dropping the future leaves the message out.
    async fn push(&self, message: proto::WatchDeliveriesResponse) {
        loop {
            {
                let mut state = self.state();
                if state.waiting.len() < self.most {
                    state.waiting.push_back(message);
                    if let Some(reader) = state.reader.take() {
                        reader.wake();
                    }
                    return;
                }
            }
            self.room.notified().await;
        }
    }

    fn end(&self, status: Status, drop_waiting: bool) {
        let mut state = self.state();
        if drop_waiting {
            state.waiting = VecDeque::new();
        }
        state.end = Some(status);
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<Result<proto::WatchDeliveriesResponse, Status>>> {
        let mut state = self.state();
        if let Some(message) = state.waiting.pop_front() {
            self.room.notify_one();
            return Poll::Ready(Some(Ok(message)));
        }
        if let Some(status) = state.end.take() {
            return Poll::Ready(Some(Err(status)));
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Counts in the gauge for as long as it lives.
struct Counted;

impl Counted {
    fn new() -> Self {
        gauge!(names::WATCHERS).increment(1.0);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        gauge!(names::WATCHERS).decrement(1.0);
    }
}

/// Why a watcher's task ends.
enum End {
    ShuttingDown,
    Failed(ApiError),
}

impl<E: Into<ApiError>> From<E> for End {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

struct Task {
    parts: Parts,
    watch: Watch,
    pipe: Arc<Pipe>,
    /// The last message.
    told_at: Instant,
}

impl Task {
    async fn run(mut self) {
        let _counted = Counted::new();
        let runtime = self.parts.service.runtime().clone();
        let Err(end) = self.tell(&runtime).await;
        let error = match end {
            End::Failed(error) => error,
            End::ShuttingDown => {
                // Where it was, if there is room: what waits has cursors too.
                let last = convert::watched(self.parts.service.watch_cursor(&self.watch), WatchedView::Progress);
                let mut pushing = std::pin::pin!(self.pipe.push(last));
                let _ = std::future::poll_fn(|cx| Poll::Ready(pushing.as_mut().poll(cx))).await;
                ApiError::ShuttingDown
            }
        };
        let too_slow = matches!(error, ApiError::WatcherTooSlow);
        if too_slow {
            counter!(names::WATCHERS_TOO_SLOW).increment(1);
        }
        self.pipe.end(status::status(&error, &runtime), too_slow);
    }

    async fn tell(&mut self, runtime: &Runtime) -> Result<std::convert::Infallible, End> {
        let service = Arc::clone(&self.parts.service);
        let begin = service.watch_cursor(&self.watch);
        self.push(begin, WatchedView::Progress).await?;
        loop {
            let caller = self.parts.keys.refresh(&self.parts.caller, runtime.now())?;
            if !caller.has(Scope::Read) {
                return Err(AuthError::ScopeMissing(Scope::Read).into());
            }
            self.parts.caller = caller;
            let page = tokio::select! {
                biased;
                end = interrupted(&self.parts) => return Err(end),
                page = service.watch_on(&mut self.watch) => page?,
            };
            let more = page.more;
            for (cursor, view) in service.watched(&self.watch, page).collect::<Vec<_>>() {
                self.push(cursor, view).await?;
            }
            if runtime.instant() >= self.told_at + self.parts.limits.heartbeat {
                let cursor = service.watch_cursor(&self.watch);
                self.push(cursor, WatchedView::Progress).await?;
            }
            if !more {
                tokio::select! {
                    biased;
                    end = interrupted(&self.parts) => return Err(end),
                    () = runtime.sleep(self.parts.limits.poll) => {}
                }
            }
        }
    }

    async fn push(&mut self, cursor: String, view: WatchedView) -> Result<(), End> {
        let runtime = self.parts.service.runtime().clone();
        let message = convert::watched(cursor, view);
        tokio::select! {
            biased;
            () = self.pipe.push(message) => {}
            end = interrupted(&self.parts) => return Err(end),
            () = runtime.sleep(self.parts.limits.patience) => return Err(ApiError::WatcherTooSlow.into()),
        }
        counter!(names::WATCHER_MESSAGES).increment(1);
        self.told_at = runtime.instant();
        Ok(())
    }
}

/// The server's shutdown, or the caller's deadline.
async fn interrupted(parts: &Parts) -> End {
    let deadline = async {
        match parts.deadline {
            Some(Deadline(at)) => parts.service.runtime().sleep_until(at).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = parts.shutdown.cancelled() => End::ShuttingDown,
        () = deadline => End::Failed(ApiError::DeadlineExceeded),
    }
}
